"""The Wan VAE of the `diffusers` library, with the interface of `VideoVAE`; its latents are normalised like ours."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from videodit.errors import MissingExtra, UserError, user_error
from videodit.models.latent_shape import latent_shape
from videodit.models.vae import Posterior

CLASS_NAME = "AutoencoderKLWan"
_WEIGHTS = "diffusion_pytorch_model*.safetensors"


@dataclass(frozen=True)
class WanVAEConfig:
    """What the rest of videodit asks of a VAE's shape."""

    latent_channels: int
    temporal_compression: int
    spatial_compression: int
    channel_mean: None = None  # it reads videos
    channel_std: None = None

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(c, t, h, w) of the latents of a clip; raises ValueError if its size does not fit."""
        shape = (self.latent_channels, self.temporal_compression, self.spatial_compression)
        return latent_shape(*shape, num_frames, height, width)


class WanVAE(nn.Module):
    """A pretrained `AutoencoderKLWan`, frozen; computes in float32.

    Args:
        model: the diffusers model.
    Source: Wan Team (2025), arXiv:2503.20314, Sec. 4.1.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.float().eval().requires_grad_(False)
        theirs = model.config
        self.config = WanVAEConfig(theirs.z_dim, theirs.scale_factor_temporal, theirs.scale_factor_spatial)
        for name, values in (("mean", theirs.latents_mean), ("std", theirs.latents_std)):
            self.register_buffer(name, torch.tensor(values).view(1, -1, 1, 1, 1), persistent=False)

    def posterior(self, clip: Tensor) -> Posterior:
        """Encodes (b, c, t, h, w) in [-1, 1] into a Posterior over normalised latents."""
        gaussian = self.model.encode(clip.float()).latent_dist
        return Posterior((gaussian.mean - self.mean) / self.std, gaussian.logvar - 2.0 * torch.log(self.std))

    def encode(self, clip: Tensor) -> Tensor:
        """The posterior mean, normalised: (b, c, 4k+1, h, w) -> (b, latent_channels, k+1, h/8, w/8).

        Raises:
            ValueError: if the size does not fit; names the nearest that does.
        """
        self.config.latent_shape(*clip.shape[2:])
        return self.posterior(clip).mean

    def decode(self, latents: Tensor) -> Tensor:
        """(b, latent_channels, k+1, h, w) normalised latents -> (b, c, 4k+1, 8h, 8w) in [-1, 1]."""
        decoded: Tensor = self.model.decode(latents.float() * self.std + self.mean).sample
        return decoded

    def decode_stream(self, latents: Tensor) -> Tensor:
        """As `decode`, which is frame by frame in diffusers."""
        return self.decode(latents)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and weights as diffusers does."""
        try:
            self.model.save_pretrained(folder)
        except OSError as error:
            raise user_error(error, folder) from None

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "WanVAE":
        """Loads a folder in diffusers' layout.

        Raises:
            MissingExtra: if diffusers is not installed.
            UserError: if the folder's weights are missing, damaged or do not fit its config.
        """
        try:
            from diffusers import AutoencoderKLWan
        except ImportError:
            raise MissingExtra("diffusers", "wan") from None
        folder = Path(folder)
        if not any(folder.glob(_WEIGHTS)):
            raise UserError(f"{folder} has no weights: {_WEIGHTS} is missing; copy it there")
        try:
            model, loaded = AutoencoderKLWan.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True, low_cpu_mem_usage=False
            )
            wrong = loaded["missing_keys"] or loaded["unexpected_keys"] or loaded["mismatched_keys"]
            if wrong:
                raise UserError(f"the weights in {folder} do not fit its config.json: {sorted(map(str, wrong))[0]}")
            return cls(model)
        except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
            detail = " ".join(str(error).split())
            raise UserError(f"the VAE in {folder} cannot be loaded: {detail[:300]}") from None


def is_wan_vae(folder: str | Path) -> bool:
    """Whether the folder's config.json names the class."""
    try:
        return bool(json.loads((Path(folder) / "config.json").read_text()).get("_class_name") == CLASS_NAME)
    except (OSError, ValueError, AttributeError):
        return False
