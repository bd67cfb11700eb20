"""Where a step's gradient is let through or dropped: after the reduction, before weights and moments have changed.

DeepSpeed 0.19's ZeRO optimizers drop a step whose global norm is not finite. Each asks `is_invalid_grad_norm` about the
norm that it clips by, and drops the step by itself. Answering in that function's place needs no second norm and no
second collective, and a step that is dropped for another reason goes the same way. Imports no deepspeed.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

Keep = Callable[[float], bool]
"""Whether a step with this (finite) norm is applied; must say the same on every rank."""

QUESTION = "is_invalid_grad_norm"


def keep_any(_: float) -> bool:
    """Applies every step whose gradient is finite."""
    return True


class GradientGate:
    """Judges one step at a time.

    Args:
        optimizer: the one that DeepSpeed steps; at stage 0 torch's own, whose step hook has to call `judge`.
        before_muon: at ZeRO-3 Muon's momentum takes in the gradient before the norm is asked about; then the raw
            gradient is judged too, at the cost of its norm. (DeepSpeed keeps a matrix that is not finite out of its
            momentum, but not the other matrices of that step.)

    Attributes:
        norm: what was judged in the last step, inf if it was not finite.
        applied: whether the last step changed the weights.
    """

    def __init__(self, optimizer: Any, *, before_muon: bool) -> None:
        self._asking = vars(sys.modules[type(optimizer).__module__])
        self._optimizer = optimizer
        self._keep: Keep = keep_any
        self.norm, self.applied = float("inf"), False
        if before_muon:
            self._judge_raw_gradient(optimizer)

    @contextmanager
    def judging(self, keep: Keep) -> Iterator[None]:
        """While inside, the optimizer's step is applied only if `keep` says so."""
        self._keep = keep
        self.norm, self.applied = float("inf"), False  # DeepSpeed may drop it without asking
        own = self._asking.get(QUESTION)

        def judge_first(norm: Any) -> bool:
            self._asking[QUESTION] = own  # what is asked later is not about the step
            return not self.judge(norm)

        if own is not None:
            self._asking[QUESTION] = judge_first
        try:
            yield
        finally:
            if own is not None:
                self._asking[QUESTION] = own
        if not self.applied and getattr(self._optimizer, "cpu_offload", False):
            # DeepSpeed 0.19.8 adds the next step's gradient to the one that was dropped (bf16 at stages 1 and 2).
            for group in self._optimizer.averaged_gradients:
                self._optimizer.averaged_gradients[group] = None

    def judge(self, norm: Any) -> bool:
        """Whether a step with this global norm (DeepSpeed's -1 means not finite) is applied."""
        value = float(norm)
        finite = 0 <= value < float("inf")
        self.norm = value if finite else float("inf")
        self.applied = finite and self._keep(value)
        return self.applied

    def _judge_raw_gradient(self, optimizer: Any) -> None:
        check = optimizer._overflow_check_and_loss_scale_update

        def check_and_judge(update_scale: bool = True) -> Any:
            result = check(update_scale)
            if not update_scale and not optimizer.overflow:  # the call before Muon
                optimizer.overflow = not self.judge(
                    self._asking["combine_grad_norm_groups"](optimizer._get_norm_groups())
                )
            return result

        optimizer._overflow_check_and_loss_scale_update = check_and_judge
