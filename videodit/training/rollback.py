"""What a run does when its guard has skipped too many steps in a row: back to a checkpoint, and past their data."""

import warnings
from pathlib import Path
from typing import Any

from videodit.errors import UserError
from videodit.training.checkpoint import Checkpoint, load_latest
from videodit.training.checkpoint_writer import CheckpointWriter
from videodit.training.ema import PowerEMA
from videodit.training.engine import Engine
from videodit.training.guard import Guard
from videodit.training.run_folder import SKIPPED, RunFolder


def guard_of(state: dict[str, Any]) -> dict[str, Any]:
    """The guard's part of a checkpoint's state.json; empty in one from before there was a guard."""
    kept: dict[str, Any] = state["extra"].get("guard", {})
    return kept


def go_back(
    folder: RunFolder, engine: Engine, ema: PowerEMA, writer: CheckpointWriter, guard: Guard, step: int, reason: str
) -> int:
    """Puts weights, moments, averages and guard of an earlier checkpoint back, and cuts the run folder to its step.

    Call on every rank.

    Args:
        folder: of the run.
        engine: to be put back.
        ema: likewise.
        writer: of the run's checkpoints, at rest.
        guard: likewise; it then leads past the data up to the current step.
        step: the current one, the last of the skipped ones.
        reason: why it was skipped.
    Returns:
        The checkpoint's step, from which the run goes on.
    Raises:
        UserError: on every rank, if there is no checkpoint, or the run has not come as far again as when it went back.
    """
    what = f"{guard.state.in_row} steps in a row were skipped up to step {step}, the last one because {reason}"
    where = f"samples are in {folder.path / SKIPPED}"
    fix = "lower optim.lr, look at the samples, or set guard.spike_factor or guard.max_skipped_in_row higher"
    if guard.stuck(step):
        raise UserError(f"{what}; going back from step {guard.state.failed_at} has led no further ({where}): {fix}")
    found = find_target(folder.path)
    if found is None:
        raise UserError(f"{what}; there is no checkpoint to go back to ({where}): {fix}")
    found.restore(engine, ema)
    guard.go_back(step, found.step, guard_of(found.state))
    writer.drop_after(found.step)
    if engine.rank == 0:
        warnings.warn(f"{what}; going back to step {found.step}, on with the data after it ({where})", stacklevel=2)
    folder.cut_metrics(found.step)
    return found.step


def find_target(run_dir: Path) -> Checkpoint | None:
    """The checkpoint to go back to, None if the run has none. Call on every rank.

    The newest one of the schedule from before the skipped steps: whether the run was stopped since or not, it is the
    same. If stops have pushed that out, the newest from before; else the newest, whose weights are those from before.

    Raises:
        UserError: if there are checkpoints and none is good.
    """

    def before_row(state: dict[str, Any]) -> bool:
        return not guard_of(state).get("in_row")

    return (
        load_latest(run_dir, wanted=lambda state: before_row(state) and bool(state["extra"].get("scheduled")))
        or load_latest(run_dir, wanted=before_row)
        or load_latest(run_dir)
    )
