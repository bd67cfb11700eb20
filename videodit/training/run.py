"""A training run without its model: processes, run folder, engine, averages, checkpoints, tracker, console."""

import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videodit.config import to_dict
from videodit.data.batch_sizes import BatchBy, BatchSize
from videodit.data.batches import Batch
from videodit.device import DType, choose_device, choose_dtype, keep_freed_memory
from videodit.errors import UserError
from videodit.parallel.mesh import TIMEOUT, World, all_reduce_sum, any_rank, init_process, shutdown
from videodit.parallel.watch import enter, phase, tick, watching
from videodit.progress import Progress
from videodit.training import checkpoint
from videodit.training.ema import PowerEMA
from videodit.training.engine import Engine, check_combination
from videodit.training.meters import StepMeter
from videodit.training.optim import OptimConfig
from videodit.training.run_folder import RunFolder
from videodit.training.tracker import Tracker, TrackerConfig


@dataclass(frozen=True)
class RunConfig:
    """What every training run has."""

    run_dir: str = ""
    """folder of the run; the same command resumes it"""
    seed: int = 0
    """of initial weights, data order and all noise"""
    max_steps: int = 1000
    """optimizer steps of the whole run"""
    global_batch_size: int = 32
    """clips of one optimizer step, over all ranks"""
    micro_batch_size: int = 32
    """clips of one forward pass on one rank"""
    batch_by: BatchBy = "clips"
    """clips: batches of every bucket have these sizes; tokens: the largest bucket's do, others hold as many tokens"""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights are sharded"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: str = "auto"
    """auto (bf16 where the hardware has it and ZeRO keeps fp32 master weights, else fp32), fp32 or bf16"""
    save_every: int = 500
    """steps between checkpoints"""
    keep_last: int = 2
    """checkpoints kept"""
    sample_every: int = 500
    """steps between samples or reconstructions; 0 for none"""
    hang_timeout_s: float = 600.0
    """seconds that a rank may be silent or stay where it is while others wait for it, until the run ends; 0 for ever"""
    ema_profiles: tuple[float, ...] = (0.05, 0.10)
    """relative widths of the weight averages (edm2); the first is what samples and exports use"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer and schedule"""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """wandb"""

    def __post_init__(self) -> None:
        if not self.run_dir:
            raise ValueError("run_dir is not set: give --run_dir FOLDER")
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1: use a positive number")
        if self.sample_every < 0:
            raise ValueError(f"sample_every {self.sample_every} is negative: use 0 for no samples")
        if not 0 <= self.hang_timeout_s <= TIMEOUT.total_seconds():
            raise ValueError(
                f"hang_timeout_s {self.hang_timeout_s:g} is not within 0 and {TIMEOUT.total_seconds():g}, "
                "when collectives give up by themselves: use 600, or 0 for no limit"
            )
        if not self.ema_profiles:
            raise ValueError("ema_profiles is empty: give at least one width, for example 0.05")
        check_combination(self.zero_stage, "fp32" if self.dtype == "auto" else self.dtype, self.optim)


class TrainingRun:
    """One open run: `with TrainingRun.open(config, text, world) as run: run.start(module); while run.running: ...`."""

    engine: Engine
    ema: PowerEMA

    def __init__(self, config: RunConfig, world: World, folder: RunFolder, tracker: Tracker) -> None:
        self.config, self.world, self.folder = config, world, folder
        self.step = self.saved_step = 0
        self._tracker = tracker
        self._stop_signal = 0  # that asked to stop; the exit code is 128 more: schedulers requeue on SIGTERM's 143
        self._progress = Progress(f"train {folder.path.name}", config.max_steps, enabled=world.is_main)

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
        with RunFolder.open(config.run_dir, config_text, world) as folder:
            tracker = Tracker(config.tracker, folder.path, to_dict(config), world)
            run = cls(config, world, folder, tracker)
            old_handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, run.request_stop)}
            # A shell that starts a job in the background has it ignore Ctrl-C: leave that as it is.
            if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
                old_handlers[signal.SIGINT] = signal.signal(signal.SIGINT, run.request_stop)
            try:
                with run._progress, watching(world, config.hang_timeout_s):
                    yield run
            finally:
                for number, handler in old_handlers.items():
                    signal.signal(number, handler)
                tracker.finish()
        if run._stop_signal:  # asked for after the last step
            raise SystemExit(128 + run._stop_signal)

    def start(self, module: nn.Module) -> None:
        """Puts the module into the engine, and the newest checkpoint, if there is one, into both."""
        self.engine = Engine(
            module,
            self.config.optim,
            zero_stage=self.config.zero_stage,
            dtype=run_dtype(self.config, self.world.device),
            world=self.world,
            max_steps=self.config.max_steps,
        )
        self.ema = PowerEMA(self.engine.slices(), self.config.ema_profiles)
        found = checkpoint.load_latest(self.folder.path)
        if found is not None:
            found.restore(self.engine, self.ema)
            self.step = self.saved_step = found.step
        self.folder.cut_metrics(self.step)
        module.register_forward_pre_hook(tick)  # samples are many forward passes
        self.meter = StepMeter(self.world.device, self.world.size)

    def accept(self, sizes: Mapping[str, BatchSize]) -> None:
        """Writes down what the run goes on with, once its checkpoint has taken it: config, and clips of a step.

        Args:
            sizes: of batches, by bucket; a run that goes on must see the same ones.
        Raises:
            UserError: on every rank, if the batches are not those that the run began with.
        """
        self.folder.freeze("batches.json", {name: size.total for name, size in sizes.items()}, "clips a step")
        self.folder.accept_config()
        enter("data", self.step + 1)

    def cast(self, x: torch.Tensor) -> torch.Tensor:
        """A batch's tensor on the run's device, in the number format of its weights."""
        return x.to(self.world.device, self.engine.dtype)

    @property
    def running(self) -> bool:
        """Whether there are steps left."""
        return self.step < self.config.max_steps

    def total_weight(self, batches: list[Any]) -> float:
        """Sum of the rows' weights over all ranks and micro batches of the step; also ends the wait for data."""
        self.meter.data_ready()
        enter("forward and backward")
        return max(float(all_reduce_sum(torch.stack([batch.weight.sum() for batch in batches]).sum())), 1.0)

    def finish_step(self, losses: dict[str, torch.Tensor], *, digest: str, tokens: int = 0, flops: int = 0) -> None:
        """Applies the gradients, averages, logs, and saves when it is time.

        Args:
            losses: this rank's part of each loss (the sum over its micro batches of what `backward` got).
            digest: of the sample keys.
            tokens: tokens of the global batch.
            flops: floating-point operations of the global batch.
        Raises:
            SystemExit: with 128 + the signal's number, after a checkpoint, if a rank was told to stop.
        """
        self.step += 1
        enter("optimizer")
        result = self.engine.step(self.step)
        self.ema.update(self.step)
        reduced = all_reduce_sum(torch.stack([loss.detach().float() for loss in losses.values()])).tolist()
        metrics: dict[str, Any] = {f"train/{name}": value for name, value in zip(losses, reduced)}
        metrics |= result.metrics()
        metrics |= self.meter.step(tokens=tokens, flops=flops)
        metrics["data/digest"] = digest
        self.log(metrics)
        stop = any_rank(bool(self._stop_signal))
        if self.step % self.config.save_every == 0 or not self.running or stop:
            self.save()
        if self.world.is_main:
            self._progress.update(self.step, f"loss {metrics['train/loss']:.4f}  {metrics['perf/step_s']:.3f} s/step")
        enter("data", self.step + 1)
        if stop:
            raise SystemExit(128 + (self._stop_signal or signal.SIGTERM))

    def log(self, metrics: dict[str, Any]) -> None:
        """Figures of the current step, to metrics.jsonl and the tracker."""
        if self.world.is_main:
            self.folder.log(self.step, metrics)
            self._tracker.log(self.step, {name: value for name, value in metrics.items() if not isinstance(value, str)})

    def log_videos(self, videos: dict[str, Path]) -> None:
        """Clips of the current step, by caption, to the tracker."""
        for caption, path in videos.items():
            self._tracker.video(self.step, "samples", path, caption)

    def time_to_sample(self) -> bool:
        """Whether samples are due at the current step."""
        return bool(self.config.sample_every) and (self.step % self.config.sample_every == 0 or not self.running)

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """The module with the first EMA's weights, in evaluation mode and without gradients; timing leaves it out."""
        with phase("samples", self.step), self.engine.using(self.ema.averages[0]) as module, torch.no_grad():
            module.eval()
            yield module
            module.train()
        self.meter.restart()

    def save(self) -> None:
        """Writes a checkpoint of the current step unless there is one.

        Raises:
            UserError: if that of the last step cannot be written; before, training goes on without.
        """
        if self.saved_step == self.step:
            return
        with phase("checkpoint"):
            saved = checkpoint.save(self.folder.path, self.step, self.engine, self.ema, {}, self.config.keep_last)
        if saved:
            self.saved_step = self.step
        elif not self.running:
            raise UserError(
                f"run_dir {self.folder.path} has no room for the checkpoint of the last step: "
                "free some space, then run the same command again"
            )
        self.meter.restart()

    def request_stop(self, number: int, _: object = None) -> None:
        """Checkpoint and leave after the running step: the handler of SIGTERM and Ctrl-C.

        Raises:
            KeyboardInterrupt: at the second Ctrl-C.
        """
        if number == signal.SIGINT:
            if self._stop_signal == signal.SIGINT:
                raise KeyboardInterrupt
            if self.world.is_main:  # not by print, which may be at work already
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        self._stop_signal = number


def run_dtype(config: RunConfig, device: torch.device) -> DType:
    """The number format of a run's weights; 'auto' keeps fp32 at ZeRO 0, which has no master weights."""
    return "fp32" if config.dtype == "auto" and config.zero_stage == 0 else choose_dtype(config.dtype, device)


@contextmanager
def open_world(config: RunConfig) -> Iterator[World]:
    """The process group of a run, left at the end even after an error.

    Raises:
        UserError: if the device is not there, or its number format does not go with the ZeRO stage.
    """
    device = choose_device(config.device)
    try:
        check_combination(config.zero_stage, run_dtype(config, device), config.optim)
    except ValueError as error:
        raise UserError(str(error)) from None
    # Every rank draws the same initial weights, so that they do not depend on the number of ranks.
    torch.manual_seed(config.seed)
    world = init_process(device.type)
    if device.type == "cpu":
        keep_freed_memory()
    try:
        yield world
    finally:
        shutdown()


def micro_batch_tokens(batches: Sequence[Batch], tokens_per_clip: int, data_size: int) -> int:
    """Tokens of the global batch, padding rows included; data_size ranks see different clips."""
    return sum(len(batch.ids) for batch in batches) * tokens_per_clip * data_size
