"""Steps that must not reach the weights: what is not finite, and spikes.

A pure state machine: the same figures give the same decisions, on every rank and after a resume. The run does what it
says, see `TrainingRun.finish_step`.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class GuardConfig:
    """Which steps are skipped, and when the run goes back to a checkpoint."""

    spike_factor: float = 20.0
    """A step is skipped if its gradient norm (with Muon: train/mse) is over so many times its average, which steps of
    images and of videos have each; 0 for never."""
    spike_length: int = 100
    """Steps that the average looks back, exponentially."""
    spike_warmup_steps: int = 100
    """Applied steps, of images or of videos, before the first spike among them can be seen."""
    max_skipped_in_row: int = 10
    """So many skipped steps in a row, and the run goes back to the last checkpoint before them, and past their data."""

    def __post_init__(self) -> None:
        if self.spike_factor != 0 and not self.spike_factor > 1:
            raise ValueError(f"guard.spike_factor is {self.spike_factor}; use a value above 1, or 0 for no spike guard")
        if self.spike_length < 1 or self.max_skipped_in_row < 1:
            raise ValueError(
                f"guard.spike_length {self.spike_length} and guard.max_skipped_in_row {self.max_skipped_in_row} "
                "must be 1 or more"
            )
        if self.spike_warmup_steps < 1:
            raise ValueError(f"guard.spike_warmup_steps is {self.spike_warmup_steps}; use 1 or more")


@dataclass
class GuardState:
    """What a resumed run needs to decide as it would have decided.

    Attributes:
        average: of the watched figure over the applied steps of videos; in a checkpoint from before images had their
            own, of all.
        applied: steps that the average has seen.
        image_average, image_applied: the same of steps of images.
        skipped: steps skipped so far; those that a rollback undid count too.
        in_row: of them, up to the current step without one that was applied.
        data_offset: steps' worth of data that rollbacks left out: step s reads the data of step s + data_offset.
        failed_at: the step at which the run went back last; 0 if it never did.
    """

    average: float = 0.0
    applied: int = 0
    image_average: float = 0.0
    image_applied: int = 0
    skipped: int = 0
    in_row: int = 0
    data_offset: int = 0
    failed_at: int = 0


class Guard:
    """Decides about each step, and counts.

    Methods that take `images` (whether the step was of images) keep to what such steps were like: a video's gradient
    is no measure of an image's.

    Args:
        config: when to skip.
        watch_norm: watch the gradient norm; otherwise (Muon, whose norm before the update may be the orthogonalised
            update's) the mean squared error, which unlike a weighted loss is never negative.
    """

    def __init__(self, config: GuardConfig, *, watch_norm: bool) -> None:
        self.config, self.watch_norm = config, watch_norm
        self.state = GuardState()

    def check_losses(self, losses: Mapping[str, float], *, images: bool = False) -> str:
        """Why a step with these losses (`mse` among them), the same on all ranks, must be skipped; "" if not."""
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if bad:
            return f"train/{bad[0]} is not finite"
        return "" if self.watch_norm else self._check_spike("train/mse", losses["mse"], images)

    def check_norm(self, norm: float, *, images: bool = False) -> str:
        """Why a step whose gradient has this global norm (inf if it is not finite) must be skipped; "" if not."""
        if not math.isfinite(norm):
            return "the gradient is not finite"
        return self._check_spike("train/grad_norm", norm, images) if self.watch_norm else ""

    def _check_spike(self, name: str, value: float, images: bool) -> str:
        state, factor = self.state, self.config.spike_factor
        average, applied = (state.image_average, state.image_applied) if images else (state.average, state.applied)
        if not factor or applied < self.config.spike_warmup_steps or value <= factor * average:
            return ""
        return f"{name} {value:.4g} is over guard.spike_factor {factor:g} times its average {average:.4g}"

    def applied(self, losses: Mapping[str, float], norm: float, *, images: bool = False) -> None:
        """Takes in an applied step: the mean of the first spike_length steps, then an exponential average."""
        state = self.state
        state.in_row = 0
        value = norm if self.watch_norm else losses["mse"]
        if images:
            state.image_applied += 1
            seen = min(state.image_applied, self.config.spike_length)
            state.image_average += (value - state.image_average) / seen
        else:
            state.applied += 1
            state.average += (value - state.average) / min(state.applied, self.config.spike_length)

    def skipped(self) -> None:
        """Counts a skipped step."""
        self.state.skipped += 1
        self.state.in_row += 1

    @property
    def must_go_back(self) -> bool:
        """Whether too many steps in a row were skipped."""
        return self.state.in_row >= self.config.max_skipped_in_row

    def stuck(self, step: int) -> bool:
        """Whether the run has not come as far again as the step at which it went back last."""
        return step - self.state.in_row < self.state.failed_at

    def go_back(self, step: int, saved_step: int, saved: Mapping[str, Any]) -> None:
        """Takes the state of a checkpoint, but goes on with the data after those of the current step.

        Args:
            step: the current one.
            saved_step: the checkpoint's.
            saved: the checkpoint's guard, as `to_dict` gave it.
        """
        skipped, offset = self.state.skipped, self.state.data_offset + step - saved_step
        self.load({**saved, "in_row": 0})
        self.state.skipped, self.state.data_offset, self.state.failed_at = skipped, offset, step

    def to_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint."""
        return asdict(self.state)

    def load(self, saved: Mapping[str, Any]) -> None:
        """Puts a state back; an empty one (of a checkpoint from before there was a guard) starts anew."""
        self.state = GuardState(**saved)
