"""Weights keep their meaning: models with fixed weights compute what they did when other folders were written.

What differs here differs for every model that somebody has trained. A change that is meant needs new figures: this file
prints them, `python -m tests.models.test_pinned`.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.text import ByteTextConfig, ByteTextEncoder
from videodit.models.vae import VAEConfig, VideoVAE

SHAPE = {"in_channels": 4, "hidden_size": 24, "num_heads": 2, "text_dim": 12, "frequency_dim": 16}
PLACES = {"absolute_position": True, "micro_conditioning": True}


def wave(*shape: int, number: int = 0) -> Tensor:
    """Numbers in [-1, 1] that no generator draws."""
    count = torch.Size(shape).numel()
    return torch.sin((1 + 0.618 * number % 1) * torch.arange(count, dtype=torch.float64) + number).view(shape)


def fixed(module: nn.Module) -> nn.Module:
    """The module in float64 with weights of about the size of trained ones."""
    tensors = [*module.double().parameters(), *module.buffers()]
    with torch.no_grad():
        for number, tensor in enumerate(tensors):
            values = wave(*tensor.shape, number=number)
            tensor.copy_(1.5 * values * tensor.shape[-1] ** -0.5 if tensor.dim() > 1 else 0.6 + 0.3 * values)
    return module.eval()


def dit(origin: Tensor | None = None, micro_conditions: Tensor | None = None, **changes: object) -> Tensor:
    model = fixed(VideoDiT(DiTConfig(**SHAPE, **changes)))  # type: ignore[arg-type]
    sigma = torch.tensor([[0.9, 0.7, 0.2], [0.5, 0.5, 0.0]])
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    text = wave(2, 5, 12, number=3)
    latents = wave(2, 4, 3, 4, 8, number=1)
    return model(latents, sigma, text, mask, origin=origin, micro_conditions=micro_conditions)  # type: ignore[no-any-return]


def dit_with_all_parts() -> Tensor:
    conditions = torch.tensor([[480.0, 640.0, 0.0, 16.0, 8.0], [1080.0, 1920.0, 4.0, 0.0, 30.0]])
    places = {"origin": torch.tensor([[0, 0], [4, 6]]), "micro_conditions": conditions, **PLACES}
    return dit(**places, pattern="stf", depth=3, patch_size=(1, 4, 2), local_width=8, local_depth=1)


def plain_dit() -> Tensor:
    return dit(pattern="st", depth=2, activation="gelu", qk_norm="none", final_modulation="bias")


def vae() -> VideoVAE:
    blocks = {"encoder_blocks": ("c", "cp", "p"), "decoder_blocks": ("p", "c", "cp")}
    return fixed(VideoVAE(VAEConfig(latent_channels=4, channels=(8, 16, 16), **blocks)))  # type: ignore[return-value]


def posterior() -> Tensor:
    found = vae().posterior(wave(2, 3, 9, 16, 24, number=2))
    return torch.cat([found.mean, found.logvar])


def decoded() -> Tensor:
    return vae().decode(wave(2, 4, 3, 2, 3, number=2))


def text() -> Tensor:
    encoder = fixed(ByteTextEncoder(ByteTextConfig(dim=12, buckets=64, depth=2, num_heads=2)))
    return encoder.encode(["a small red circle moves left", ""]).embeddings  # type: ignore[operator, no-any-return]


FIGURES: dict[Callable[[], Tensor], list[float]] = {
    dit_with_all_parts: [-0.175, 3.1277, -2.5446, -2.2786, 0.0022, 8.9116],
    plain_dit: [-2.0918, -0.828, 3.6387, 4.2502, -2.6782, 12.3255],
    posterior: [-0.5018, -0.2834, -1.6499, 3.0904, 1.8423, 3.3378],
    decoded: [-0.4211, 0.5117, 0.8437, -0.022, 1.1602, 2.1464],
    text: [-0.5328, 0.7435, 0.8127, 0.4778, -0.3688, 0.7825],
}


def figures(out: Tensor) -> Tensor:
    """Five values and the mean square of all."""
    return torch.stack([*out.flatten()[:: out.numel() // 5][:5], out.square().mean()])


@pytest.mark.parametrize("compute", FIGURES)
def test_computes_what_it_did(compute: Callable[[], Tensor]) -> None:
    with torch.no_grad():
        found = figures(compute())
    torch.testing.assert_close(found, torch.tensor(FIGURES[compute], dtype=found.dtype), rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    with torch.no_grad():
        for compute in FIGURES:
            print(f"    {compute.__name__}: {[round(value, 4) for value in figures(compute()).tolist()]},")
