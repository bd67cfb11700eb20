"""Attention over the frames of every position, with QK norm and rotary embedding inside, in Triton.

`videodit.kernels.temporal_attention` says what is computed. A sequence is t frames long, which is too short for a
kernel that takes one sequence at a time: a program takes as many positions as fill its tile and keeps each to its own
frames with a mask. Queries, keys and values are read where they lie, (b, t, s, h, e), once; forward writes one buffer,
backward reads four and writes three and keeps nothing but its inputs: rows are so short that scores are computed again.

Legend: b batch, t latent frames, s tokens of a frame, h heads, e channels of a head.
"""

from typing import Any

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from videodit.kernels.choice import interpreted
from videodit.kernels.gpu.temporal_programs import backward as _backward
from videodit.kernels.gpu.temporal_programs import forward as _forward
from videodit.kernels.temporal_attention import LONGEST

ROWS = 64
"""Most rows of a program's tile, positions x frames, but for sequences that are longer."""
TILE = 2048
"""Rows x pairs of channels that four warps keep in registers in the backward pass: of twice as many, ptxas spills 1 to
2 kB a thread, of these at most 24 bytes (tests/kernels/test_gpu_code.py)."""


def _sizes(query: Tensor, norm: bool, rotate: bool) -> tuple[int, dict[str, Any]]:
    """How many programs, and their constants."""
    b, t, s, h, e = query.shape
    t_pad = triton.next_power_of_2(t)
    pad = max(16, triton.next_power_of_2(e // 2))  # a matrix product wants at least 16 channels, and 16 rows
    rows = max(16, t_pad, min(ROWS, TILE // pad))
    positions = rows // t_pad
    constants = {
        "NORM": norm,
        "ROTATE": rotate,
        "UPCAST": interpreted(),
        "T": t,
        "T_PAD": t_pad,
        "POSITIONS": positions,
        "S": s,
    }
    constants |= {"HEADS": h, "PAIRS": e // 2, "PAD": pad, "num_warps": 4 if rows * pad <= TILE else 8}
    return b * triton.cdiv(s, positions) * h, constants


def _check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    table: Tensor | None,
) -> None:
    b, t, s, h, e = query.shape
    if t > LONGEST or e % 2:
        raise ValueError(f"temporal_attention: {t} frames of {e} channels; up to {LONGEST}, and even channels")
    if not (query.shape == key.shape == value.shape and query.dtype == key.dtype == value.dtype):
        raise ValueError("temporal_attention: query, key and value differ in shape or dtype")
    if not (query.is_contiguous() and key.is_contiguous() and value.is_contiguous()):
        raise ValueError("temporal_attention: query, key and value must be contiguous")
    if any(weight is not None and weight.shape != (e,) for weight in (query_weight, key_weight)):
        raise ValueError(f"temporal_attention: the norm's weights must have {e} channels, one head's")
    if table is not None and (table.shape != (2, t, s, e) or table.dtype != torch.float32 or not table.is_contiguous()):
        raise ValueError(f"temporal_attention: table {tuple(table.shape)} for queries {tuple(query.shape)}")


@torch.library.custom_op("videodit::temporal_attention", mutates_args=())
def temporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    table: Tensor | None,
    eps: float,
) -> Tensor:
    """As `temporal_attention_reference`, for contiguous tensors and up to LONGEST frames.

    Raises:
        ValueError: for other tensors.
    """
    _check(query, key, value, query_weight, key_weight, table)
    out = torch.empty_like(query)
    programs, constants = _sizes(query, query_weight is not None, table is not None)
    absent = query  # stands for a pointer that is not read
    with torch.cuda.device_of(query):  # Triton launches on the current one
        _forward[(programs,)](
            query,
            key,
            value,
            absent if query_weight is None else query_weight,
            absent if key_weight is None else key_weight,
            absent if table is None else table,
            out,
            query.shape[-1] ** -0.5,
            eps,
            **constants,
        )
    return out


@temporal_attention.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    table: Tensor | None,
    eps: float,
) -> Tensor:
    return torch.empty_like(query)


@torch.library.custom_op("videodit::temporal_attention_backward", mutates_args=())
def temporal_attention_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    table: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and of both weights, (2, e) float32."""
    dquery, dkey, dvalue = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    programs, constants = _sizes(query, query_weight is not None, table is not None)
    e = query.shape[-1]
    parts = query.new_zeros((programs if query_weight is not None else 1, 2, e), dtype=torch.float32)
    absent = query
    with torch.cuda.device_of(query):  # Triton launches on the current one
        _backward[(programs,)](
            query,
            key,
            value,
            absent if query_weight is None else query_weight,
            absent if key_weight is None else key_weight,
            absent if table is None else table,
            grad.contiguous(),
            dquery,
            dkey,
            dvalue,
            parts,
            e**-0.5,
            eps,
            **constants,
        )
    return dquery, dkey, dvalue, parts.sum(dim=0)


@temporal_attention_backward.register_fake
def _(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    table: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = query.new_empty((2, query.shape[-1]), dtype=torch.float32)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), weights


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, query_weight, key_weight, table = ctx.saved_tensors
    dquery, dkey, dvalue, weights = temporal_attention_backward(
        grad, *tensors, query_weight, key_weight, table, ctx.eps
    )
    if query_weight is None:
        return dquery, dkey, dvalue, None, None, None, None
    return dquery, dkey, dvalue, weights[0].to(query_weight.dtype), weights[1].to(key_weight.dtype), None, None


temporal_attention.register_autograd(_differentiate, setup_context=_setup)


@register_flop_formula(torch.ops.videodit.temporal_attention)
def _forward_flops(query_shape: Any, *_: Any, **__: Any) -> int:
    """Two products of (t, e) with (t, e) a position and head; padding of the tiles is not counted."""
    b, t, s, h, e = query_shape
    return 4 * b * s * h * t * t * e


@register_flop_formula(torch.ops.videodit.temporal_attention_backward)
def _backward_flops(grad_shape: Any, *_: Any, **__: Any) -> int:
    """Five products, the scores computed again among them, as torch counts its own kernels."""
    b, t, s, h, e = grad_shape
    return 10 * b * s * h * t * t * e
