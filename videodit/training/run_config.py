"""The settings that every training run has, and what follows from them before it begins."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from videodit.data.batch_sizes import BatchBy
from videodit.device import DType, choose_device, choose_dtype, deterministic_algorithms, keep_freed_memory
from videodit.errors import UserError
from videodit.parallel.mesh import TIMEOUT, World, process_group
from videodit.training.guard import GuardConfig
from videodit.training.optim import OptimConfig, check_combination
from videodit.training.stages import settled
from videodit.training.tracker import TrackerConfig


@dataclass(frozen=True)
class RunConfig:
    """What every training run has."""

    run_dir: str = ""
    """folder of the run; the same command resumes it"""
    seed: int = 0
    """of initial weights, data order and all noise"""
    max_steps: int = 1000
    """optimizer steps of the whole run"""
    stages: tuple[dict[str, Any], ...] = ()
    """parts of the run, one after the other: each gives its steps, and what it has other than the run of data,
    global_batch_size, micro_batch_size, batch_by and, of a DiT, noise, crop, condition_rate and checkpointing;
    max_steps is their sum"""
    global_batch_size: int = 32
    """clips of one optimizer step, over all ranks"""
    micro_batch_size: int = 32
    """clips of one forward pass on one rank"""
    batch_by: BatchBy = "clips"
    """clips: batches of every bucket have these sizes; tokens: the largest bucket's do, others hold as many tokens;
    time: others take as long, as measured when the run begins"""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 0 nothing, 1 optimizer state, 2 also gradients, 3 also weights are sharded"""
    offload_optimizer: bool = False
    """fp32 weights, moments and averages in host memory, and the optimizer's step on the CPU (AdamW at ZeRO 1-3)"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: str = "auto"
    """auto (bf16 where the hardware has it and ZeRO keeps fp32 master weights, else fp32), fp32 or bf16"""
    deterministic: bool = False
    """algorithms whose sums have one order only, and an error where there is none: two runs on one GPU are identical"""
    save_every: int = 500
    """steps between checkpoints"""
    keep_last: int = 2
    """checkpoints kept, the newest ones"""
    keep_every: int = 0
    """checkpoints of steps that this divides are kept too; 0 for none"""
    sample_every: int = 500
    """steps between samples or reconstructions; 0 for none"""
    communication_every: int = 100
    """steps between two whose communication is measured (perf/communication_s), with several ranks; 0 for never"""
    hang_timeout_s: float = 600.0
    """seconds that a rank may be silent or stay where it is while others wait for it, until the run ends; 0 for ever"""
    ema_profiles: tuple[float, ...] = (0.05, 0.10)
    """relative widths of the weight averages (edm2); the first is what samples and exports use"""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """optimizer and schedule"""
    guard: GuardConfig = field(default_factory=GuardConfig)
    """steps that are skipped, and when the run goes back"""
    tracker: TrackerConfig = field(default_factory=TrackerConfig)
    """wandb"""

    @property
    def stage_settings(self) -> tuple[str, ...]:
        """What a stage may set beside its `steps`."""
        return ("data", "global_batch_size", "micro_batch_size", "batch_by")

    @property
    def evaluation_intervals(self) -> tuple[int, ...]:
        """Steps between samples, and between whatever else is measured."""
        return (self.sample_every,)

    def __post_init__(self) -> None:
        if self.stages:
            object.__setattr__(self, "max_steps", settled(self))
        if not self.run_dir:
            raise ValueError("run_dir is not set: give --run_dir FOLDER")
        for name in ("max_steps", "global_batch_size", "micro_batch_size", "save_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1: use a positive number")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} has more than 64 bits: use for example 0")
        for name, things in (
            ("sample_every", "samples"),
            ("keep_every", "checkpoints beside the newest"),
            ("communication_every", "measurement"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} is negative: use 0 for no {things}")
        if self.keep_every % self.save_every:
            nearest = max(round(self.keep_every / self.save_every), 1) * self.save_every
            raise ValueError(
                f"keep_every {self.keep_every} is not a multiple of save_every {self.save_every}: "
                f"the nearest is {nearest}"
            )
        if self.deterministic and self.batch_by == "time":
            raise ValueError(
                "batch_by time makes batches by what the machine measures, so that no two runs are the same as "
                "deterministic asks for: use batch_by tokens"
            )
        if not 0 <= self.hang_timeout_s <= TIMEOUT.total_seconds():
            raise ValueError(
                f"hang_timeout_s {self.hang_timeout_s:g} is not within 0 and {TIMEOUT.total_seconds():g}, "
                "when collectives give up by themselves: use 600, or 0 for no limit"
            )
        if not self.ema_profiles:
            raise ValueError("ema_profiles is empty: give at least one width, for example 0.05")
        check_combination(
            self.zero_stage, "fp32" if self.dtype == "auto" else self.dtype, self.optim, self.offload_optimizer
        )


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
    with deterministic_algorithms() if config.deterministic else nullcontext(), process_group(device.type) as world:
        if device.type == "cpu":
            keep_freed_memory()
        yield world
