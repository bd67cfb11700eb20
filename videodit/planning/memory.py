"""Bytes that training keeps on each rank, by part, for every ZeRO stage.

The bytes per parameter are what DeepSpeed 0.19.8 holds in our engine: tensors counted at every stage, in fp32 and bf16,
on one rank and on two (`memory_as_planned` in tests/training/distributed_cases.py), not what its papers say.
"""

from dataclasses import dataclass, fields

import torch

from videodit.planning.footprint import ParameterCount
from videodit.training.blockwise import BLOCK

BUCKET_BYTES = 4 * 50_000_000
"""The engine's reduce_bucket_size, in fp32."""
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
    """and the buckets they are reduced in"""
    optimizer: float
    """fp32 master weights and moments"""
    ema: float
    """the averages"""
    activations: float
    """most that is alive at once in a forward and backward pass"""

    @property
    def total(self) -> float:
        """Of all parts."""
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(
    parameters: ParameterCount,
    activations: float,
    *,
    zero_stage: int,
    ranks: int,
    dtype: torch.dtype,
    optimizer: str,
    ema_profiles: int,
) -> Memory:
    """What one rank holds between the backward pass and the optimizer step.

    Args:
        parameters: of the module; frozen ones have weights and nothing else.
        activations: bytes, see `footprint.activation_bytes`.
        zero_stage: 0 to 3.
        ranks: that share the run.
        dtype: of the weights.
        optimizer: as in OptimConfig. Muon has a momentum, and its copy for the gradient's norm, instead of two moments:
            as many bytes.
        ema_profiles: averages kept.
    """
    total = parameters.total
    bf16 = dtype == torch.bfloat16
    size = 2 if bf16 else 4
    part = total / ranks
    reducing = BUCKET_BYTES if ranks > 1 else 0
    moments = 12.0 if optimizer == "muon" and not bf16 and zero_stage == 1 else 8.0
    if optimizer == "adamw8bit":
        moments = (8 * parameters.plain + EIGHT_BIT * (total - parameters.plain)) / total
    frozen = parameters.frozen
    if zero_stage == 0:
        # No master weights of its own; rank 0 holds the averages for all.
        return Memory(4.0 * (total + frozen), 4.0 * total, moments * total, 4.0 * ema_profiles * total, activations)
    states, ema = (4.0 + moments) * part, 4.0 * ema_profiles * part
    if zero_stage == 3:
        whole = parameters.small + min(total - parameters.small, GATHERED) if ranks > 1 else 0
        gathered = min(frozen, GATHERED - min(whole, GATHERED)) if ranks > 1 else 0
        weights = size * (part + whole + frozen / ranks + gathered)
        return Memory(weights, 4.0 * part + reducing, states, ema, activations)
    if zero_stage == 2:
        return Memory(size * (total + frozen), 4.0 * part, states, ema, activations)
    gradients = (4.0 + 2.0) * total if bf16 else 4.0 * total
    return Memory(size * (total + frozen), gradients + reducing, states, ema, activations)
