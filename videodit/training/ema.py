"""Exponential moving averages with power-function profiles, on the slices of the weights that this rank owns.

Source: Karras et al. (2024), "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
section 3.1 and appendix C.
"""

from collections.abc import Sequence
from typing import Protocol

import torch


class _Slice(Protocol):
    @property
    def weight(self) -> torch.Tensor: ...


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a power-function average whose profile has the relative width sigma_rel.

    Solves sigma_rel² = (gamma + 1) / ((gamma + 2)² (gamma + 3)) by bisection (the right side falls for gamma ≥ 0).

    Raises:
        ValueError: if sigma_rel is not in (0, 0.28].
    """
    if not 0 < sigma_rel <= 0.28:
        raise ValueError(f"ema profile {sigma_rel} is outside (0, 0.28]; 0.05 and 0.10 are usual")
    low, high = 0.0, 1e6
    while True:
        mid = (low + high) / 2
        if mid in (low, high):
            return mid
        if (mid + 1) / ((mid + 2) ** 2 * (mid + 3)) > sigma_rel**2:
            low = mid
        else:
            high = mid


def beta_of(gamma: float, step: int) -> float:
    """Weight that the old average keeps at a step counted from 1: (1 - 1/step)^(gamma + 1); 0 at step 1."""
    return float((1 - 1 / step) ** (gamma + 1))


class PowerEMA:
    """Averages of the weights, one per profile, in fp32 and sharded as the weights are.

    Each rank averages only the slices that it owns, so the memory is 4 bytes × profiles × parameters / ranks at
    ZeRO 1-3. Nothing here communicates.

    Args:
        slices: the engine's slices; their `weight` must stay a live view of the master weights.
        profiles: relative widths sigma_rel, smaller is shorter.
    """

    def __init__(self, slices: Sequence[_Slice], profiles: Sequence[float] = (0.05, 0.10)) -> None:
        self.profiles = tuple(profiles)
        self.gammas = [gamma_of(sigma_rel) for sigma_rel in profiles]
        self._live = [piece.weight for piece in slices]
        self.averages = [[weight.clone() for weight in self._live] for _ in profiles]
        """One list per profile, in the order of the slices."""

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after optimizer step `step` (counted from 1)."""
        for gamma, average in zip(self.gammas, self.averages, strict=True):
            if average:
                torch._foreach_lerp_(average, self._live, 1 - beta_of(gamma, step))

    def state(self) -> dict[str, list[torch.Tensor]]:
        """Live averages by name in a checkpoint (ema0, ema1, …), each in the order of the slices."""
        return {f"ema{k}": average for k, average in enumerate(self.averages)}
