"""Progressive training: one run in stages, each with its own clips or latents, batches and, of a DiT, noise levels."""

import dataclasses
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from videodit.config import from_dict, to_dict
from videodit.data.batch_sizes import BatchSize
from videodit.data.order import StepPlan
from videodit.data.step_loader import BatchT, StepLoader
from videodit.errors import UserError
from videodit.settings import flatten

if TYPE_CHECKING:
    from videodit.training.run_config import RunConfig

ConfigT = TypeVar("ConfigT", bound="RunConfig")


@dataclass(frozen=True)
class Stage(Generic[ConfigT]):
    """A part of a run.

    Attributes:
        number: from 1.
        steps_before: optimizer steps of the stages before it.
        config: the run's with what the stage sets; its max_steps are the stage's, and so shares of them are too.
    """

    number: int
    steps_before: int
    config: ConfigT

    @property
    def ending(self) -> str:
        """Of the names of what a run keeps of the stage; the first one's are those of a run without stages."""
        return "" if self.number == 1 else f" (stage {self.number})"


def stages_of(config: ConfigT) -> list[Stage[ConfigT]]:
    """The stages of a run; one that is the run itself if it names none.

    Each has a seed of its own, so that noise and order of clips that several of them read do not come again.

    Raises:
        ValueError: names the stage, what it sets and the fix.
    """
    if not config.stages:
        return [Stage(1, 0, config)]
    stages: list[Stage[ConfigT]] = []
    before = 0
    for number, values in enumerate(config.stages, 1):
        steps = stage_steps(values, number)
        stages.append(Stage(number, before, _with_settings(config, values, number, steps)))
        before += steps
    return stages


def _check_names(config: "RunConfig", values: Mapping[str, Any], number: int) -> None:
    known = ("steps", *config.stage_settings)
    other = next((key for key in values if str(key).split(".")[0] not in known), None)
    if other is not None:
        raise ValueError(f"stage {number}: {other} is not a setting of stages: these are {', '.join(known)}")


def stage_steps(values: Mapping[str, Any], number: int) -> int:
    """The steps of a stage.

    Raises:
        ValueError: if there are none.
    """
    steps = values.get("steps")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise ValueError(f"stage {number}: steps {steps} is not a number of steps: give for example steps: 1000")
    return steps


def _with_settings(config: ConfigT, values: Mapping[str, Any], number: int, steps: int) -> ConfigT:
    name = f"stage {number}"
    values = {key: value for key, value in values.items() if key != "steps"}
    base = to_dict(config) | {"stages": [], "max_steps": steps, "seed": config.seed + number - 1}
    try:
        if "data.shards" in dict(flatten(type(config), values, name)):
            base["data"]["weights"] = []  # those of the run are for its own list
        return from_dict(type(config), values, name, base=base)
    except UserError as error:
        text = str(error)
        raise ValueError(text if text.startswith(name) else f"{name}: {text}") from None


@dataclass(frozen=True)
class StageStep(Generic[ConfigT, BatchT]):
    """One optimizer step's data: of what stage, its plan, this rank's micro batches, the global batch's keys."""

    stage: Stage[ConfigT]
    plan: StepPlan
    batches: list[BatchT]
    keys: list[str]


class StagedLoader(Generic[ConfigT, BatchT]):
    """The data of a run's steps, each from the loader of its stage.

    An optimizer step decides on the stage. What rollbacks left out is left out in every stage: a stage begins its order
    that much later.

    Attributes:
        sizes: of batches, by bucket and stage.
        settings: what a run must keep for its order to go on, likewise.
        clips: how many there are, by bucket and stage.

    Args:
        stages: of the run.
        open_loader: opens that of a stage.
        seen: called with each stage and its loader, which all are opened once to be checked.
    Raises:
        UserError: as StepLoader.
    """

    def __init__(
        self,
        stages: Sequence[Stage[ConfigT]],
        open_loader: Callable[[ConfigT], StepLoader[BatchT]],
        seen: Callable[[Stage[ConfigT], Any], None] = lambda stage, loader: None,
    ) -> None:
        self.stages, self._open = list(stages), open_loader
        self.sizes: dict[str, BatchSize] = {}
        self.settings: dict[str, Any] = {}
        self.clips: dict[str, int] = {}
        self._seconds: dict[int, Mapping[str, float]] = {}  # by stage
        self._current: Stage[ConfigT] | None = None
        self._loader: StepLoader[BatchT]
        self._steps: Generator[tuple[StepPlan, list[BatchT]], None, None]
        self._position = 0  # data step of the stage that the iterator gives next
        for stage in self.stages:
            loader = open_loader(stage.config)
            self.sizes |= {f"{name}{stage.ending}": size for name, size in loader.batch_sizes.items()}
            self.settings |= {f"{name}{stage.ending}": value for name, value in loader.order_settings.items()}
            self.clips |= {f"{name}{stage.ending}": count for name, count in loader.clip_counts.items()}
            if stage.number > 1:
                self.settings[f"steps before{stage.ending}"] = stage.steps_before
            seen(stage, loader)

    def use_seconds(self, measure: Callable[[Stage[ConfigT], Any], Mapping[str, float]]) -> None:
        """Makes the batches of stages with `batch_by: time`; before the first step.

        Args:
            measure: gives the seconds of one clip of each bucket, the same on every rank, for such a stage.
        Raises:
            UserError: if there are fewer clips than one global batch takes.
        """
        for stage in self.stages:
            if stage.config.batch_by != "time":
                continue
            loader = self._open(stage.config)
            if loader.needs_seconds:
                seconds = self._seconds[stage.number] = measure(stage, loader)
                loader.use_seconds(seconds)
                self.sizes |= {f"{name}{stage.ending}": size for name, size in loader.batch_sizes.items()}

    def endings_after(self, step: int) -> tuple[str, ...]:
        """Endings of the names of stages that have not begun when a run has made so many steps: they may change."""
        return tuple(stage.ending for stage in self.stages if stage.number > 1 and stage.steps_before >= step)

    def stage_at(self, step: int) -> Stage[ConfigT]:
        """Which one an optimizer step, from 1, belongs to."""
        return next(stage for stage in reversed(self.stages) if stage.steps_before < step)

    def read(self, step: int, data_step: int) -> StageStep[ConfigT, BatchT]:
        """The data of a step.

        Args:
            step: the optimizer step, from 1.
            data_step: the same and the steps that rollbacks left out.
        Raises:
            UserError: as StepLoader.iterate.
        """
        stage = self.stage_at(step)
        wanted = data_step - stage.steps_before
        if stage is not self._current or wanted != self._position:
            self._begin(stage, wanted)
        plan, batches = next(self._steps)
        self._position += 1
        return StageStep(stage, plan, batches, self._loader.keys(plan))

    def _begin(self, stage: Stage[ConfigT], data_step: int) -> None:
        if self._current is not None:
            self._steps.close()  # ends its workers
        if stage is not self._current:
            self._current = None
            self._loader = self._open(stage.config)  # the last one's goes, with what it keeps in memory
            if stage.number in self._seconds:
                self._loader.use_seconds(self._seconds[stage.number])
        self._steps = self._loader.iterate(data_step)
        self._current, self._position = stage, data_step


def settled(config: "RunConfig") -> int:
    """The steps of the whole run: the sum of its stages'.

    Raises:
        ValueError: if a stage has none, or what no stage has, or max_steps is given and another number.
    """
    for number, values in enumerate(config.stages, 1):
        _check_names(config, values, number)
    total = sum(stage_steps(values, number) for number, values in enumerate(config.stages, 1))
    default = next(field.default for field in dataclasses.fields(config) if field.name == "max_steps")
    if config.max_steps not in (total, default):
        raise ValueError(f"max_steps {config.max_steps} is not the {total} of all stages: leave it out")
    return total
