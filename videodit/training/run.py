"""A training run without its model: processes, run folder, engine, averages, checkpoints, tracker, console."""

import logging
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import nn

from videodit.config import to_dict
from videodit.data.batches import Batch
from videodit.data.buckets import is_image
from videodit.data.randomness import batch_digest
from videodit.evaluation.machine import code_version
from videodit.parallel.mesh import World, all_reduce_sum
from videodit.parallel.watch import enter, phase, tick, watching
from videodit.progress import Progress
from videodit.training.checkpoint import load_latest, steps_in
from videodit.training.checkpoint_writer import CheckpointWriter
from videodit.training.communication import Communication
from videodit.training.ema import PowerEMA
from videodit.training.engine import Engine, StepResult
from videodit.training.guard import Guard
from videodit.training.meters import StepMeter
from videodit.training.rollback import go_back, guard_of
from videodit.training.run_config import RunConfig, run_dtype
from videodit.training.run_folder import RunFolder
from videodit.training.run_log import RunLog
from videodit.training.saves import Saves
from videodit.training.stages import StagedLoader
from videodit.training.stop import StopRequest
from videodit.training.tracker import Tracker

log = logging.getLogger(__name__)


class TrainingRun:
    """One open run: `with TrainingRun.open(config, text, world) as run: run.start(module); while run.running: ...`."""

    engine: Engine
    ema: PowerEMA
    _saves: Saves

    def __init__(
        self, config: RunConfig, world: World, folder: RunFolder, tracker: Tracker, log: RunLog, stop: StopRequest
    ) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.step = 0
        self.failed = 0  # samples that could not be read, over all ranks
        self.guard = Guard(config.guard, watch_norm=config.optim.name != "muon")
        self._went_back = False  # in the last step
        self._wall_start = time.monotonic()  # earlier by what the starts before took
        self._several = self._mixed = False  # whether there are several buckets, and images as well as videos
        self._tracker = tracker
        self._stop = stop
        self._communication = Communication(config.communication_every, world)
        self._progress = Progress(f"train {folder.path.name}", config.max_steps, world.is_main, note=log.info)
        self._log = log

    @classmethod
    @contextmanager
    def open(cls, config: RunConfig, config_text: str, world: World) -> Iterator["TrainingRun"]:
        """Holds the run folder while inside. Call on every rank.

        Args:
            config: of the run.
            config_text: the same as YAML, for the run folder.
            world: this process' place.
        Raises:
            UserError: if the folder is in use, cannot be written, or holds a run of another model.
        """
        stop = StopRequest(world)
        # First of all: what follows waits for the other ranks.
        with stop.listening(), ExitStack() as watched:
            watched.enter_context(watching(world, config.hang_timeout_s, stop.asked))
            folders = RunFolder.open(config.run_dir, config_text, world)
            with folders as folder, RunLog.open(folder.path / "train.log", world) as log:
                facts = {**to_dict(config), "code": code_version()} if world.is_main else {}
                tracker = Tracker(config.tracker, folder.path, facts, world)
                run = cls(config, world, folder, tracker, log, stop)
                try:
                    with watched.pop_all(), run._progress:
                        yield run
                except BaseException as error:
                    if hasattr(run, "_saves"):
                        run._saves.end(at_once=isinstance(error, KeyboardInterrupt))
                    raise
                finally:
                    run._communication.end()
                    tracker.finish()
            if stop:  # asked for after the last step
                raise SystemExit(stop.exit_code)

    def start(self, module: nn.Module) -> None:
        """Puts the module into the engine, and the newest checkpoint, if there is one, into both."""
        self.engine = Engine(
            module,
            self.config.optim,
            zero_stage=self.config.zero_stage,
            offload=self.config.offload_optimizer,
            dtype=run_dtype(self.config, self.world.device),
            world=self.world,
            max_steps=self.config.max_steps,
        )
        self.ema = PowerEMA(self.engine.slices(), self.config.ema_profiles)
        keep = {"keep_last": self.config.keep_last, "keep_every": self.config.keep_every}
        writer = CheckpointWriter(self.folder.path, self.engine, self.ema, **keep)
        self._saves = Saves(writer, self.folder, self._log, self.config.max_steps)
        found = load_latest(self.folder.path, self.engine.shapes)
        if found is not None:
            found.restore(self.engine, self.ema)
            self.guard.load(guard_of(found.state))
            self.step = self._saves.step = found.step
            self.failed = found.state["extra"].get("failed", 0)
        due = any(map(self.due, self.config.evaluation_intervals))
        self._evaluation_due = due and self.folder.evaluated_step() < self.step
        before = self.folder.last_metric("perf/wall_s"), found.state["extra"].get("wall_s", 0.0) if found else 0.0
        self._wall_start -= max(before)
        self._say_where(self.folder.cut_metrics(self.step, evaluated=not self._evaluation_due))
        self._tracker.start()
        version = ", ".join(f"{name} {value}" for name, value in code_version().items() if value)
        self._log.info(f"from step {self.step} of {self.config.max_steps}: {self.world.size} ranks, {version}")
        module.register_forward_pre_hook(tick)  # samples are many forward passes
        self.meter = StepMeter(self.world.device, self.world.size)

    def _say_where(self, again: int) -> None:
        """Tells the user from where a run goes on that has been started before."""
        repeated = f"; {again} later steps are made again" if again else ""
        if self.step and not self.running:
            most = self.config.max_steps
            more = f", more than max_steps {most}" if self.step > most else ""
            self._progress.say(f"all {self.step} steps were there already{more}: for further ones raise max_steps")
        elif self.step:
            self._progress.say(f"goes on from step {self.step} of {self.config.max_steps}{repeated}")
        elif again:
            self._progress.say(f"no checkpoint was written yet, so it starts from step 0; {again} steps are made again")

    def accept(self, loader: StagedLoader[Any, Any]) -> None:
        """Writes down what the run goes on with, once its checkpoint has taken it: config, clips of a step, order.

        What belongs to stages that have not begun may still change.

        Raises:
            UserError: on every rank, if clips of a step or settings of their order are not those that the run began
                with; other numbers of clips are told.
            SystemExit: if a rank was told to stop.
        """
        sizes, free = loader.sizes, loader.endings_after(self.step)
        totals = {name: size.total for name, size in sizes.items()}
        self._several, self._mixed = len(sizes) > 1, len(set(map(is_image, sizes))) > 1
        self.folder.freeze("batches.json", totals, "clips a step", "set batch sizes and data back", free=free)
        self.folder.freeze("order.json", loader.settings, free=free)
        self.folder.note_clips(loader.clips)
        self.folder.accept_config()
        if self._stop.on_any_rank():  # before the wait for data
            self._leave()
        enter("data", self.step + 1)

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """A batch's tensor on the run's device, in the number format of its weights."""
        return x.to(self.world.device, self.engine.dtype)

    @property
    def running(self) -> bool:
        """Whether there are steps left."""
        return self.step < self.config.max_steps

    @property
    def next_data_step(self) -> int:
        """Which step's data comes next: the next step's, or later if the run has gone back past bad data."""
        return self.step + 1 + self.guard.state.data_offset

    @property
    def wall_s(self) -> float:
        """Seconds that the run has taken, over all its starts; steps that were lost and made again count each time."""
        return time.monotonic() - self._wall_start

    def total_weight(self, batches: Sequence[Batch], copies: int = 1) -> float:
        """Sum of the rows' weights over all ranks and micro batches of the step; also ends the wait for data.

        Args:
            batches: of this rank.
            copies: ranks that have the same clips.
        Raises:
            SystemExit: as `finish_step`, if a rank was told to stop since the last step.
        """
        self.meter.data_ready()
        enter("forward and backward")
        self._note_evaluated()
        weight = sum(float(batch.weight.sum()) for batch in batches)
        failed = sum(batch.num_failed for batch in batches)
        with self.meter.phase("ranks", on_cpu=True):  # until the last of them has its data
            total, failed, stop = all_reduce_sum(torch.tensor([weight, failed, bool(self._stop)])).tolist()
        if stop:
            self._leave()
        self.failed += round(failed / copies)
        self._communication.begin(self.step + 1)
        return max(total, 1.0)

    def finish_step(
        self, losses: dict[str, torch.Tensor], *, bucket: str, keys: Sequence[str], tokens: int = 0, flops: int = 0
    ) -> None:
        """Applies the gradients unless the guard objects, averages, logs, and begins to save when it is time.

        Args:
            losses: this rank's part of each loss (the sum over its micro batches of what `backward` got).
            bucket: name of that which the step was of.
            keys: of the global batch's samples, in global order.
            tokens: tokens of the global batch.
            flops: floating-point operations of the global batch.
        Raises:
            SystemExit: with the code of the signal, after a checkpoint, if a rank was told to stop.
            UserError: if too many steps in a row were skipped, and going back has not helped or cannot.
        """
        self._stop.work_has_begun()
        self._saves.poll()
        self.step += 1
        row = self.guard.state.in_row
        enter("optimizer")
        reduced = all_reduce_sum(torch.stack([loss.detach().float() for loss in losses.values()])).tolist()
        images = is_image(bucket)
        result, reason = self._guarded_step(dict(zip(losses, reduced)), images)
        metrics: dict[str, Any] = {f"train/{name}": value for name, value in zip(losses, reduced)}
        metrics |= result.metrics() | {"train/skipped": self.guard.state.skipped}
        metrics |= self.meter.step(tokens=tokens, flops=flops) | {"perf/wall_s": self.wall_s}
        if measured := self._communication.end():
            metrics |= measured
            self.meter.restart()  # reading what the profiler has seen
        metrics |= self._saves.take_metrics()
        if self._mixed:
            metrics[f"train/grad_norm_{'image' if images else 'video'}"] = metrics["train/grad_norm"]
        if self._several:
            for name in ("perf/step_s", "perf/mfu"):
                if name in metrics:
                    metrics[f"{name}/{bucket}"] = metrics[name]
        metrics |= {"data/bucket": bucket, "data/digest": batch_digest(keys), "data/failed": self.failed}
        self.log(metrics)
        if reason:
            record = {"data_step": self.step + self.guard.state.data_offset, "reason": reason, "keys": list(keys)}
            self.folder.log_skipped(self.step, record | {k: metrics[k] for k in ("train/loss", "train/grad_norm")})
        self._went_back = self.guard.must_go_back
        if self._went_back:
            self._go_back(reason)
        stop = self._stop.on_any_rank()
        # Not after a skipped step, which has changed nothing: that would push out the one to go back to.
        last_applied, every = self.step - 1 - row, self.config.save_every
        due = self.step // every > last_applied // every and not self.guard.state.in_row and not self._went_back
        if due or not self.running or stop:
            self.save(scheduled=due)
        if self.world.is_main:
            waiting = metrics["data/wait_s"] / metrics["perf/step_s"]
            speed = f"{metrics['perf/step_s']:.3f} s/step  data wait {waiting:.0%}"
            self._progress.update(self.step, f"loss {metrics['train/loss']:.4f}  {speed}")
        enter("data", self.step + 1)
        if stop:
            self._leave()

    def _guarded_step(self, losses: dict[str, float], images: bool) -> tuple[StepResult, str]:
        """One optimizer step, or none and the reason; decided from figures that are the same on all ranks."""
        reason = self.guard.check_losses(losses, images=images)
        with self.meter.phase("optimizer"):
            result = self.engine.step(
                self.step, lambda norm: not (reason or self.guard.check_norm(norm, images=images))
            )
            if result.applied:
                self.ema.update(self.step)
        if result.applied:
            self.guard.applied(losses, result.grad_norm, images=images)
            return result, ""
        self.guard.skipped()
        return result, reason or self.guard.check_norm(result.grad_norm, images=images)

    def _go_back(self, reason: str) -> None:
        """Goes on from the last checkpoint before the skipped steps, with the data after them."""
        self._saves.wait()
        with phase("going back"):
            writer = self._saves.writer
            back = go_back(self.folder, self.engine, self.ema, writer, self.guard, self.step, reason)
        self.step = self._saves.step = back
        self._tracker.start()  # metrics.jsonl has become shorter
        self.meter.restart()

    def log(self, metrics: dict[str, Any]) -> None:
        """Figures of the current step, to metrics.jsonl, which the tracker follows."""
        if self.world.is_main:
            self.folder.log(self.step, metrics)
            self._tracker.check()

    def log_videos(self, name: str, videos: dict[str, Path]) -> None:
        """Clips of the current step, by caption; rank 0 has written them into the run folder."""
        self.log({name: {caption: str(path.relative_to(self.folder.path)) for caption, path in videos.items()}})

    @contextmanager
    def keeping_samples(self) -> Iterator[None]:
        """Around what writes samples and logs them: a full disk costs these, and a warning."""
        try:
            yield
        except OSError as error:
            warnings.warn(f"no samples at step {self.step}: {error}; training goes on", stacklevel=3)

    def due(self, every: int) -> bool:
        """Whether what is done every so many steps, and after the last one, is due; 0 is never.

        Not again at the step that the run has just gone back to.
        """
        return bool(every and self.step) and not self._went_back and (self.step % every == 0 or not self.running)

    def evaluation_was_cut(self) -> bool:
        """Whether a run that goes on was ended in the samples or held-out figures of its step: then make them again."""
        return self._evaluation_due

    def _note_evaluated(self) -> None:
        if any(map(self.due, self.config.evaluation_intervals)):
            self.folder.note_evaluated(self.step)

    @property
    def counts_flops(self) -> bool:
        """Whether `finish_step` wants FLOPs: counting takes seconds, and on a CPU nobody knows the peak."""
        return self.world.device.type == "cuda"

    @contextmanager
    def evaluating(self, weights: Literal["raw", "ema"] = "ema") -> Iterator[nn.Module]:
        """The module in evaluation mode, without gradients, and left out of the timing.

        Each of the module's forward passes looks for a stop, as `stop_if_asked` does: all ranks have to run the same.

        Args:
            weights: the first average's, or those that are being trained.
        Raises:
            SystemExit: as `finish_step`.
        """
        try:
            using = self.engine.using(self.ema.averages[0]) if weights == "ema" else nullcontext(self.engine.module)
            with phase("samples", self.step), using as module, torch.no_grad():
                hook = module.register_forward_pre_hook(lambda *_: self.stop_if_asked())
                module.eval()
                try:
                    yield module
                finally:
                    module.train()
                    hook.remove()
        except _Stopped:  # only here are the training weights back in their place
            self._leave()
        self.meter.restart()

    def stop_if_asked(self) -> None:
        """Inside `evaluating`: breaks it off if a rank was told to stop. Call on every rank."""
        if self._stop.on_any_rank():
            raise _Stopped

    def save(self, *, scheduled: bool = False) -> None:
        """Begins to write a checkpoint of the current step unless there is one; waits for the one before.

        Args:
            scheduled: whether a run that was never stopped has it too.
        """
        if self._saves.step != self.step:
            extra = {
                "guard": self.guard.to_dict(), "scheduled": scheduled, "wall_s": self.wall_s, "failed": self.failed,
            }  # fmt: skip
            self._saves.begin(self.step, extra)
            self.meter.restart()

    def finish(self) -> None:
        """Ends a run whose steps are done: waits until the last checkpoint is written.

        Raises:
            UserError: if that of the last step cannot be; before, training goes on without.
        """
        self._saves.wait()
        self._note_evaluated()
        if self.failed and self.world.is_main:
            log.warning("%d times in this run a sample could not be read and was left out: see train.log", self.failed)

    def _leave(self) -> NoReturn:
        """Ends the run between two steps, on every rank, with a checkpoint if a step was ever made."""
        if self.step:
            self.save()
        self._saves.wait(leaving=True)
        if self.world.is_main and self.step in steps_in(self.folder.path):  # else it was said why there is none
            print(f"stopped after step {self.step}, with a checkpoint: the same command goes on", file=sys.stderr)
        raise SystemExit(self._stop.exit_code)


class _Stopped(Exception):
    """A rank was told to stop while the averages are in the place of the training weights."""


def micro_batch_tokens(batches: Sequence[Batch], tokens_per_clip: int, data_size: int) -> int:
    """Tokens of the global batch, padding rows included; data_size ranks see different clips."""
    return sum(len(batch.ids) for batch in batches) * tokens_per_clip * data_size
