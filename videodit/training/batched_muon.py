"""Muon's orthogonalisation of all matrices of one shape at once, in place of DeepSpeed's, one after the other.

A small model has many small matrices, and then most of the time goes into starting operations: 26 matrices of 128x128
or so take DeepSpeed 21 ms on 2 AVX512-bf16 cores, batched and in bf16 5 ms (docs/decisions.md). DeepSpeed keeps what it
is for: who owns which part of which matrix, the exchange of split ones, the momentum's place in the optimizer's state.

Source: Jordan et al. (2024), Muon, https://kellerjordan.github.io/posts/muon/ (iteration and coefficients); Bernstein
(2024), https://jeremybernste.in/writing/deriving-muon (the scale).
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
STEPS = 5


def orthogonalize(matrices: Tensor, dtype: torch.dtype) -> Tensor:
    """Newton-Schulz iteration towards the nearest semi-orthogonal matrix; singular values end between 0.7 and 1.2.

    Args:
        matrices: (n, rows, columns) with rows <= columns.
        dtype: to iterate in; bfloat16 is precise enough.
    Returns:
        The shape and dtype of matrices; zeros stay zeros.
    """
    a, b, c = COEFFICIENTS
    x = (matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.to(matrices.dtype)


class BatchedMuon:
    """Replaces the Muon part of DeepSpeed's BF16_Optimizer (bf16 at ZeRO-1).

    DeepSpeed's own pass over its matrices runs twice: the first collects what is to be orthogonalised, the second gets
    the results, in the same order. A rank that is alone has all of each matrix, in flat buffers that need no pass.

    Args:
        optimizer: DeepSpeed's; others than BF16_Optimizer stay as they are.
        dtype: of the iteration.
        module: where DeepSpeed takes its `muon_update` from at each step (deepspeed.runtime.zero.muon.original_muon).
        alone: whether there is no other rank.
    """

    def __init__(self, optimizer: Any, dtype: torch.dtype, module: Any, *, alone: bool = False) -> None:
        self._optimizer, self._dtype, self._module = optimizer, dtype, module
        self._prepare: Callable[[], None] | None = getattr(optimizer, "_prepare_muon_updates", None)
        if self._prepare is not None:
            optimizer._prepare_muon_updates = self._run_alone if alone else self._run

    @torch.no_grad()
    def _run_alone(self) -> None:
        """Gradients, which DeepSpeed has found finite, become updates in their place."""
        zero = self._optimizer
        for index, group in enumerate(zero.param_groups):
            if not group["use_muon"]:
                continue
            partition, shapes = zero.fp32_groups_flat_partition[index], [p.shape for p in zero.bf16_groups[index]]
            state, gradient = zero.state[partition], partition.grad
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(partition)
            momentum = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            gradient.lerp_(momentum, group["momentum"])
            parts = gradient[: sum(shape.numel() for shape in shapes)].split([shape.numel() for shape in shapes])
            matrices = [part.view(shape) for part, shape in zip(parts, shapes)]
            torch._foreach_copy_(matrices, self._orthogonalize(matrices))

    @torch.no_grad()
    def _run(self) -> None:
        assert self._prepare is not None
        gradients: list[Tensor] = []
        momenta: list[Tensor] = []
        updates: list[Tensor] = []

        def collect(grad: Tensor, momentum: Tensor, beta: float, ns_method: str) -> Tensor:
            gradients.append(grad)
            momenta.append(momentum.lerp(grad, 1 - beta))
            updates.append(grad.lerp(momenta[-1], beta))
            return grad

        with self._muon_update(collect):
            self._prepare()
        if not gradients:
            return
        finite = torch.stack([grad.sum() for grad in gradients]).isfinite().tolist()
        results = iter(zip(finite, gradients, momenta, self._orthogonalize(updates)))

        def give(grad: Tensor, momentum: Tensor, beta: float, ns_method: str) -> Tensor:
            is_finite, gradient, new_momentum, update = next(results)
            if not is_finite:  # the step will be skipped: the momentum stays, and the gradient shows why
                return gradient
            momentum.copy_(new_momentum)
            return update

        with self._muon_update(give):
            self._prepare()

    def _orthogonalize(self, updates: list[Tensor]) -> list[Tensor]:
        """Each (rows, columns), scaled by sqrt(rows / columns) where that is above one; same shapes and order."""
        wide = [update if update.shape[0] <= update.shape[1] else update.mT for update in updates]
        by_shape: dict[torch.Size, list[int]] = {}
        for index, matrix in enumerate(wide):
            by_shape.setdefault(matrix.shape, []).append(index)
        out = list(updates)
        for indices in by_shape.values():
            batch = orthogonalize(torch.stack([wide[index] for index in indices]), self._dtype)
            for index, matrix in zip(indices, batch):
                rows, columns = updates[index].shape
                out[index] = matrix if rows <= columns else matrix.mT * (rows / columns) ** 0.5
        return out

    @contextlib.contextmanager
    def _muon_update(self, function: Callable[..., Tensor]) -> Iterator[None]:
        own = self._module.muon_update
        self._module.muon_update = function
        try:
            yield
        finally:
            self._module.muon_update = own
