"""Small parts of the DiT: noise-level embedding, adaLN modulation, MLP, RMS norm.

Legend: b batch, t latent frames, s tokens of a frame, d hidden size.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodit.kernels.choice import triton_runs
from videodit.kernels.norm_modulate import norm_modulate, residual_norm_modulate
from videodit.kernels.norm_rope import norm_rope


def sinusoidal_embedding(value: Tensor, dim: int, max_period: float = 10_000.0) -> Tensor:
    """(…,) -> (…, dim): cosines, then sines, of value * max_period^(-i / (dim / 2)); float32.

    Source: Vaswani et al. (2017), arXiv:1706.03762, Sec. 3.5, in the form used by DDPM and DiT.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=value.device) / half)
    angles = value.float()[..., None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis. Source: Zhang & Sennrich (2019), arXiv:1910.07467, Eq. 4."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":  # F.rms_norm is a chain of passes there, 1.6 times slower than this one
            exact = torch.promote_types(x.dtype, torch.float32)
            mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact).square() / x.shape[-1]
            return x * torch.rsqrt(mean_square + self.eps).to(x.dtype) * self.weight
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class RotaryRMSNorm(RMSNorm):
    """RMS norm of queries or keys (b, t, s, h, e), followed by their rotary embedding, see `norm_rope`."""

    def forward(self, x: Tensor, table: Tensor | None = None) -> Tensor:
        """As `RMSNorm` without a table; its weight spans one head, or all of them."""
        if table is None:
            return super().forward(x)
        return norm_rope(x, self.weight, table, self.eps)


@dataclass
class Modulation:
    """What adaLN does to one branch of a block; each (b, t, 1, d), broadcast over the tokens of a frame."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


def modulate(x: Tensor, modulation: Modulation, eps: float = 1e-6) -> Tensor:
    """Layer norm without weights, then (1 + scale) * x + shift: (b, t, s, d) -> the same, see `norm_modulate`."""
    return norm_modulate(x, modulation.shift, modulation.scale, eps)


def add_and_norm(
    x: Tensor, branch: Tensor, gate: Tensor | None, norm: nn.LayerNorm | Modulation
) -> tuple[Tensor, Tensor]:
    """Adds a branch of a block to the tokens, and norms the sum for the next branch, in one pass where there is a way.

    Args:
        x: (b, t, s, d) tokens.
        branch: of x's shape.
        gate: (b, t or 1, 1, d) factor of the branch, or None for one.
        norm: with weights of its own, or modulated as `modulate` does.
    Returns:
        x + gate * branch, and that normed; each of x's shape.
    """
    if isinstance(norm, Modulation) and gate is not None:
        return residual_norm_modulate(x, branch, gate, norm.shift, norm.scale)
    if triton_runs(x):
        gate = x.new_ones(x.shape[-1]) if gate is None else gate
        if isinstance(norm, Modulation):
            return residual_norm_modulate(x, branch, gate, norm.shift, norm.scale)
        scale = norm.weight.float() - 1.0  # in bf16 a small weight would be lost in the difference
        return residual_norm_modulate(x, branch, gate, norm.bias, scale, norm.eps)
    x = x + branch if gate is None else torch.addcmul(x, gate, branch)
    return x, modulate(x, norm) if isinstance(norm, Modulation) else norm(x)


class FinalBias(nn.Module):
    """Shift and scale of the last norm without a layer of their own: the noise-level embedding plus a bias each.

    Args:
        dim: hidden size d.
    Source: Wan Team (2025), arXiv:2503.20314 (its published code).
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(2, dim))

    def forward(self, embedding: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, 2 d): shift, then scale."""
        return (embedding[..., None, :] + self.bias).flatten(-2)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}
"""GELU x Phi(x) itself, or its tanh form (no further than 5e-4 from it), which DiT and Wan were trained with."""


class MLP(nn.Module):
    """Linear, GELU, linear.

    Args:
        dim: of the input.
        hidden_dim: between the two.
        out_dim: of the output, dim if None.
        activation: a key of ACTIVATIONS.
    Source: Hendrycks & Gimpel (2016), arXiv:1606.08415, Sec. 2 (GELU and its tanh form).
    """

    def __init__(self, dim: int, hidden_dim: int, out_dim: int | None = None, *, activation: str = "gelu_tanh") -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, out_dim or dim)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))
