"""The path between data and noise, and what a model is asked to predict on it.

Noise level sigma in [0, 1], 1 is noise: x_sigma = (1 - sigma) x0 + sigma noise; its velocity is noise - x0. The
variance-preserving path of DDPM is the same path rescaled: at equal signal-to-noise ratio its point is
x_sigma / sqrt((1 - sigma)^2 + sigma^2). So one sigma names a noise level on both, and a model trained on either is
sampled by the same samplers (`to_velocity`).

Legend: sigma is broadcast against x0 (b, c, t, h, w); noise has x0's shape.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Path = Literal["rectified", "variance_preserving"]
Prediction = Literal["velocity", "x0", "noise", "v"]

LEAST_ALPHA = 6.3e-3
"""Just below DDPM's at its last step (6.35e-3; 6.31e-3 on the rectified path), beyond which it trains nothing. An error
of a noise prediction is one over alpha times as large in x0, and sampling starts where alpha is 0."""
LEAST_BETA = 1e-3


@dataclass(frozen=True)
class Parameterization:
    """Which path the model sees and what it predicts there."""

    path: Path = "rectified"
    """rectified flow, or the variance_preserving path of DDPM"""
    prediction: Prediction = "velocity"
    """velocity (noise - x0), x0 (the clean latents), noise (DDPM's epsilon) or v (alpha noise - beta x0; only on the
    variance-preserving path)"""

    def __post_init__(self) -> None:
        if self.path not in ("rectified", "variance_preserving"):
            raise ValueError(f"flow.path {self.path!r} is not one of rectified, variance_preserving")
        if self.prediction not in ("velocity", "x0", "noise", "v"):
            raise ValueError(f"flow.prediction {self.prediction!r} is not one of velocity, x0, noise, v")
        if self.prediction == "v" and self.path == "rectified":
            raise ValueError(
                "flow.prediction 'v' belongs to flow.path variance_preserving: set that, or predict velocity"
            )


def coefficients(path: Path, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(alpha, beta) of x = alpha x0 + beta noise at a noise level; each sigma's shape."""
    if path == "rectified":
        return 1.0 - sigma, sigma
    norm = torch.sqrt((1.0 - sigma) ** 2 + sigma**2)
    return (1.0 - sigma) / norm, sigma / norm


def interpolate(path: Path, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The noisy point between x0 and noise.

    Source: Liu et al. (2022), Rectified flow, arXiv:2209.03003, Eq. 1; Ho et al. (2020), DDPM, arXiv:2006.11239, Eq. 4.
    """
    alpha, beta = coefficients(path, sigma)
    return alpha * x0 + beta * noise


def target(parameterization: Parameterization, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """What the model should predict at a noise level.

    Source: as `interpolate`; v: Salimans & Ho (2022), arXiv:2202.00512, Sec. 4 (and Appendix D).
    """
    if parameterization.prediction == "velocity":
        return noise - x0
    if parameterization.prediction == "noise":
        return noise
    if parameterization.prediction == "x0":
        return x0
    alpha, beta = coefficients(parameterization.path, sigma)
    return alpha * noise - beta * x0


def to_velocity(parameterization: Parameterization, prediction: Tensor, x: Tensor, sigma: Tensor) -> Tensor:
    """The rectified velocity noise - x0 that a prediction stands for.

    Args:
        parameterization: of the model.
        prediction: the model's output at the point x of its own path.
        x: that point, alpha x0 + beta noise.
        sigma: noise level, broadcast against x.
    Returns:
        x's shape. Where a noise prediction has lost x0 (alpha near 0), alpha is held at LEAST_ALPHA; likewise beta
        where an x0 prediction has lost the noise.
    """
    if parameterization.prediction == "velocity":
        return prediction
    alpha, beta = coefficients(parameterization.path, sigma)
    if parameterization.prediction == "x0":
        return (x - alpha * prediction) / beta.clamp(min=LEAST_BETA) - prediction
    if parameterization.prediction == "noise":
        return prediction - (x - beta * prediction) / alpha.clamp(min=LEAST_ALPHA)
    noise = beta * x + alpha * prediction  # alpha^2 + beta^2 = 1
    x0 = alpha * x - beta * prediction
    return noise - x0
