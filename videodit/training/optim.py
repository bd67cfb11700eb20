"""Which optimizer, at which learning rate, on which parameters. Pure functions; the engine builds the optimizer."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimConfig:
    """The optimizer and its schedule."""

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """adamw; adamw8bit: its moments in 8 bits, but for biases, norms and embeddings; muon: Muon on hidden matrices and
    AdamW on the rest (needs ZeRO 1-3)."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon, in units of spectral norm per step; it follows the same schedule."""
    betas: tuple[float, float] = (0.9, 0.99)
    """Decay of AdamW's first and second moment."""
    muon_momentum: float = 0.95
    """Decay of Muon's momentum."""
    eps: float = 1e-8
    """Added to the root of AdamW's second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay of weights with two or more axes; never of biases, norms and embeddings."""
    grad_clip: float = 1.0
    """Largest global gradient norm, 0 for none. Muon's update has a fixed norm: there it is not used."""
    warmup_steps: int = 100
    """Steps of linear warm-up from 0."""
    schedule: Literal["constant", "cosine", "linear", "wsd"] = "constant"
    """Shape after the warm-up; wsd is constant, then linear over the last decay_fraction of the run."""
    final_lr_ratio: float = 0.0
    """Learning rate at max_steps, as a part of the peak (cosine, linear, wsd)."""
    decay_fraction: float = 0.2
    """Part of the run that wsd spends decaying."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "adamw8bit", "muon"):
            raise ValueError(f"optim.name is {self.name!r}; use adamw, adamw8bit or muon")
        if self.schedule not in ("constant", "cosine", "linear", "wsd"):
            raise ValueError(f"optim.schedule is {self.schedule!r}; use constant, cosine, linear or wsd")
        for field in ("lr", "muon_lr", "eps"):
            if not getattr(self, field) > 0:
                raise ValueError(f"optim.{field} is {getattr(self, field)}; use a value above 0")
        for field in ("weight_decay", "grad_clip", "warmup_steps"):
            if getattr(self, field) < 0:
                raise ValueError(f"optim.{field} is {getattr(self, field)}; use 0 or more")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.muon_momentum)):
            raise ValueError(f"optim.betas {self.betas} and muon_momentum {self.muon_momentum} must lie in [0, 1)")
        if not 0 <= self.final_lr_ratio <= 1 or not 0 < self.decay_fraction <= 1:
            raise ValueError("optim.final_lr_ratio must lie in [0, 1] and optim.decay_fraction in (0, 1]")


def check_combination(zero_stage: int, dtype: str, optim: OptimConfig, offload: bool = False) -> None:
    """Refuses what DeepSpeed cannot do, before anything is built.

    Raises:
        ValueError: names the value and the fix.
    """
    if zero_stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_stage is {zero_stage}; use 0, 1, 2 or 3")
    if dtype not in ("fp32", "bf16"):
        raise ValueError(f"dtype is {dtype!r}; use fp32 or bf16")
    if dtype == "bf16" and zero_stage == 0:
        raise ValueError("dtype bf16 at zero_stage 0 keeps no fp32 master weights; set zero_stage to 1")
    if optim.name == "muon" and zero_stage == 0:
        raise ValueError("optim.name muon at zero_stage 0 is not DeepSpeed's Muon; set zero_stage to 1")
    if offload and zero_stage == 0:
        raise ValueError("offload_optimizer at zero_stage 0 has no part of its own to offload; set zero_stage to 1")
    if offload and optim.name != "adamw":
        # DeepSpeed's offloaded Muon moves its momenta before it is known whether the step counts.
        raise ValueError(f"offload_optimizer does not go with optim.name {optim.name}; set optim.name to adamw")


def lr_factor(config: OptimConfig, step: int, max_steps: int) -> float:
    """The learning rate of a step as a part of its peak: warm-up times schedule.

    Args:
        step: optimizer step, counted from 1.
        max_steps: the step at which the decay ends.
    """
    warmup = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    length = max(1, max_steps - config.warmup_steps)
    start = config.warmup_steps
    if config.schedule == "wsd":
        length = max(1, round(config.decay_fraction * max_steps))
        start = max_steps - length
    done = min(1.0, max(0.0, (step - start) / length))  # 0 before the decay starts, 1 at max_steps
    if config.schedule == "constant":
        return warmup
    left = (1 + math.cos(math.pi * done)) / 2 if config.schedule == "cosine" else 1 - done
    return warmup * (config.final_lr_ratio + (1 - config.final_lr_ratio) * left)


def learning_rate(config: OptimConfig, step: int, max_steps: int) -> float:
    """AdamW's learning rate at a step (counted from 1)."""
    return config.lr * lr_factor(config, step, max_steps)


def whole_shape(p: nn.Parameter) -> tuple[int, ...]:
    """Of a parameter, also where ZeRO-3 has already left a part of it on this rank."""
    return tuple(getattr(p, "ds_shape", p.shape))


def param_groups(module: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Trainable parameters as optimizer groups: Muon's matrices, decayed weights, the rest.

    No decay for anything with fewer than two axes and for nn.Embedding. Muon takes weights with exactly two axes
    (DeepSpeed's orthogonalisation has no meaning for a 5-axis kernel) that are not an embedding and whose name does not
    start with a prefix in `muon_exclude`, an attribute of the module or of any submodule (prefixes are then relative
    to it): put first and last layers there, and stacked matrices that are not one map.

    Returns:
        groups with params, lr, peak_lr, weight_decay, use_muon and quantized (its moments, to 8 bits); each parameter
        once, groups never empty.
    """
    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    excluded = tuple(
        f"{prefix}.{name}" if prefix else name
        for prefix, part in module.named_modules()
        for name in getattr(part, "muon_exclude", ())
    )
    matrices: list[torch.Tensor] = []
    decayed: list[torch.Tensor] = []
    plain: list[torch.Tensor] = []
    for name, p in module.named_parameters():
        if not p.requires_grad:
            continue
        axes = len(whole_shape(p))
        if axes < 2 or id(p) in embeddings:
            plain.append(p)
        elif config.name == "muon" and axes == 2 and not name.startswith(excluded):
            matrices.append(p)
        else:
            decayed.append(p)
    # gram runs in fp16 where that is fast and in fp32 elsewhere; standard is always bf16, which many CPUs emulate.
    muon = {"lr": config.muon_lr, "peak_lr": config.muon_lr, "momentum": config.muon_momentum, "ns_method": "gram"}
    adam = {"lr": config.lr, "peak_lr": config.lr, "betas": config.betas, "eps": config.eps}
    eight_bit = config.name == "adamw8bit"
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay, "use_muon": True, "quantized": False, **muon},
        {"params": decayed, "weight_decay": config.weight_decay, "use_muon": False, "quantized": eight_bit, **adam},
        {"params": plain, "weight_decay": 0.0, "use_muon": False, "quantized": False, **adam},
    ]
    return [group for group in groups if group["params"]]
