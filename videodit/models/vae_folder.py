"""What the rest of videodit asks of a video VAE, and loading whichever a folder holds."""

from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from videodit.models.vae import Posterior, VideoVAE
from videodit.models.vae_wan import WanVAE, is_wan_vae


class VideoAutoencoderConfig(Protocol):
    """The shape of a video VAE."""

    @property
    def latent_channels(self) -> int:
        """Channels of a latent frame."""

    @property
    def channel_mean(self) -> tuple[float, ...] | None:
        """Means of the channels of fields; None for videos."""

    @property
    def channel_std(self) -> tuple[float, ...] | None:
        """Standard deviations of the channels of fields; None for videos."""

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, after the first."""

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent position, along height and along width."""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(c, t, h, w) of the latents of a clip; raises ValueError if its size does not fit."""


class VideoAutoencoder(Protocol):
    """A video VAE: clips (b, c, t, h, w) in [-1, 1] to normalised latents and back."""

    @property
    def config(self) -> VideoAutoencoderConfig:
        """Its shape."""

    def posterior(self, clip: Tensor) -> Posterior:
        """Distribution of a clip's normalised latents."""

    def encode(self, clip: Tensor) -> Tensor:
        """The posterior mean."""

    def decode(self, latents: Tensor) -> Tensor:
        """The clip."""

    def decode_stream(self, latents: Tensor) -> Tensor:
        """The clip, without the memory of all frames' activations at once."""

    def to(self, device: Any) -> "VideoAutoencoder":
        """Itself, moved."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config and weights."""


def load_vae(folder: str | Path) -> VideoAutoencoder:
    """A `VideoVAE`, or the Wan VAE where config.json says so; in evaluation mode.

    Raises:
        UserError: if the folder or its weights are missing, damaged or do not fit the config.
        MissingExtra: for the Wan VAE without diffusers.
    """
    return WanVAE.from_pretrained(folder) if is_wan_vae(folder) else VideoVAE.from_pretrained(folder)
