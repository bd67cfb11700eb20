"""Models so small that a test runs them in milliseconds, with every weight drawn: no zeros of a fresh model."""

from typing import TypeVar

import torch
from torch import nn

from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.text import ByteTextConfig, ByteTextEncoder
from videodit.models.vae import VAEConfig, VideoVAE

ModuleT = TypeVar("ModuleT", bound=nn.Module)


@torch.no_grad()
def randomize(module: ModuleT, scale: float = 0.2) -> ModuleT:
    """Adds noise to every parameter, and gives every gate, shortcut and last layer something to do."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)
    return module.eval()


def tiny_dit(**changes) -> VideoDiT:
    torch.manual_seed(0)
    shape = {"in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "text_dim": 12, "frequency_dim": 16}
    return randomize(VideoDiT(DiTConfig(**{**shape, **changes})))


def tiny_text() -> ByteTextEncoder:
    torch.manual_seed(0)
    return randomize(ByteTextEncoder(ByteTextConfig(dim=12, buckets=64, depth=2, num_heads=2, max_words=8)), 0.1)


def tiny_vae(**changes) -> VideoVAE:
    torch.manual_seed(0)
    shape = {"latent_channels": 4, "channels": (8, 16, 16)}
    return randomize(VideoVAE(VAEConfig(**{**shape, **changes})), 0.1)
