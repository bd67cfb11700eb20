"""AdamW whose moments take 2 bytes a parameter instead of 8."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from videodit.training.blockwise import BLOCK, CHUNK, BlockwiseMoment


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with moments in blocks of 8-bit codes, in groups that have `quantized`; in fp32 in the others.

    The update of a step is computed in fp32, from moments that have taken in its gradient and are not yet rounded.

    Args:
        groups: with params (contiguous, float32), lr, betas, eps, weight_decay and quantized.
    Source: Dettmers et al. (2022), arXiv:2110.02861; biases, norms and embeddings stay in fp32 as there.
    """

    def __init__(self, groups: list[dict[str, Any]]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state |= {"step": torch.zeros(())} | new_moments(p, group["quantized"])
                state["step"] += 1
                _update(p.view(-1), p.grad.view(-1), state, group)


def new_moments(p: Tensor, quantized: bool) -> dict[str, Any]:
    """Both moments of a parameter before its first update."""
    if not quantized:
        return {kind: torch.zeros_like(p, requires_grad=False) for kind in ("exp_avg", "exp_avg_sq")}
    return {
        "exp_avg": BlockwiseMoment(p.numel(), signed=True, device=p.device),
        "exp_avg_sq": BlockwiseMoment(p.numel(), signed=False, device=p.device),
    }


def _update(weight: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
    """AdamW on flat tensors, part by part, so that little of a quantized moment is in fp32 at any time."""
    step, m, v = float(state["step"]), state["exp_avg"], state["exp_avg_sq"]
    if not group["quantized"]:
        _adamw(weight, grad, m.view(-1), v.view(-1), step, group)
        return
    for first in range(0, len(m.codes), CHUNK):
        start = first * BLOCK
        length = min(CHUNK * BLOCK, len(weight) - start)
        part_m, part_v = m.read(start, length), v.read(start, length)
        _adamw(weight[start : start + length], grad[start : start + length], part_m, part_v, step, group)
        m.write(first, part_m)
        v.write(first, part_v)


def _adamw(weight: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: float, group: dict[str, Any]) -> None:
    """Loshchilov & Hutter (2019), arXiv:1711.05101, algorithm 2, in place. All (n,) float32."""
    lr, (beta1, beta2) = group["lr"], group["betas"]
    m.lerp_(grad, 1 - beta1)
    v.lerp_(grad.square(), 1 - beta2)
    denominator = v.sqrt().div_((1 - beta2**step) ** 0.5).add_(group["eps"])
    weight.mul_(1 - lr * group["weight_decay"])
    weight.addcdiv_(m, denominator, value=-lr / (1 - beta1**step))
