"""Which checkpoint a run goes back to when its guard has skipped too many steps in a row."""

from pathlib import Path
from typing import Any

from videodit.training.checkpoint import Checkpoint, load_latest


def guard_of(state: dict[str, Any]) -> dict[str, Any]:
    """The guard's part of a checkpoint's state.json; empty in one from before there was a guard."""
    kept: dict[str, Any] = state["extra"].get("guard", {})
    return kept


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
        load_latest(run_dir, lambda state: before_row(state) and bool(state["extra"].get("scheduled")))
        or load_latest(run_dir, before_row)
        or load_latest(run_dir)
    )
