"""How much of a step the ranks spend on what they send each other: some steps run under torch's profiler, on rank 0."""

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd.profiler import profile

from videodit.parallel.mesh import World

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler prints a line each time it starts and ends


class Communication:
    """Measures one step in so many.

    ```
    communication.begin(step)      # before the first forward pass
    ...
    metrics |= communication.end() # when the step's kernels have ended
    ```

    Collectives are gloo's operations that this thread has begun, and NCCL's kernels. They count from their beginning to
    their end, the wait for the slowest rank included, whether or not something is computed at the same time; several at
    once count once.

    Args:
        every: steps from one that is measured to the next; 0 for none.
        world: only rank 0 measures, and only where there are others.
    """

    def __init__(self, every: int, world: World) -> None:
        self._every = every if world.is_main and world.size > 1 else 0
        self._on_gpu = world.device.type == "cuda"
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Starts if this step is to be measured, and nobody else uses the profiler."""
        if not self._every or step % self._every or torch.autograd._profiler_enabled():
            return
        # On a GPU the kernels alone: every operation of the CPU is left as fast as it is.
        options: dict[str, Any] = {"use_cpu": False, "use_device": "cuda"} if self._on_gpu else {}
        self._profile = profile(use_kineto=True, **options)
        self._profile.__enter__()

    def end(self) -> dict[str, float]:
        """perf/communication_s if the step was measured, and the profiler was let see it."""
        if self._profile is None:
            return {}
        events, self._profile = self._profile, None
        events.__exit__(None, None, None)
        assert events.kineto_results is not None
        kind = "nccl" if self._on_gpu else "gloo:"
        spans = [
            (event.start_ns(), event.start_ns() + event.duration_ns())
            for event in events.kineto_results.events()
            if event.name().startswith(kind)
        ]
        # No collective at all: on a GPU another profiler (nsys, DCGM) keeps ours from seeing kernels.
        return {"perf/communication_s": covered(spans) / 1e9} if spans else {}


def covered(spans: Iterable[tuple[int, int]]) -> int:
    """Length of the union of intervals.

    Args:
        spans: (start, end) of each.
    """
    total, until = 0, -1
    for start, end in sorted(spans):
        total += max(end - max(start, until), 0)
        until = max(until, end)
    return total
