"""Which noise levels a model is trained at, and at which it is sampled."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

GIVEN_BELOW = 0.02
"""noise level of a frame that is given rather than to be denoised, where a clip's frames have levels of their own"""


@dataclass(frozen=True)
class NoiseLevelConfig:
    """Density of the noise level in training."""

    density: Literal["logit_normal", "uniform", "ddpm"] = "logit_normal"
    """logit_normal, uniform in sigma, or ddpm (uniform over the 1000 steps of DDPM's linear schedule)"""
    mean: float = 0.0
    """mean of logit(sigma) before the shift (logit_normal)"""
    std: float = 1.0
    """standard deviation of logit(sigma) (logit_normal)"""
    shift: float = 3.0
    """moves levels towards noise, sigma' = s sigma / (1 + (s - 1) sigma); 1 is none"""
    frame_slope: float = 0.0
    """most that logit(sigma) rises from one latent frame to the next, each clip drawing its own; 0: one level a clip"""

    def __post_init__(self) -> None:
        if self.density not in ("logit_normal", "uniform", "ddpm"):
            raise ValueError(f"density {self.density!r} of the noise levels is not one of logit_normal, uniform, ddpm")
        if self.std <= 0:
            raise ValueError(f"std {self.std} of the noise levels is not positive: use for example 1.0")
        if self.shift <= 0:
            raise ValueError(
                f"shift {self.shift} of the noise levels is not positive: 1 is no shift, 3 moves towards noise"
            )
        if self.frame_slope < 0:
            raise ValueError(
                f"frame_slope {self.frame_slope} of the noise levels is negative: 0 gives all frames one level"
            )


def shift_sigma(sigma: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma). Source: Esser et al. (2024), SD3, arXiv:2403.03206, Eq. 23."""
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def ddpm_sigma(step: Tensor) -> Tensor:
    """Noise level on the rectified path with the signal-to-noise ratio of DDPM's step 0..999.

    Betas run linearly from 1e-4 to 0.02; sqrt(alpha_bar) : sqrt(1 - alpha_bar) = (1 - sigma) : sigma.
    Source: Ho et al. (2020), arXiv:2006.11239, Sec. 4.
    """
    alpha_bar = torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)[step]
    signal, noise = alpha_bar.sqrt(), (1.0 - alpha_bar).sqrt()
    return (noise / (signal + noise)).float()


def sigma_from_uniform(uniform: Tensor, config: NoiseLevelConfig) -> Tensor:
    """Noise levels of the density, by its inverse distribution function.

    Args:
        uniform: (n,) uniform numbers in (0, 1).
        config: the density.
    Returns:
        (n,) noise levels in (0, 1).
    Source: logit-normal: Esser et al. (2024), arXiv:2403.03206, Sec. 3.1.
    """
    if config.density == "ddpm":
        return shift_sigma(ddpm_sigma((uniform * 1000).long().clamp(max=999)), config.shift)
    if config.density == "uniform":
        return shift_sigma(uniform, config.shift)
    normal = math.sqrt(2.0) * torch.erfinv(2.0 * uniform.double() - 1.0)
    return shift_sigma(torch.sigmoid(config.mean + config.std * normal).float(), config.shift)


def frame_levels(sigma: Tensor, frames: int, slope: Tensor, focus: Tensor, config: NoiseLevelConfig) -> Tensor:
    """Levels of a clip's latent frames: one frame has the clip's, those before it are cleaner, those after noisier.

    What a prompt says about motion is plainest where the frames before can be seen. The rise of logit(sigma) a frame is
    config.frame_slope u^2 for a uniform u, so that near-equal levels, at which clips are sampled, stay frequent.

    Args:
        sigma: (b,) noise levels in (0, 1).
        frames: t.
        slope: (b,) uniform numbers in [0, 1), the u above.
        focus: (b,) uniform numbers in [0, 1): which frame has sigma.
        config: the density.
    Returns:
        (b, t).
    Source: Chen et al. (2024), Diffusion Forcing, arXiv:2407.01392 (a level for each frame); Sun et al. (2025),
    AR-Diffusion, arXiv:2503.07418 (levels that do not fall from frame to frame).
    """
    if config.frame_slope == 0:
        return sigma[:, None].expand(-1, frames)
    place = torch.arange(frames, device=sigma.device)[None] - (focus * frames).long()[:, None]  # b t
    logit = torch.logit(sigma.double(), eps=1e-9)[:, None] + config.frame_slope * slope.square()[:, None] * place
    return torch.sigmoid(logit).to(sigma.dtype)


def frames_to_denoise(sigma: Tensor, config: NoiseLevelConfig) -> Tensor:
    """Which of the frames of `frame_levels` count in the loss: from one nearly clean there is nothing to learn.

    Returns:
        sigma's shape, bool; all true where a clip has one level.
    """
    return sigma >= (GIVEN_BELOW if config.frame_slope > 0 else 0.0)


def sampling_levels(num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 noise levels from 1 to 0, evenly spaced, then shifted."""
    return shift_sigma(torch.linspace(1.0, 0.0, num_steps + 1), shift)
