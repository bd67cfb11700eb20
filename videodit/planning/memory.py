"""Bytes that training keeps on each rank, by part, for every ZeRO stage.

The bytes per parameter are what DeepSpeed 0.19.8 holds in our engine: tensors counted at every stage, in fp32 and bf16,
on one rank and on two (`memory_as_planned` in tests/training/distributed_cases.py), not what its papers say.
"""

from dataclasses import dataclass, fields, replace

import torch

from videodit.planning.footprint import ParameterCount
from videodit.training.blockwise import BLOCK

BUCKET = 50_000_000
"""The engine's reduce_bucket_size, in elements."""
BUCKET_BYTES = 4 * BUCKET
"""The same in fp32."""
EIGHT_BIT = 2 * (1 + 4 / BLOCK)
"""Bytes of a parameter's two moments in 8-bit codes, with their scales."""
GATHERED = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (its stage3_max_live_parameters)."""


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by part."""

    weights: float
    """as the module holds them, with what ZeRO-3 gathers"""
    gradients: float
    """and the buckets they are reduced in, with the copies made there that need more than backward has set free"""
    optimizer: float
    """fp32 master weights and moments"""
    ema: float
    """the averages"""
    activations: float
    """most that is alive at once in a forward and backward pass"""
    host: float = 0.0
    """with an offloaded optimizer: its master weights, their gradients, moments and averages, in host memory"""

    @property
    def total(self) -> float:
        """Of all parts on the device."""
        return sum(getattr(self, name) for name in DEVICE_PARTS)

    def in_one_place(self) -> "Memory":
        """The same where the device is the host."""
        return replace(self, optimizer=self.optimizer + self.host, host=0.0)


DEVICE_PARTS = tuple(field.name for field in fields(Memory) if field.name != "host")
"""Names of what is on the device."""


def rank_memory(
    parameters: ParameterCount,
    activations: float,
    *,
    zero_stage: int,
    ranks: int,
    dtype: torch.dtype,
    optimizer: str,
    ema_profiles: int,
    offload: bool = False,
    overlapped: bool = False,
) -> Memory:
    """Most that one rank holds in a step of several micro batches: in the last backward pass.

    Args:
        parameters: of the module; frozen ones have weights and nothing else.
        activations: bytes, see `footprint.activation_bytes`.
        zero_stage: 0 to 3.
        ranks: that share the run.
        dtype: of the weights.
        optimizer: as in OptimConfig. Muon has a momentum, and its copy for the gradient's norm, instead of two moments:
            as many bytes.
        ema_profiles: averages kept.
        offload: whether the optimizer is in host memory.
        overlapped: whether one bucket is reduced at stage 2 while the next one fills, as the engine does on GPUs.
    """
    total = parameters.total
    bf16 = dtype == torch.bfloat16
    size = 2 if bf16 else 4
    part = total / ranks
    reducing = BUCKET_BYTES if ranks > 1 and not (bf16 and zero_stage == 1 and not offload) else 0
    bucket = min(total, BUCKET)
    copies = float(_copies_while_reducing(zero_stage, alone=ranks == 1, bf16=bf16) * bucket)
    if zero_stage == 2 and ranks > 1:
        copies += (2 if overlapped else 1) * size * BUCKET  # of its own each time
    # The first bucket is full, or all is in it, when backward has let go of as large a part of the activations.
    copies = max(0.0, copies - activations * bucket / total)
    moments = 12.0 if optimizer == "muon" and not bf16 and zero_stage == 1 else 8.0
    if optimizer == "adamw8bit":
        moments = (8 * parameters.plain + EIGHT_BIT * (total - parameters.plain)) / total
    frozen = parameters.frozen
    if zero_stage == 0:
        # No master weights of its own; rank 0 holds the averages for all.
        return Memory(4.0 * (total + frozen), 4.0 * total, moments * total, 4.0 * ema_profiles * total, activations)
    states, ema, host = (4.0 + moments) * part, 4.0 * ema_profiles * part, 0.0
    if offload:
        # The gradient that the CPU steps by; at stages 1 and 2 a copy of the part that goes back to the device.
        host = states + ema + (4.0 + (size if zero_stage < 3 else 0)) * part
        host += 4.0 * part if zero_stage == 2 and not bf16 else 0.0  # where micro batches add up
        states = ema = 0.0
    if zero_stage == 3:
        whole = parameters.small + min(total - parameters.small, GATHERED) if ranks > 1 else 0
        gathered = min(frozen, GATHERED - min(whole, GATHERED)) if ranks > 1 else 0
        weights = size * (part + whole + frozen / ranks + gathered)
        return Memory(weights, 4.0 * part + reducing + copies, states, ema, activations, host)
    if zero_stage == 2:
        gradients = copies + (0.0 if offload and not bf16 else 4.0 * part)
        return Memory(size * (total + frozen), gradients, states, ema, activations, host)
    gradients = (4.0 + 2.0) * total if bf16 and not offload else 4.0 * total
    return Memory(size * (total + frozen), gradients + reducing, states, ema, activations, host)


def _copies_while_reducing(zero_stage: int, *, alone: bool, bf16: bool) -> int:
    """Bytes for each element of a bucket that is on its way, beside what stays: gradients as autograd makes them, their
    fp32 copies, and at stage 3 what is sent and received."""
    if zero_stage == 3 and alone:
        return 14 if bf16 else 12
    if zero_stage == 2 and alone:
        return 8
    return (6 if bf16 else 4) if zero_stage >= 2 else 0
