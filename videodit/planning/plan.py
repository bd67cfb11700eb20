"""`videodit plan`: what a training run needs, before a GPU is touched."""

import copy
from dataclasses import dataclass

import torch

from videodit.data.batch_sizes import batch_sizes
from videodit.data.buckets import Bucket
from videodit.data.latents import read_manifests
from videodit.device import has_bf16, torch_dtype
from videodit.errors import UserError
from videodit.models.checkpointing import POLICIES
from videodit.planning.bounds import refuse_the_absurd
from videodit.planning.footprint import ParameterCount
from videodit.planning.machines import GIB, Machine, find_machine
from videodit.planning.memory import Memory, rank_memory
from videodit.planning.plan_config import DiTPlanConfig, PlanConfig, VAEPlanConfig
from videodit.planning.workload import DiTWorkload, Workload
from videodit.training.dit_config import DiTRunConfig, follow_latents, latent_folders
from videodit.training.run_config import RunConfig
from videodit.training.stages import stages_of

USABLE = 0.92
"""Share of a device's memory that a plan may fill: the rest is for the context, libraries and fragmentation."""

MOST_GPUS = 64
"""As many times those that were asked for are looked at, where a run does not fit."""


def sharing_of(config: RunConfig) -> int:
    """Ranks that share each clip's tokens."""
    return config.sequence_parallel if isinstance(config, DiTRunConfig) else 1


def room_of(machine: Machine) -> float:
    """Bytes of a machine's memory that a plan may fill."""
    return USABLE * machine.memory_bytes


def policy_of(config: RunConfig) -> str:
    """Which activations a run keeps; only the DiT's has the choice."""
    return config.checkpointing if isinstance(config, DiTRunConfig) else "none"


@dataclass(frozen=True)
class BucketPlan:
    """One clip shape, whole or its windows.

    Attributes:
        bucket: the shape.
        name: the same for people, with the windows' size.
        steps: of the run, with the buckets in equal shares.
        clips: of an optimizer step, over all ranks.
        tokens: of a clip.
        step_flops: of an optimizer step, over all ranks; what is computed twice counts once.
        step_s: seconds of a step at the expected MFU.
    """

    bucket: Bucket
    name: str
    steps: float
    clips: int
    tokens: int
    step_flops: int
    step_s: float


@dataclass(frozen=True)
class Choice:
    """A way to run: stage, checkpointing, micro batch and offload, and the memory that it takes on a rank."""

    zero_stage: int
    checkpointing: str
    micro_batch_size: int
    offload: bool
    memory: Memory


@dataclass(frozen=True)
class Plan:
    """What `videodit plan` prints.

    Attributes:
        config: of the run and the plan.
        machine: a rank's.
        dtype: of weights and activations.
        parameters: trainable ones.
        buckets: clip shapes.
        choices: every ZeRO stage with every checkpointing policy, at the config's micro batch.
        caption_flops: of a frozen text encoder's pass over one caption, which is in no step; 0 where there is none.
    """

    config: PlanConfig
    machine: Machine
    dtype: torch.dtype
    parameters: ParameterCount
    buckets: list[BucketPlan]
    choices: list[Choice]
    caption_flops: int = 0

    @property
    def room(self) -> float:
        """Bytes that a rank may fill."""
        return room_of(self.machine)

    @property
    def chosen(self) -> Choice:
        """What the config says; with checkpointing auto the first policy that fits, else the last."""
        of_stage = [c for c in self.choices if c.zero_stage == self.config.zero_stage]
        if policy_of(self.config) == "auto":
            return next((c for c in of_stage if c.memory.total <= self.room), of_stage[-1])
        return next(c for c in of_stage if c.checkpointing == policy_of(self.config))

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(plan.step_s * plan.steps for plan in self.buckets)


def make_plans(config: PlanConfig) -> list[Plan]:
    """Plans a training run: each of its stages.

    Raises:
        UserError: if one does not fit the machine; names it and the nearest that does.
    """
    config = _follow(config)
    if not config.stages:
        return [make_plan(config)]
    plans = []
    for stage in stages_of(config):
        try:
            plans.append(make_plan(stage.config))
        except UserError as error:
            raise UserError(f"stage {stage.number}: {error}") from None
    return plans


def _follow(config: PlanConfig) -> PlanConfig:
    """With what its latents decide, if they are there."""
    if isinstance(config, DiTPlanConfig) and read_manifests(latent_folders(config)) is not None:
        followed = follow_latents(config)
        assert isinstance(followed, DiTPlanConfig)
        return followed
    return config


def make_plan(config: PlanConfig) -> Plan:
    """Plans a training run, or one stage of it.

    Raises:
        UserError: if it does not fit the machine; names the nearest that does.
    """
    config = _follow(config)
    sharing, batch = sharing_of(config), config.global_batch_size
    if config.gpus % sharing:
        raise UserError(
            f"sequence_parallel {sharing} does not divide {config.gpus} GPUs: "
            f"the nearest that works is --gpus {max(round(config.gpus / sharing), 1) * sharing}"
        )
    if batch * sharing < config.gpus:
        raise UserError(
            f"global_batch_size {batch} leaves {config.gpus - batch * sharing} of {config.gpus} GPUs without a clip: "
            f"use {config.gpus // sharing}, or --gpus {batch * sharing}"
        )
    dtype = plan_dtype(config)
    machine = find_machine(config.gpu, dtype)
    workload = config.workload()
    refuse_the_absurd(config, workload, machine.name, room_of(machine), MOST_GPUS * config.gpus)
    planner = Planner(config, workload, config.gpus, dtype, on_cpu=config.gpu == "cpu")
    plan = planner.plan(machine)
    if plan.chosen.memory.total > plan.room:
        raise UserError(_refusal(plan, planner))
    return plan


def plan_dtype(config: PlanConfig) -> torch.dtype:
    """Of weights and activations on the machine that is planned for."""
    if config.dtype != "auto":
        return torch_dtype("bf16" if config.dtype == "bf16" else "fp32")
    bf16 = config.zero_stage > 0 and (config.gpu != "cpu" or has_bf16(torch.device("cpu")))
    return torch.bfloat16 if bf16 else torch.float32


class Planner:
    """Measures each bucket with each policy once, and puts memory together from that.

    Args:
        config: of the run.
        workload: what is trained.
        ranks: of the run.
        dtype: of weights and activations.
        on_cpu: whether the ranks compute on CPUs.
    """

    def __init__(
        self, config: RunConfig, workload: Workload, ranks: int, dtype: torch.dtype, *, on_cpu: bool = False
    ) -> None:
        self.config, self.workload, self.ranks, self.dtype = config, workload, ranks, dtype
        self._on_cpu = on_cpu
        self.parameters = workload.parameters()
        self.sharing = sharing_of(config)
        self._activations: dict[str, int] = {}

    @property
    def share(self) -> int:
        """Clips of a global batch that the fullest rank sees, alone or with those that share its tokens."""
        return self.share_of(self.config.global_batch_size)

    def share_of(self, clips: int) -> int:
        """The same of a batch of so many clips."""
        return -(-clips // (self.ranks // self.sharing))

    @property
    def micro(self) -> int:
        """Clips of a micro batch: no more than a rank gets."""
        return min(self.config.micro_batch_size, self.share)

    @property
    def stages(self) -> list[int]:
        """ZeRO stages that the number format and the optimizer allow."""
        sharded = self.dtype == torch.bfloat16 or self.config.optim.name == "muon" or self.config.offload_optimizer
        first = 1 if sharded else 0
        return list(range(first, 4))

    def choice(self, stage: int, policy: str, micro: int, offload: bool | None = None) -> Choice:
        """The memory of the most demanding bucket; activations grow with the clips of a micro batch.

        Args:
            stage: of ZeRO.
            policy: of checkpointing.
            micro: clips of a micro batch.
            offload: of the optimizer; None for what the config says.
        """
        offload = self.config.offload_optimizer if offload is None else offload
        if policy not in self._activations:
            self._activations[policy] = max(
                self.workload.activation_bytes(bucket, policy, self.dtype, on_cpu=self._on_cpu)
                for bucket in self.workload.buckets
            )
        one = self._activations[policy]
        memory = rank_memory(
            self.parameters,
            one * micro / self.sharing,
            zero_stage=stage,
            ranks=self.ranks,
            dtype=self.dtype,
            optimizer=self.config.optim.name,
            ema_profiles=len(self.config.ema_profiles),
            offload=offload,
            overlapped=not self._on_cpu,
        )
        return Choice(stage, policy, micro, offload, memory.in_one_place() if self._on_cpu else memory)

    def plan(self, machine: Machine) -> Plan:
        """For a machine and its speed."""
        config = self.config
        assert isinstance(config, (DiTPlanConfig, VAEPlanConfig))
        choices = [self.choice(stage, p, self.micro) for stage in self.stages for p in self.workload.policies]
        captions = self.workload.caption_flops() if isinstance(self.workload, DiTWorkload) else 0
        plan = Plan(config, machine, self.dtype, self.parameters, [], choices, captions)
        policy = plan.chosen.checkpointing
        speed = machine.peak_flops * config.mfu
        tokens = {bucket.name: self.workload.tokens(bucket) for bucket in self.workload.buckets}
        timed = self.workload.buckets if config.batch_by == "time" else []
        sizes = batch_sizes(
            tokens,
            config.global_batch_size,
            config.micro_batch_size,
            config.batch_by,
            seconds={bucket.name: self.workload.flops(bucket, policy) for bucket in timed} or None,  # not measured yet
            world=self.ranks // self.sharing,
        )
        for bucket in self.workload.buckets:
            clips = sizes[bucket.name].total
            for part in self.workload.steps(bucket):
                steps = part.share * config.max_steps / len(self.workload.buckets)
                flops = self.workload.step_flops(bucket, part, "none")
                done = flops if policy == "none" else self.workload.step_flops(bucket, part, policy)
                # The fullest rank is the one that the others wait for.
                seconds = done * self.share_of(clips) / self.sharing / speed
                plan.buckets.append(BucketPlan(bucket, part.name, steps, clips, part.tokens, flops * clips, seconds))
        return plan

    def among(self, ranks: int, sharing: int) -> "Planner":
        """The same for so many ranks, of which so many share a clip's tokens; nothing is measured again."""
        other = copy.copy(self)
        other.ranks, other.sharing = ranks, sharing
        return other

    def nearest(self, room: float) -> Choice | None:
        """The choice that fits with the least work: sharding before recomputing, and that before smaller batches.

        Offload, whose step waits for the CPU, comes last.
        """
        offload = self.config.offload_optimizer
        found = self._nearest(room, offload)
        if found is None and not offload and self.config.optim.name == "adamw":
            found = self._nearest(room, True)
        return found

    def _nearest(self, room: float, offload: bool) -> Choice | None:
        micro, policy = self.micro, policy_of(self.config)
        first = 0 if policy == "auto" else self.workload.policies.index(policy)
        while micro:
            for p in self.workload.policies[first:]:
                if p == "attention" and isinstance(self.config, DiTRunConfig) and self.config.compile:
                    continue  # train dit would refuse it
                for stage in self.stages:
                    choice = self.choice(stage, p, micro, offload)
                    if stage >= max(self.config.zero_stage, int(offload)) and choice.memory.total <= room:
                        return choice
            micro //= 2
        return None


def _refusal(plan: Plan, planner: Planner) -> str:
    says = (
        f"the run needs {plan.chosen.memory.total / GIB:.1f} GiB on each of {plan.config.gpus} {plan.machine.name}, "
        f"which have room for {plan.room / GIB:.1f}"
    )
    nearest = planner.nearest(plan.room)
    if nearest is None:
        says += ": no ZeRO stage, checkpointing or micro batch makes it fit"
        return f"{says}; {_with_more(plan, planner)}"
    return f"{says}: the nearest that fits is{_options(nearest)}"


def _with_more(plan: Plan, planner: Planner) -> str:
    """The first that fits when each clip's tokens are shared by more ranks, or there are more of them."""
    config = plan.config
    for times in (1, 2, 4, 8, 16, 32, MOST_GPUS):
        gpus = config.gpus * times
        sharings = [planner.sharing]
        if isinstance(config, DiTRunConfig):
            sharings += [n for n in (2, 4, 8) if n > planner.sharing and gpus % n == 0]
        for sharing in sharings:
            if gpus > config.global_batch_size * sharing:
                continue  # some would have no clip
            nearest = planner.among(gpus, sharing).nearest(plan.room)
            if nearest is not None:
                shared = f" --sequence_parallel {sharing}" if sharing > 1 else ""
                return f"the nearest that does is --gpus {gpus}{shared}{_options(nearest)}"
    return "use larger GPUs"


def _options(choice: Choice) -> str:
    """A choice as it is asked for."""
    policy = f" --checkpointing {choice.checkpointing}" if choice.checkpointing != "none" else ""
    policy += " --offload_optimizer true" if choice.offload else ""
    return (
        f" --zero_stage {choice.zero_stage}{policy} --micro_batch_size {choice.micro_batch_size} "
        f"({choice.memory.total / GIB:.1f} GiB)"
    )


def choose_checkpointing(
    config: DiTRunConfig, memory_bytes: float, ranks: int, dtype: torch.dtype, *, on_cpu: bool = False
) -> str:
    """The first of `checkpointing.POLICIES` with which the run fits a device; the last one if none does.

    Args:
        config: of the run, following its latents.
        memory_bytes: of the device.
        ranks: of the run.
        dtype: of weights and activations.
        on_cpu: whether the ranks compute on CPUs.
    """
    planner = Planner(config, DiTWorkload(config), ranks, dtype, on_cpu=on_cpu)
    policies = [p for p in POLICIES if p != "attention" or not config.compile]  # these two do not go together
    needs = ((p, planner.choice(config.zero_stage, p, planner.micro).memory.total) for p in policies)
    return next((policy for policy, total in needs if total <= USABLE * memory_bytes), POLICIES[-1])
