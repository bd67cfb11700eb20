"""RMS norm and rotary embedding of queries and keys as one operation.

`norm_rope_reference` says what it computes, operation by operation, and autograd differentiates it. `norm_rope` is the
same on a CPU with a gradient written by hand: one token buffer is kept for it instead of two, and most steps work in
place; and on a GPU in Triton, where that is chosen. Otherwise, and under torch.compile, which fuses the reference's
steps itself, it is the reference.

Legend: b batch, t latent frames, s tokens of a frame, h heads, e channels of a head, n channels that are normed
together: e, or h * e where the norm is over all heads.
"""

from typing import Any

import torch
from torch import Tensor

from videodit.kernels.choice import triton_runs


def norm_rope_reference(x: Tensor, weight: Tensor, table: Tensor, eps: float = 1e-6) -> Tensor:
    """weight * x / rms(x), then each pair (x[2i], x[2i+1]) rotated by its token's angle.

    Args:
        x: (b, t, s, h, e) queries or keys.
        weight: (n,).
        table: (2, t, s, e) cos and sin, each repeated for the two channels of its pair, see `rope_table`.
        eps: added to the mean square.
    Returns:
        x's shape and dtype; computed in float32 at least.
    Source: Zhang & Sennrich (2019), arXiv:1910.07467, Eq. 4; Su et al. (2021), arXiv:2104.09864, Eq. 15.
    """
    exact = x.to(_exact(x)).reshape(*x.shape[:3], -1, weight.numel())
    normed = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + eps) * weight
    return rotate_reference(normed.view(x.shape), table).to(x.dtype)


def rotate_reference(x: Tensor, table: Tensor) -> Tensor:
    """Each pair (x[2i], x[2i+1]) of (b, t, s, h, e) rotated by its token's angle, in x's dtype."""
    cos, sin = table.to(x.dtype)[:, None, :, :, None, ::2]
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def norm_rope(x: Tensor, weight: Tensor, table: Tensor, eps: float = 1e-6) -> Tensor:
    """As `norm_rope_reference`; the faster way where there is one."""
    if triton_runs(x):
        from videodit.kernels.gpu import norm_rope as gpu

        return gpu.norm_rope(x.contiguous(), weight, table.contiguous(), eps)
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return norm_rope_reference(x, weight, table, eps)
    out: Tensor = _NormRope.apply(x, weight, table, eps)
    return out


def _exact(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _angles(table: Tensor, dtype: torch.dtype) -> Tensor:
    """(t, s, 1, e / 2) complex: one product rotates a pair, four times faster on a CPU than six of reals."""
    cos, sin = table.to(dtype)[:, :, :, None, ::2]
    return torch.complex(cos, sin)


def _pairs(x: Tensor) -> Tensor:
    return torch.view_as_complex(x.unflatten(-1, (-1, 2)))


def _scaled(exact: Tensor, rstd: Tensor, x: Tensor) -> Tensor:
    """exact * rstd, in place where exact is a copy of x and not x itself."""
    return exact * rstd if exact.dtype == x.dtype else exact.mul_(rstd)


class _NormRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, table: Tensor, eps: float) -> Tensor:
        dtype, n = _exact(x), weight.numel()
        groups = x.to(dtype).reshape(*x.shape[:3], -1, n)  # once: norm and product would convert it each
        norm = torch.linalg.vector_norm(groups, dim=-1, keepdim=True)
        rstd = norm.square_().div_(n).add_(eps).rsqrt_()
        out = _scaled(groups, rstd, x).mul_(weight)
        _pairs(out.view(x.shape)).mul_(_angles(table, dtype))
        ctx.save_for_backward(x, weight, table, rstd)
        return out.view(x.shape).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, table, rstd = ctx.saved_tensors
        n = weight.numel()
        # The rotation's inverse, then with u = x / rms and p = g u: dw = sum p, dx = (w g - u mean(w p)) / rms.
        turned = _pairs(grads[0].to(rstd.dtype).contiguous()) * _angles(table, rstd.dtype).conj()
        g = torch.view_as_real(turned).flatten(-2).view(*x.shape[:3], -1, n)
        u = _scaled(x.to(rstd.dtype).reshape(g.shape), rstd, x)
        p = g * u
        wide = weight.to(p.dtype)
        mean = (p @ wide)[..., None].div_(n)
        dx = g.mul_(wide).addcmul_(u, mean, value=-1.0).mul_(rstd)
        return dx.view(x.shape).to(x.dtype), p.sum(dim=(0, 1, 2, 3)).to(weight.dtype), None, None
