"""The training loss of the flow model."""

from typing import Literal

import torch
from torch import Tensor

Weighting = Literal["uniform", "velocity", "min_snr", "learned"]
MIN_SIGMA = 0.05
"""Below this noise level the velocity weight grows no further (arXiv:2511.13720 clips at the same value)."""


def frame_error(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each latent frame.

    Args:
        prediction: (b, c, t, h, w).
        target: the same shape.
    Returns:
        (b, t) float32.
    """
    return (prediction.float() - target.float()).square().mean(dim=(1, 3, 4))


def flow_loss(error: Tensor, frame_weight: Tensor) -> Tensor:
    """Mean squared error of each clip, over its weighted latent frames.

    Args:
        error: (b, t) from `frame_error`.
        frame_weight: (b, t) weight of each latent frame, 0 for a frame that is given as a condition.
    Returns:
        (b,) float32; 0 for a clip all of whose frames are conditions.
    """
    return _frame_mean(error, frame_weight)


def likelihood_loss(error: Tensor, frame_weight: Tensor, log_error: Tensor) -> Tensor:
    """error / e^u + u of each clip, over its weighted latent frames: least where e^u is the expected error.

    Every noise level then has the same share of the gradient, whatever error is left at it.

    Args:
        error: (b, t) from `frame_error`.
        frame_weight: (b, t), 0 for a frame that is given as a condition.
        log_error: (b, t) u, see `videodit.models.level_error`.
    Returns:
        (b,) float32; 0 for a clip all of whose frames are conditions.
    Source: Karras et al. (2024), EDM2, arXiv:2312.02696 (loss weighting by learned uncertainty).
    """
    return _frame_mean(error * torch.exp(-log_error) + log_error, frame_weight)


def level_weight(sigma: Tensor, weighting: Weighting, gamma: float = 5.0) -> Tensor:
    """Weight of a noise level in the loss.

    Args:
        sigma: any shape, noise level in [0, 1].
        weighting: uniform, or learned, whose weights `likelihood_loss` makes; velocity: 1 / sigma^2, which makes the
            error of an x0 prediction that of the velocity it stands for; min_snr: min(snr, gamma) / snr with
            snr = ((1 - sigma) / sigma)^2, for noise prediction.
    Returns:
        sigma's shape.
    Source: Li & He (2025), arXiv:2511.13720, Sec. 4 (velocity); Hang et al. (2023), arXiv:2303.09556, Sec. 3.4
    (min_snr).
    """
    if weighting in ("uniform", "learned"):
        return torch.ones_like(sigma)
    if weighting == "velocity":
        return sigma.clamp(min=MIN_SIGMA) ** -2
    snr = ((1.0 - sigma) / sigma.clamp(min=1e-4)).square()
    return gamma / snr.clamp(min=gamma)  # min(snr, gamma) / snr, and 1 at snr 0


def _frame_mean(loss: Tensor, frame_weight: Tensor) -> Tensor:
    """(b, t) -> (b,) weighted sum over the frames that have a weight, by their number."""
    return (loss * frame_weight).sum(dim=1) / (frame_weight > 0).sum(dim=1).clamp(min=1)
