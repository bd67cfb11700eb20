"""DeepSpeed behind one small class: gradients of a global weighted mean, fp32 state in one form at every ZeRO stage.

Nothing else in the project imports deepspeed. Its checkpoints are not used (they are tied to stage and rank count, and
unpickle): `slices` and `load_slices` give and take fp32 weights and moments as flat pieces of named parameters.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed has no other switch, and reads it at import

logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
    warnings.simplefilter("ignore")
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.runtime.zero.muon import original_muon
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

from videodit.device import has_bf16  # noqa: E402
from videodit.models.initialise import gathering  # noqa: E402
from videodit.parallel.mesh import World, all_reduce_sum, destroy_with  # noqa: E402
from videodit.parallel.quiet import without_stdout  # noqa: E402
from videodit.training.adamw8bit import AdamW8bit  # noqa: E402
from videodit.training.batched_muon import BatchedMuon  # noqa: E402
from videodit.training.flat_gradients import FlatGradients  # noqa: E402
from videodit.training.gradient_gate import GradientGate, Keep, keep_any  # noqa: E402
from videodit.training.optim import OptimConfig, check_combination, lr_factor, param_groups, whole_shape  # noqa: E402
from videodit.training.sharded_state import ParamSlice, ShardedState, SliceReader  # noqa: E402

_linear = torch.nn.functional.linear

# Probing and building its shared-memory collective for CPUs takes ninja and seconds; gloo does the work.
vars(deepspeed.ops)["__compatible_ops__"] = {}

# torch's own wrappers around collectives warn about each other's names on every call
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")


@dataclass
class StepResult:
    """What one optimizer step did.

    Attributes:
        grad_norm: global norm of the gradient of the weighted mean loss, before clipping; inf if it was not finite, or,
            with Muon but for bf16 at stage 1, if the step was not applied.
        lr: AdamW's learning rate of this step.
        applied: False if the gradient was not finite or not wanted: then weights and moments are what they were.
        update_norm: with Muon, but for bf16 at stage 1, global norm of what DeepSpeed applies (orthogonalised matrices
            beside raw gradients).
    """

    grad_norm: float
    lr: float
    applied: bool
    update_norm: float | None = None

    def metrics(self) -> dict[str, float]:
        """The same under the names of metrics.jsonl."""
        norms = {} if self.update_norm is None else {"train/update_norm": self.update_norm}
        return {"train/grad_norm": self.grad_norm, "train/lr": self.lr, **norms}


class Engine:
    """A module being trained.

    ```
    for clips, weights, total in micro_batches:          # total = sum of the weights over all ranks and micro batches
        engine.backward((weights * per_clip_loss(engine(clips))).sum() / total)
    result = engine.step(step)
    ```

    Args:
        module: trained in place; its trainable parameters are moved, flattened and, at bf16, cast (buffers are not).
        optim: optimizer and schedule.
        zero_stage: 0 replicates; 1 shards optimizer state, 2 also gradients, 3 also weights.
        dtype: "fp32", or "bf16" weights with fp32 master weights (ZeRO 1-3).
        world: from init_process().
        max_steps: where the learning-rate schedule ends.
        offload: master weights and moments in host memory, and their update on the CPU, at ZeRO 1-3 with AdamW.
    Raises:
        ValueError: for combinations that cannot be, see `check_combination`.
    """

    def __init__(
        self,
        module: nn.Module,
        optim: OptimConfig,
        *,
        zero_stage: int,
        dtype: Literal["fp32", "bf16"],
        world: World,
        max_steps: int,
        offload: bool = False,
    ) -> None:
        check_combination(zero_stage, dtype, optim, offload)
        self.module = module
        self.zero_stage = zero_stage
        self.rank, self.world_size = world.rank, world.size
        self.dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self._config, self._world, self._max_steps, self._offload = optim, world, max_steps, offload
        _compute_on(world.device)
        module.to(world.device)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for p in module.parameters():
            p.data = p.data.contiguous()  # slices are views of the flattened weight
            if hasattr(p, "ds_tensor"):  # built in parts, see sharded_construction
                p.data, p.ds_tensor.data = p.data.to(self.dtype), p.ds_tensor.data.to(self.dtype)
        self.shapes = {name: whole_shape(p) for name, p in named.items()}
        self._optimizer = _build_optimizer(param_groups(module, optim))
        if zero_stage == 0:
            self._optimizer.register_step_pre_hook(self._clip_stage_0)
        self._deepspeed = _initialize(module, self._optimizer, self._deepspeed_config(), world.local_rank)
        if zero_stage == 3:
            _keep_whole(module, self._deepspeed.optimizer)
        names = {id(p): name for name, p in named.items()}
        self._state = ShardedState(self._deepspeed.optimizer, self._optimizer, zero_stage, world.rank, names)
        replicated = hasattr(self._deepspeed.optimizer, "bf16_groups")  # BF16_Optimizer: whole gradients on every rank
        if replicated and world.size == 1:
            self._deepspeed.enable_backward_allreduce = False  # it copies every gradient there and back, even alone
            if world.device.type == "cpu":  # on a GPU a copy of all gradients would cost memory
                FlatGradients(self._deepspeed.optimizer)
        muon = optim.name == "muon"
        self._gate = GradientGate(self._deepspeed.optimizer, before_muon=muon and zero_stage == 3)
        # BF16_Optimizer takes the norm before it orthogonalises, the others after it.
        self._norm_of_update = muon and not replicated
        if muon and world.device.type == "cpu":
            precision = torch.bfloat16 if has_bf16(world.device) else torch.float32
            BatchedMuon(self._deepspeed.optimizer, precision, original_muon, alone=world.size == 1)
        self._last_momentum: dict[str, list[torch.Tensor]] = {}

    def _deepspeed_config(self) -> dict[str, Any]:
        # Muon's update has a norm that the gradient does not change, so clipping by it would only rescale the rate.
        clip = 0.0 if self._config.name == "muon" or self.zero_stage == 0 else self._config.grad_clip
        on_gpu = self._world.device.type == "cuda"
        offload = {"offload_optimizer": {"device": "cpu", "pin_memory": on_gpu}} if self._offload else {}
        return {
            "train_batch_size": self._world.size,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            # backward() only accumulates, step() is the boundary: each step may have its own number of micro batches.
            "managed_gradient_accumulation": False,
            "gradient_clipping": clip,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,  # torch's AdamW does as well, and nothing is compiled
            "bf16": {"enabled": self.dtype == torch.bfloat16, "check_grad_overflow": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
            "steps_per_print": None,
            "zero_optimization": {
                "stage": self.zero_stage,
                "overlap_comm": self.zero_stage == 2 and on_gpu,
                # No copy of every gradient into a bucket when there is nobody to send it to.
                "contiguous_gradients": self._world.size > 1,
                "reduce_scatter": not (self.zero_stage == 3 and self._config.name == "muon"),
                "reduce_bucket_size": 50_000_000,
                "allgather_bucket_size": 50_000_000,
                **offload,
            },
        }

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module (ZeRO's hooks included)."""
        return self._deepspeed(*args, **kwargs)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a micro batch's gradient; any number of times before `step`, but on every rank equally often.

        Args:
            loss: () this micro batch's part of the global weighted mean: its sum of w·loss divided by the sum of w over
                all ranks and micro batches of the step. Zero-weight rows and even a constant 0·output are fine.
        """
        # DeepSpeed averages over ranks; the parts have to be summed.
        with contextlib.redirect_stdout(io.StringIO()):
            self._deepspeed.backward(loss * self._world.size, scale_wrt_gas=False)

    def step(self, step: int, keep: Keep = keep_any) -> StepResult:
        """Reduces, clips and applies the gradients, or drops them; call on every rank.

        Args:
            step: optimizer step, counted from 1; decides the learning rate.
            keep: asked for the step with a finite gradient, with its norm before clipping (with Muon, but for bf16 at
                stage 1, the norm of the update); False drops the step.
        """
        factor = lr_factor(self._config, step, self._max_steps)
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        with self._eager_muon(), self._gate.judging(keep):
            self._deepspeed.step()
        norm, applied = self._gate.norm, self._gate.applied
        assert self.zero_stage == 0 or applied == self._deepspeed.was_step_applied()
        lr = self._config.lr * factor
        if not self._norm_of_update:
            return StepResult(norm, lr, applied)
        return StepResult(self._norm_from_momentum() if applied else float("inf"), lr, applied, update_norm=norm)

    @contextlib.contextmanager
    def _eager_muon(self) -> Iterator[None]:
        """DeepSpeed wraps Muon in torch.compile; on a CPU that costs a minute of C++ builds and gains nothing."""
        if self._config.name != "muon" or self._world.device.type != "cpu":
            yield
            return
        with torch.compiler.set_stance("force_eager"):
            yield

    def _clip_stage_0(self, *_: Any) -> None:
        """Stage 0 has no norm of its own. Runs between the reduction and the update."""
        params = [p for group in self._optimizer.param_groups for p in group["params"]]
        limit = self._config.grad_clip or float("inf")
        grads = [p.grad for p in params if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        if self._gate.judge(norm):
            torch.nn.utils.clip_grads_with_norm_(params, limit, norm)
        else:
            for p in params:
                p.grad = None

    def _momentum(self) -> dict[str, list[torch.Tensor]]:
        """Copies of the first moments: what `_norm_from_momentum` compares the next step's with."""
        slices = self.slices()
        kinds = ("momentum_buffer", "exp_avg")
        return {kind: [p.state[kind]().float().clone() for p in slices if kind in p.state] for kind in kinds}

    @torch.no_grad()
    def _norm_from_momentum(self) -> float:
        """Norm of the raw gradient, which Muon overwrites in place: g = (m - beta·m_before) / (1 - beta)."""
        total = torch.zeros((), device=self._world.device)
        now = self._momentum()
        betas = {"momentum_buffer": self._config.muon_momentum, "exp_avg": self._config.betas[0]}
        for kind, beta in betas.items():
            if now[kind]:
                before = self._last_momentum.get(kind)
                change = torch._foreach_sub(now[kind], before, alpha=beta) if before else now[kind]
                total += (torch.stack(torch._foreach_norm(change)) / (1 - beta)).square().sum()
        self._last_momentum = now
        return float(all_reduce_sum(total).sqrt())

    @property
    def optimizer_step(self) -> int:
        """Updates applied so far; steps that were dropped do not count."""
        return max((int(s["step"]) for s in self._optimizer.state.values() if "step" in s), default=0)

    def slices(self) -> list[ParamSlice]:
        """What this rank owns: over all ranks every element of every trainable parameter exactly once."""
        owned = self.zero_stage > 0 or self._world.rank == 0
        return self._state.slices() if owned else []

    @torch.no_grad()
    def load_slices(self, read: SliceReader, optimizer_step: int) -> None:
        """Writes weights and moments back, whatever stage and rank count they were saved at. Call on every rank.

        Args:
            read: gives any range of any parameter's weight or moment.
            optimizer_step: that was saved with them; with 0 there are no moments.
        """
        self._state.load(read, optimizer_step)
        self._state.refresh_module()
        self._last_momentum = self._momentum() if self._norm_of_update else {}

    @contextlib.contextmanager
    def using(self, weights: Sequence[torch.Tensor]) -> Iterator[nn.Module]:
        """The module with other weights for a while, such as an average's; the training weights come back bit-exact.

        Call on every rank. At stage 3 every rank has to run the same forward calls inside.

        Args:
            weights: one flat tensor per slice, in the order of `slices` (PowerEMA.averages[k]).
        """
        live = [piece.weight for piece in self.slices()]
        kept = [weight.clone() for weight in live]
        try:
            self._write_weights(live, weights)
            yield self.module
        finally:
            self._write_weights(live, kept)

    @torch.no_grad()
    def _write_weights(self, live: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        for weight, value in zip(live, values, strict=True):
            weight.copy_(value)
        if self.zero_stage == 0 and self._world.size > 1:
            for p in self.module.parameters():
                if p.requires_grad:
                    torch.distributed.broadcast(p.data, 0)
        self._state.refresh_module()


@contextlib.contextmanager
def sharded_construction(zero_stage: int, world: World) -> Iterator[None]:
    """Models built inside have, at ZeRO-3, only this rank's part of each weight from the start.

    Never more than one submodule is whole at once. The weights are those of a model that is built whole: every rank
    draws the same, see `videodit.models.initialise`.
    """
    if zero_stage != 3 or world.size == 1:
        yield
        return
    _compute_on(world.device)
    config = {
        "train_batch_size": world.size,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "memory_efficient_linear": False},  # it would replace F.linear for good
    }

    def gather(weights: list[torch.Tensor]) -> Any:
        return deepspeed.zero.GatheredParameters(weights, modifier_rank=0)

    # Drawn in fp32 whatever the run's dtype is, as a whole model's weights are; the engine casts what it is given.
    # Its argument dtype=torch.float32 would mean bf16 on a CPU (0.19.8).
    init = deepspeed.zero.Init(config_dict_or_path=config, mem_efficient_linear=False)
    with contextlib.redirect_stdout(io.StringIO()), init, gathering(gather):
        yield


_found = get_accelerator()


def _compute_on(device: torch.device) -> None:
    """DeepSpeed takes a GPU wherever there is one: it would move the model of a run on the CPU there."""
    if device.type != get_accelerator().device_name():
        set_accelerator(_found if device.type == _found.device_name() else CPU_Accelerator())


def gather_at_once(module: nn.Module, kept: Iterable[nn.Module] = ()) -> None:
    """At ZeRO-3 all weights of this module will come together before its forward pass: no hooks on what is inside.

    Args:
        module: not yet given to an engine.
        kept: what is inside and called by itself as well: without hooks, so every rank keeps its weights whole.
    """
    deepspeed.utils.set_z3_leaf_module(module, True)
    for part in kept:
        for p in part.parameters():
            p.kept_whole = True  # type: ignore[attr-defined]


def _keep_whole(module: nn.Module, zero: Any) -> None:
    kept = [p for p in module.parameters() if hasattr(p, "kept_whole") and not p.ds_persist]  # type: ignore[attr-defined]
    for p in kept:
        p.ds_persist = True  # type: ignore[attr-defined]
    zero.persistent_parameters.extend(kept)  # which come together again after each step
    if kept:
        kept[0].all_gather(kept)  # type: ignore[attr-defined]


def _build_optimizer(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # fused=True is torch's own kernel, on CPU too: no DeepSpeed op gets compiled.
    for group in groups:
        for p in group["params"]:
            p.use_muon = group["use_muon"]  # how DeepSpeed's ZeRO optimizers tell
            p.quantized = group["quantized"]
    if any(group["quantized"] for group in groups):
        return AdamW8bit(groups)
    if not any(group["use_muon"] for group in groups):
        return torch.optim.AdamW(groups, fused=True)
    return MuonWithAuxAdam(groups, adam_optimizer=torch.optim.AdamW, adam_optimizer_kwargs={"fused": True})


def _leave_deepspeed() -> None:
    deepspeed.comm.destroy_process_group()  # else its cached groups outlive the run
    # At ZeRO-3 it puts a function of its own there, which keeps no gathered weight for the backward pass, for good.
    torch.nn.functional.linear = _linear


def _initialize(module: nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any], local_rank: int) -> Any:
    os.environ.setdefault("LOCAL_RANK", str(local_rank))  # its sanity check wants it, torchrun or not
    destroy_with(_leave_deepspeed)
    deepspeed.utils.logger.setLevel(logging.ERROR)
    with without_stdout(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=config, dist_init_required=None)
    return engine
