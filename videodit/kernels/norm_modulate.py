"""Layer norm and adaLN modulation as one operation.

`norm_modulate_reference` says what it computes. `norm_modulate` is the same on a CPU with a gradient written by hand,
for which it keeps the normed tokens only, where autograd keeps tokens and normed tokens; and on a GPU in Triton, where
that is chosen. Otherwise, and under torch.compile, which fuses the reference's steps itself, it is the reference.
`residual_norm_modulate` adds a branch of a block to the tokens first.

Legend: b batch, t latent frames, s tokens of a frame, d hidden size.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from videodit.kernels.choice import triton_runs


def norm_modulate_reference(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without weights, then (1 + scale) * x + shift.

    Args:
        x: (b, t, s, d) tokens, or any shape with channels last.
        shift: broadcast against x; likewise scale.
        eps: added to the variance.
    Returns:
        x's shape and dtype.
    Source: Peebles & Xie (2022), DiT, arXiv:2212.09748, Sec. 3.2.
    """
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:], eps=eps), 1.0 + scale)


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """As `norm_modulate_reference`; with less kept for the backward pass where there is a way."""
    if x.dim() == 4 and triton_runs(x):
        from videodit.kernels.gpu import norm_modulate as gpu

        return gpu.norm_modulate(x.contiguous(), shift, scale, eps)
    if x.device.type != "cpu" or torch.compiler.is_compiling() or not x.requires_grad:
        return norm_modulate_reference(x, shift, scale, eps)
    out: Tensor = _NormModulate.apply(x, shift, scale, eps)
    return out


def residual_norm_modulate_reference(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """x + gate * branch, and that normed and modulated.

    Args:
        x: (b, t, s, d) tokens.
        branch: of x's shape.
        gate: (d,) or (b, t or 1, 1, d); likewise shift and scale, which have one shape.
        eps: added to the variance.
    Returns:
        Both of x's shape and dtype.
    Source: Peebles & Xie (2022), DiT, arXiv:2212.09748, Sec. 3.2.
    """
    total = torch.addcmul(x, gate, branch)
    return total, norm_modulate_reference(total, shift, scale, eps)


def residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """As `residual_norm_modulate_reference`; in one pass over the tokens where there is a way."""
    if triton_runs(x):
        from videodit.kernels.gpu import norm_modulate as gpu

        return gpu.residual_norm_modulate(x.contiguous(), branch, gate, shift, scale, eps)
    total = torch.addcmul(x, gate, branch)
    return total, norm_modulate(total, shift, scale, eps)


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
        normed, _, rstd = torch.native_layer_norm(x, x.shape[-1:], None, None, eps)
        ctx.save_for_backward(normed, rstd, scale)
        ctx.shift_shape = shift.shape
        return torch.addcmul(shift, normed, 1.0 + scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        normed, rstd, scale = ctx.saved_tensors
        g = grads[0]
        dscale = (g * normed).sum_to_size(scale.shape)
        # The norm's gradient at what it has normed already, where mean is 0 and deviation 1, over the true deviation.
        zero, one = torch.zeros_like(rstd), torch.ones_like(rstd)
        mask = [True, False, False]
        dx = torch.ops.aten.native_layer_norm_backward(
            g * (1.0 + scale), normed, normed.shape[-1:], zero, one, None, None, mask
        )[0]
        return dx.mul_(rstd), g.sum_to_size(ctx.shift_shape), dscale, None
