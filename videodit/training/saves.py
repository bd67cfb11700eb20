"""The checkpoints of a run while it trains: when one is begun, what became of it, what it cost."""

import time
import warnings
from typing import Any

from videodit.errors import UserError
from videodit.parallel.watch import phase
from videodit.training.checkpoint import steps_in
from videodit.training.checkpoint_writer import CheckpointWriter, Written
from videodit.training.run_folder import RunFolder
from videodit.training.run_log import RunLog


class Saves:
    """Begins checkpoints, waits for them, and tells how they ended. Call on every rank.

    Args:
        writer: of the checkpoints.
        folder: of the run.
        log: of the run.
        max_steps: of the run; the checkpoint of the last one must not fail.

    Attributes:
        step: of the newest checkpoint that was begun or loaded.
    """

    def __init__(self, writer: CheckpointWriter, folder: RunFolder, log: RunLog, max_steps: int) -> None:
        self.writer, self._folder, self._log, self._max_steps = writer, folder, log, max_steps
        self.step = 0
        self._metrics: dict[str, float] = {}

    def take_metrics(self) -> dict[str, float]:
        """What saves have cost, for the next line of metrics.jsonl; once."""
        metrics, self._metrics = self._metrics, {}
        return metrics

    def begin(self, step: int, extra: dict[str, Any]) -> None:
        """Begins to write a checkpoint of the current step; waits for the one before.

        Args:
            step: the current one.
            extra: what the run keeps in it beside weights and moments.
        """
        start = time.perf_counter()
        with phase("checkpoint"):
            self._report(self.writer.wait())
            waited = time.perf_counter()
            self.writer.save(step, extra)
        self.step = step
        self._metrics["perf/save_s"] = time.perf_counter() - start
        self._metrics["perf/save_wait_s"] = waited - start

    def poll(self) -> None:
        """Tells how the save under way ended, if it has."""
        self._report(self.writer.poll())

    def wait(self, *, leaving: bool = False) -> None:
        """Waits for the save under way, and tells how it ended.

        Args:
            leaving: whether it is the last thing that this process does.
        Raises:
            UserError: if the checkpoint of the run's last step could not be written; before, training goes on without.
        """
        with phase("checkpoint"):
            self._report(self.writer.wait(), leaving)

    def end(self, at_once: bool) -> None:
        """After an error: a checkpoint that is being written is finished, unless the run is to end at once."""
        if at_once:
            self.writer.abandon()
            return
        try:
            self._report(self.writer.wait(), leaving=True)
        except Exception as error:  # what ended the run is to be told, not this
            warnings.warn(f"the last checkpoint was not written: {error}", stacklevel=2)

    def _report(self, written: Written | None, leaving: bool = False) -> None:
        if written is None:
            return
        self._metrics["perf/write_s"] = written.seconds
        if not written.problem:
            self._log.info(f"checkpoint of step {written.step}")
            return
        if self._log.rank == 0:
            newest = max(steps_in(self._folder.path), default=0)
            then = f"the same command goes on from step {newest}" if leaving else "training goes on"
            warnings.warn(f"no checkpoint at step {written.step}: {written.problem}; {then}", stacklevel=3)
        if written.step >= self._max_steps:
            raise UserError(
                f"run_dir {self._folder.path} has no room for the checkpoint of the last step: "
                "free some space, then run the same command again"
            )
