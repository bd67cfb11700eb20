"""`batch_by: time`: how long a clip of each bucket takes, measured when a run begins and kept in its folder.

A run that goes on reads what its first start measured: its batches are the same ones on any other machine.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from videodit.data.batches import Batch
from videodit.data.step_loader import StepLoader
from videodit.parallel.mesh import barrier, broadcast_object
from videodit.parallel.watch import phase
from videodit.training.run import TrainingRun

FILE = "clip_seconds.json"
WARM_UP, ROUNDS = 2, 5
"""Passes of each bucket that do not count (kernels are chosen, memory is taken), and that do."""

BatchT = TypeVar("BatchT", bound=Batch)


class ClipSeconds:
    """Seconds of a clip's forward and backward pass, by bucket and stage.

    Args:
        run: that has started; its weights, moments and gradients stay what they are.
    """

    def __init__(self, run: TrainingRun) -> None:
        self._run = run
        self._kept: dict[str, float] = run.folder.frozen(FILE)
        self._used: dict[str, float] = {}

    def of(self, loader: StepLoader[BatchT], one_pass: Callable[[BatchT], Any], ending: str = "") -> dict[str, float]:
        """Those of a loader's buckets, as they were kept, or measured. Call on every rank.

        All ranks run the same passes of the same clips, as weights or tokens that are spread over them need; rank 0's
        clock counts.

        Args:
            loader: gives micro batches to measure, of the size that a batch of as many tokens has.
            one_pass: forward and backward pass of one.
            ending: of the buckets' names in the run folder.
        """
        names = list(loader.batch_sizes)
        if not all(f"{name}{ending}" in self._kept for name in names):
            seconds = self._measure({name: loader.first_clips(name) for name in names}, one_pass)
            self._kept |= {f"{name}{ending}": value for name, value in seconds.items()}
        found = {name: self._kept[f"{name}{ending}"] for name in names}
        self._used |= {f"{name}{ending}": value for name, value in found.items()}
        return found

    def freeze(self, free: tuple[str, ...] = ()) -> None:
        """Writes them into the run folder. Call on every rank, once their batches were accepted.

        Args:
            free: endings of the names of those that may still change.
        """
        if self._used:
            self._run.folder.freeze(FILE, self._used, "seconds a clip", "set batch_by and data back", free=free)

    def _measure(self, batches: dict[str, BatchT], one_pass: Callable[[BatchT], Any]) -> dict[str, float]:
        run = self._run
        taken: dict[str, list[float]] = {name: [] for name in batches}
        with phase("measuring batches"):
            for number in range(WARM_UP + ROUNDS):
                for name, batch in batches.items():  # in turn: a slow moment is not one bucket's
                    start = self._now()
                    one_pass(batch)
                    if number >= WARM_UP:
                        taken[name].append((self._now() - start) / len(batch.ids))
            run.engine.step(1, lambda norm: False)  # drops the gradients
        run.meter.restart()
        return broadcast_object({name: statistics.median(seconds) for name, seconds in taken.items()})

    def _now(self) -> float:
        """Once all that was asked for is done, here and on the other ranks."""
        if self._run.world.device.type == "cuda":
            torch.cuda.synchronize(self._run.world.device)
        barrier()
        return time.perf_counter()
