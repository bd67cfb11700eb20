"""Residual sum, layer norm and modulation in one pass over the tokens, in Triton.

`videodit.kernels.norm_modulate` says what is computed. With a branch, forward reads two token buffers (the tokens, and
what a branch adds to them) and writes two (the sum, and its modulated norm); backward reads four and writes two.
Without, one and one, two and one. Sum and norm are computed in float32 and the sum is rounded before it is normed, so
that backward, which norms it again, sees the same numbers.

Legend: b batch, t latent frames, s tokens of a frame, d hidden size. A row is one vector of d channels.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 8
"""Tokens of one program of the backward pass, whose share of the modulation's gradients is summed before it is
written."""


@triton.jit
def _row(ptr, row, channel, D: tl.constexpr):
    return tl.load(ptr + row * D + channel, mask=channel < D, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    sum_ptr,
    out_ptr,
    gate_span,
    span,
    eps,
    BRANCH: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.arange(0, D_PAD)
    inside = channel < D
    x = _row(x_ptr, token, channel, D)
    if BRANCH:
        x += _row(gate_ptr, token // gate_span, channel, D) * _row(branch_ptr, token, channel, D)
        stored = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + token * D + channel, stored, mask=inside)
        x = stored.to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
    row = token // span
    out = normed * (1.0 + _row(scale_ptr, row, channel, D)) + _row(shift_ptr, row, channel, D)
    tl.store(out_ptr + token * D + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward(
    sum_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    dsum_ptr,
    dout_ptr,
    dx_ptr,
    dbranch_ptr,
    parts_ptr,
    unit,
    gate_span,
    span,
    chunks,
    eps,
    ROWS: tl.constexpr,
    BRANCH: tl.constexpr,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    first = (program % chunks) * ROWS  # of the tokens of this unit
    start = (program // chunks) * unit
    channel = tl.arange(0, D_PAD)
    inside = channel < D
    factor = 1.0 + _row(scale_ptr, start // span, channel, D)
    dshift = tl.zeros([D_PAD], tl.float32)
    dscale = tl.zeros([D_PAD], tl.float32)
    dgate = tl.zeros([D_PAD], tl.float32)
    for row in range(ROWS):
        token = start + first + row
        places = token * D + channel
        valid = inside & (places < (start + unit) * D)  # start has 64 bits
        x = tl.load(sum_ptr + places, mask=valid, other=0.0).to(tl.float32)
        g = tl.load(dout_ptr + places, mask=valid, other=0.0).to(tl.float32)
        centred = tl.where(inside, x - tl.sum(x, axis=0) / D, 0.0)
        rstd = tl.rsqrt(tl.sum(centred * centred, axis=0) / D + eps)
        normed = centred * rstd
        dshift += g
        dscale += g * normed
        g *= factor
        mean = tl.sum(g, axis=0) / D
        dx = (g - mean - normed * (tl.sum(g * normed, axis=0) / D)) * rstd
        if BRANCH:
            dx += tl.load(dsum_ptr + places, mask=valid, other=0.0).to(tl.float32)
            branch = tl.load(branch_ptr + places, mask=valid, other=0.0).to(tl.float32)
            dgate += dx * branch
            dbranch = dx * _row(gate_ptr, start // gate_span, channel, D)
            tl.store(dbranch_ptr + places, dbranch.to(dbranch_ptr.dtype.element_ty), mask=valid)
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=valid)
    parts = parts_ptr + program * 3 * D + channel
    tl.store(parts, dshift, mask=inside)
    tl.store(parts + D, dscale, mask=inside)
    if BRANCH:
        tl.store(parts + 2 * D, dgate, mask=inside)


def _span(x: Tensor, modulation: Tensor) -> int:
    """How many tokens, one after another, share a row of a modulation.

    Raises:
        ValueError: unless it is of shape (d,) or (b, t or 1, 1, d).
    """
    b, t, s, d = x.shape
    spans = {(b, t, 1, d): s, (b, 1, 1, d): t * s, (d,): b * t * s}
    if tuple(modulation.shape) not in spans:
        raise ValueError(f"norm_modulate: a modulation of shape {tuple(modulation.shape)} for tokens {tuple(x.shape)}")
    return spans[tuple(modulation.shape)]


def _sizes(d: int) -> dict[str, int]:
    pad = triton.next_power_of_2(d)
    return {"D": d, "D_PAD": pad, "num_warps": max(1, min(16, pad // 256))}


def _launch_forward(
    x: Tensor, branch: Tensor | None, gate: Tensor | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    if not x.is_contiguous():
        raise ValueError("norm_modulate: x must be contiguous")
    shift, scale = shift.contiguous(), scale.contiguous()
    total, out = torch.empty_like(x) if branch is not None else x, torch.empty_like(x)
    gate_span = 1 if gate is None else _span(x, gate)
    if _span(x, shift) != _span(x, scale):
        raise ValueError(f"norm_modulate: shift {tuple(shift.shape)} and scale {tuple(scale.shape)} differ in shape")
    b, t, s, d = x.shape
    with torch.cuda.device_of(x):  # Triton launches on the current one
        _forward[(b * t * s,)](
            x,
            x if branch is None else branch.contiguous(),
            x if gate is None else gate.contiguous(),
            shift,
            scale,
            total,
            out,
            gate_span,
            _span(x, shift),
            eps,
            BRANCH=branch is not None,
            **_sizes(d),
        )
    return total, out


def _launch_backward(
    dsum: Tensor | None,
    dout: Tensor,
    total: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    b, t, s, d = total.shape
    span = _span(total, scale)
    gate_span = span if gate is None else _span(total, gate)
    unit = min(span, gate_span)  # tokens that share every modulation
    chunks = triton.cdiv(unit, ROWS)
    units = b * t * s // unit
    parts = total.new_zeros((units, chunks, 3, d), dtype=torch.float32)
    dx = torch.empty_like(total)
    dbranch = torch.empty_like(total) if branch is not None else dx
    with torch.cuda.device_of(total):  # Triton launches on the current one
        _backward[(units * chunks,)](
            total,
            total if branch is None else branch.contiguous(),
            total if gate is None else gate.contiguous(),
            scale.contiguous(),
            total if dsum is None else dsum.contiguous(),
            dout.contiguous(),
            dx,
            dbranch,
            parts,
            unit,
            gate_span,
            span,
            chunks,
            eps,
            ROWS=ROWS,
            BRANCH=branch is not None,
            **_sizes(d),
        )
    sums = parts.sum(dim=1)  # units, 3, d

    def collect(index: int, modulation: Tensor) -> Tensor:
        rows = modulation.numel() // d
        return sums[:, index].view(rows, -1, d).sum(dim=1).view(modulation.shape).to(modulation.dtype)

    dgate = dx if gate is None else collect(2, gate)
    return dx, dbranch, dgate, collect(0, shift), collect(1, scale)


@torch.library.custom_op("videodit::norm_modulate", mutates_args=())
def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """As `norm_modulate_reference`, for x (b, t, s, d) contiguous and modulations (d,) or (b, t or 1, 1, d).

    Raises:
        ValueError: for other shapes or strides.
    """
    return _launch_forward(x, None, None, shift, scale, eps)[1]


@norm_modulate.register_fake
def _(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("videodit::norm_modulate_backward", mutates_args=())
def norm_modulate_backward(
    dout: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, shift and scale."""
    dx, _, _, dshift, dscale = _launch_backward(None, dout, x, None, None, shift, scale, eps)
    return dx, dshift, dscale


@norm_modulate_backward.register_fake
def _(dout: Tensor, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(shift), torch.empty_like(scale)


@torch.library.custom_op("videodit::residual_norm_modulate", mutates_args=())
def residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """As `residual_norm_modulate_reference`, under the conditions of `norm_modulate`, which hold for the gate too."""
    return _launch_forward(x, branch, gate, shift, scale, eps)


@residual_norm_modulate.register_fake
def _(x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.custom_op("videodit::residual_norm_modulate_backward", mutates_args=())
def residual_norm_modulate_backward(
    dsum: Tensor,
    dout: Tensor,
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, branch, gate, shift and scale."""
    return _launch_backward(dsum, dout, total, branch, gate, shift, scale, eps)


@residual_norm_modulate_backward.register_fake
def _(
    dsum: Tensor,
    dout: Tensor,
    total: Tensor,
    branch: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(total),
        torch.empty_like(branch),
        torch.empty_like(gate),
        torch.empty_like(shift),
        torch.empty_like(scale),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*norm_modulate_backward(dout, *ctx.saved_tensors, ctx.eps), None)


def _setup_residual(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, *tensors, ctx.eps = inputs
    ctx.save_for_backward(output[0], *tensors)


def _differentiate_residual(ctx: Any, dsum: Tensor, dout: Tensor) -> tuple[Tensor | None, ...]:
    return (*residual_norm_modulate_backward(dsum, dout, *ctx.saved_tensors, ctx.eps), None)


norm_modulate.register_autograd(_differentiate, setup_context=_setup)
residual_norm_modulate.register_autograd(_differentiate_residual, setup_context=_setup_residual)
