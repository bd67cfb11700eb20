"""Classifier-free guidance."""

from collections.abc import Callable

import torch
from torch import Tensor


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """v_uncond + g (v_cond - v_uncond); 1 is no guidance.

    Source: Ho & Salimans (2022), arXiv:2207.12598, Eq. 6 (there with g = 1 + w).
    """
    return unconditional + scale * (conditional - unconditional)


def guided_velocity(velocity: Callable[[Tensor, Tensor], Tensor], scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A guided velocity out of one that is called with conditional rows first, then unconditional ones.

    Args:
        velocity: (x (2b, …), sigma (2b,)) -> (2b, …); its text has the b prompts, then b times the empty one.
        scale: guidance scale g.
    Returns:
        (x (b, …), sigma (b,)) -> (b, …).
    """

    def call(x: Tensor, sigma: Tensor) -> Tensor:
        both = velocity(torch.cat([x, x]), torch.cat([sigma, sigma]))
        conditional, unconditional = both.chunk(2)
        return guided(conditional, unconditional, scale)

    return call
