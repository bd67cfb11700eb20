"""DeepSpeed's bf16 optimizer on a rank that is alone: whole flat buffers instead of one parameter after the other.

At ZeRO-1 in bf16 DeepSpeed (0.19.8) adds each parameter's gradient to its part of a flat fp32 buffer and takes each
part's norm: some 20 µs of Python and dispatch for each of a hundred small parameters, which on a CPU is time in which
nothing is computed (docs/decisions.md). Sums are the same to the bit; the norm is, up to rounding.
"""

from typing import Any

import torch
from torch import Tensor


class FlatGradients:
    """Replaces two loops of DeepSpeed's BF16_Optimizer.

    Args:
        optimizer: DeepSpeed's, of a rank without others: then its flat buffers hold all of each parameter.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._add_each, self._each = optimizer.update_hp_grads, optimizer.get_grads_for_norm
        optimizer.update_hp_grads = self._add
        optimizer.get_grads_for_norm = self._whole

    @torch.no_grad()
    def _add(self, clear_lp_grads: bool = False) -> None:
        """Adds the bf16 gradients of a backward pass to the fp32 ones."""
        zero = self._optimizer
        if clear_lp_grads or any(p.grad is None for group in zero.bf16_groups for p in group):
            self._add_each(clear_lp_grads)
            return
        for index, group in enumerate(zero.bf16_groups):
            gradients = torch.cat([p.grad.reshape(-1) for p in group])
            zero.fp32_groups_actual_gradients_flat[index].add_(gradients)
            zero.fp32_groups_has_gradients[index] = [True] * len(group)

    def _whole(self, for_clipping: bool = False) -> Any:
        """What the norm is taken of, and what is clipped by it."""
        zero = self._optimizer
        if not all(map(all, zero.fp32_groups_has_gradients)):
            return self._each(for_clipping)
        flat: list[Tensor] = zero.fp32_groups_actual_gradients_flat
        return flat if for_clipping else (flat, {})
