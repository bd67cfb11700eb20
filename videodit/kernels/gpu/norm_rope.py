"""RMS norm and rotary embedding of queries or keys in one pass over them, in Triton.

`videodit.kernels.norm_rope` says what is computed. Forward reads a token buffer and writes one; backward reads two and
writes one, and keeps none but the input: the norm is computed again from it.

Legend: b batch, t latent frames, s tokens of a frame, h heads, e channels of a head, n channels normed together.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Tokens of one program of the backward pass, whose share of the weight's gradient is summed before it is written."""


@triton.jit
def _places(HEADS: tl.constexpr, PAIRS: tl.constexpr, HEADS_PAD: tl.constexpr, PAIRS_PAD: tl.constexpr):
    """Offsets of a token's channels as (heads, pairs, 2), and which of them are not padding."""
    head = tl.arange(0, HEADS_PAD)[:, None, None]
    pair = tl.arange(0, PAIRS_PAD)[None, :, None]
    side = tl.arange(0, 2)[None, None, :]
    return head * (2 * PAIRS) + 2 * pair + side, (head < HEADS) & (pair < PAIRS) & (side < 2)


@triton.jit
def _weights(
    weight_ptr,
    ALL_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    PAIRS_PAD: tl.constexpr,
):
    """The norm's weight over (heads or 1, pairs, 2), in float32."""
    if ALL_HEADS:
        places, inside = _places(HEADS, PAIRS, HEADS_PAD, PAIRS_PAD)
    else:
        places, inside = _places(1, PAIRS, 1, PAIRS_PAD)
    return tl.load(weight_ptr + places, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _angles(table_ptr, token, frame_tokens, PAIRS: tl.constexpr, PAIRS_PAD: tl.constexpr):
    """cos and sin of a token's pairs, each (1, pairs)."""
    pair = tl.arange(0, PAIRS_PAD)[None, :]
    place = (token % frame_tokens) * (2 * PAIRS) + 2 * pair
    cos = tl.load(table_ptr + place, mask=pair < PAIRS, other=0.0)
    sin = tl.load(table_ptr + frame_tokens * (2 * PAIRS) + place, mask=pair < PAIRS, other=0.0)
    return cos, sin


@triton.jit
def _group_mean(x, ALL_HEADS: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr):
    """Mean over the channels that are normed together: (heads, pairs, 2) -> (heads or 1, 1, 1)."""
    total = tl.sum(tl.sum(x, axis=2, keep_dims=True), axis=1, keep_dims=True) / (2 * PAIRS)
    if ALL_HEADS:
        total = tl.sum(total, axis=0, keep_dims=True) / HEADS
    return total


@triton.jit
def _forward(
    x_ptr,
    weight_ptr,
    table_ptr,
    out_ptr,
    frame_tokens,
    eps,
    ALL_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    PAIRS_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    places, inside = _places(HEADS, PAIRS, HEADS_PAD, PAIRS_PAD)
    weight = _weights(weight_ptr, ALL_HEADS, HEADS, PAIRS, HEADS_PAD, PAIRS_PAD)
    cos, sin = _angles(table_ptr, token, frame_tokens, PAIRS, PAIRS_PAD)
    start = token * (2 * HEADS * PAIRS)
    x = tl.load(x_ptr + start + places, mask=inside, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(_group_mean(x * x, ALL_HEADS, HEADS, PAIRS) + eps) * weight
    even, odd = tl.split(normed)
    out = tl.join(even * cos - odd * sin, even * sin + odd * cos)
    tl.store(out_ptr + start + places, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    x_ptr,
    weight_ptr,
    table_ptr,
    grad_ptr,
    dx_ptr,
    dweight_ptr,
    tokens,
    frame_tokens,
    eps,
    ROWS: tl.constexpr,
    ALL_HEADS: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    HEADS_PAD: tl.constexpr,
    PAIRS_PAD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    places, channel = _places(HEADS, PAIRS, HEADS_PAD, PAIRS_PAD)
    weight = _weights(weight_ptr, ALL_HEADS, HEADS, PAIRS, HEADS_PAD, PAIRS_PAD)
    dweight = tl.zeros([HEADS_PAD, PAIRS_PAD, 2], tl.float32)
    left = (tokens - program * ROWS) * (2 * HEADS * PAIRS)  # channels from here on, in 64 bits
    for row in range(ROWS):
        token = program * ROWS + row
        start = token * (2 * HEADS * PAIRS)
        inside = channel & (row * (2 * HEADS * PAIRS) + places < left)
        cos, sin = _angles(table_ptr, token, frame_tokens, PAIRS, PAIRS_PAD)
        x = tl.load(x_ptr + start + places, mask=inside, other=0.0).to(tl.float32)
        even, odd = tl.split(tl.load(grad_ptr + start + places, mask=inside, other=0.0).to(tl.float32))
        g = tl.join(even * cos + odd * sin, odd * cos - even * sin)
        # With u = x / rms and p = g u: dw = sum p, dx = (w g - u mean(w p)) / rms.
        rstd = tl.rsqrt(_group_mean(x * x, ALL_HEADS, HEADS, PAIRS) + eps)
        u = x * rstd
        p = g * u
        dweight += p
        dx = (g * weight - u * _group_mean(p * weight, ALL_HEADS, HEADS, PAIRS)) * rstd
        tl.store(dx_ptr + start + places, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + program * (2 * HEADS * PAIRS) + places, dweight, mask=channel)


def _sizes(x: Tensor, weight: Tensor) -> dict[str, Any]:
    heads, channels = x.shape[-2:]
    pads = {"HEADS_PAD": triton.next_power_of_2(heads), "PAIRS_PAD": triton.next_power_of_2(channels // 2)}
    # Some 16 channels a thread.
    warps = max(1, min(16, 2 * pads["HEADS_PAD"] * pads["PAIRS_PAD"] // 512))
    return {"ALL_HEADS": weight.numel() != channels, "HEADS": heads, "PAIRS": channels // 2, **pads, "num_warps": warps}


@torch.library.custom_op("videodit::norm_rope", mutates_args=())
def norm_rope(x: Tensor, weight: Tensor, table: Tensor, eps: float) -> Tensor:
    """As `norm_rope_reference`: (b, t, s, h, e), (n,), (2, t, s, e) float32 -> x's shape and dtype.

    Raises:
        ValueError: if x is not contiguous or a shape does not fit.
    """
    _check(x, weight, table)
    out = torch.empty_like(x)
    frame_tokens = x.shape[1] * x.shape[2]
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _forward[(x.shape[0] * frame_tokens,)](x, weight, table, out, frame_tokens, eps, **_sizes(x, weight))
    return out


@norm_rope.register_fake
def _(x: Tensor, weight: Tensor, table: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("videodit::norm_rope_backward", mutates_args=())
def norm_rope_backward(grad: Tensor, x: Tensor, weight: Tensor, table: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the weight, each in its dtype."""
    grad = grad.contiguous()
    tokens, frame_tokens = x.shape[0] * x.shape[1] * x.shape[2], x.shape[1] * x.shape[2]
    programs = triton.cdiv(tokens, ROWS)
    dx = torch.empty_like(x)
    parts = x.new_empty((programs, *x.shape[-2:]), dtype=torch.float32)
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _backward[(programs,)](
            x, weight, table, grad, dx, parts, tokens, frame_tokens, eps, ROWS=ROWS, **_sizes(x, weight)
        )
    dweight = parts.sum(dim=0).view(-1, weight.numel()).sum(dim=0)
    return dx, dweight.to(weight.dtype)


@norm_rope_backward.register_fake
def _(grad: Tensor, x: Tensor, weight: Tensor, table: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _check(x: Tensor, weight: Tensor, table: Tensor) -> None:
    b, t, s, h, e = x.shape
    if not x.is_contiguous() or not table.is_contiguous():
        raise ValueError("norm_rope: x and table must be contiguous")
    if table.shape != (2, t, s, e) or table.dtype != torch.float32 or weight.numel() not in (e, h * e):
        raise ValueError(
            f"norm_rope: table {tuple(table.shape)} or weight {tuple(weight.shape)} for x {tuple(x.shape)}"
        )


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, float], output: Tensor) -> None:
    x, weight, table, ctx.eps = inputs
    ctx.save_for_backward(x, weight, table)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
    dx, dweight = norm_rope_backward(grad, *ctx.saved_tensors, ctx.eps)
    return dx, dweight, None, None


norm_rope.register_autograd(_differentiate, setup_context=_setup)
