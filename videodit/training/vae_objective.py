"""The VAE's loss."""

from dataclasses import dataclass

import torch
from torch import Tensor

from videodit.models.vae import VideoVAE, gaussian_kl


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the VAE's loss terms, each a mean over values."""

    l1: float = 1.0
    """absolute error of the pixels in [-1, 1]"""
    mse: float = 0.0
    """squared error of the pixels: weighs what is far off, such as the edge of a small object"""
    kl: float = 1e-6
    """KL divergence of the posterior from a standard normal, in nats per latent value"""

    def __post_init__(self) -> None:
        for name in ("l1", "mse", "kl"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"loss.{name} {getattr(self, name)} is no weight: use 0 or more")
        if not self.l1 and not self.mse:
            raise ValueError("loss.l1 and loss.mse are both 0, so that nothing rebuilds the clips: use for example 1")


class VAEObjective(torch.nn.Module):
    """The VAE with its loss, as one module: clips in, losses per clip out."""

    def __init__(self, vae: VideoVAE, weights: VAELossConfig) -> None:
        super().__init__()
        self.vae, self.weights = vae, weights

    def forward(self, clip: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of a micro batch.

        Args:
            clip: (b, c, t, h, w) in [-1, 1].
            noise: standard normal, of the latents' shape.
        Returns:
            (b,) the weighted loss and (b,) the squared error alone, float32.
        """
        posterior = self.vae.posterior(clip)
        error = (self.vae.decode(posterior.sample(noise)) - clip).float().flatten(1)
        squared = error.square().mean(dim=1)
        kl = gaussian_kl(posterior.mean.float(), posterior.logvar.float()) / noise[0].numel()
        return self.weights.l1 * error.abs().mean(dim=1) + self.weights.mse * squared + self.weights.kl * kl, squared
