"""Rotary position embedding over the three axes of a clip.

Interleaved pairs; a head's channels are split over (t, h, w) as Wan 2.1 does: h and w get 2 * (head_dim // 6) each,
t the rest.

Source: Su et al. (2021), RoFormer, arXiv:2104.09864, Eq. 15; Wan Team (2025), arXiv:2503.20314 (the split).
"""

import torch
from torch import Tensor


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that rotate with t, h and w; each even, together head_dim."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def axis_angles(positions: Tensor, dim: int, theta: float) -> Tensor:
    """Angles position * theta^(-2i/dim): (n,) positions -> (n, dim / 2), float64."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
    return positions.double()[:, None] * frequencies[None, :]


def rope_table(num_frames: int, height: int, width: int, head_dim: int, theta: float = 10_000.0) -> Tensor:
    """cos and sin of every token's angles, each repeated for the two channels of its pair.

    Args:
        num_frames: latent frames after patchify; likewise height and width, in tokens.
        head_dim: channels of a head, even.
        theta: base of the frequencies.
    Returns:
        (2, t, s, head_dim) float32 with s = height * width; [0] is cos, [1] is sin.
    """
    sizes = (num_frames, height, width)
    angles = [axis_angles(torch.arange(size), dim, theta) for size, dim in zip(sizes, axis_dims(head_dim))]
    # Of each axis, and then spread over the tokens: a large clip's tokens would take a CPU seconds.
    t, h, w = (torch.stack([axis.cos(), axis.sin()]).float().repeat_interleave(2, dim=-1) for axis in angles)  # 2 n e
    spread = (t[:, :, None, None], h[:, None, :, None], w[:, None, None, :])
    return torch.cat([axis.expand(2, *sizes, -1) for axis in spread], dim=-1).flatten(2, 3)


def absolute_embedding(
    num_frames: int,
    height: int,
    width: int,
    dim: int,
    origin: Tensor | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Sines and cosines of each token's own (t, h, w), the channels split over the axes as RoPE splits them.

    Args:
        num_frames: latent frames after patchify; likewise height and width, in tokens.
        dim: channels, even.
        origin: (b, 2) row and column, in tokens, of the first token of each clip, where clips are crops.
        device: where to compute it; that of the origin if there is one.
    Returns:
        (t, s, dim) float32 with s = height * width; with an origin (b, t, s, dim).
    Source: Peebles & Xie (2022), DiT, arXiv:2212.09748, Sec. 3.2 (there over h and w).
    """
    corner = torch.zeros(1, 2, dtype=torch.int64, device=device) if origin is None else origin
    t, h, w = (torch.arange(size, device=corner.device) for size in (num_frames, height, width))
    angles = [
        axis_angles(places.flatten(), axis_dim, 10_000.0).unflatten(0, places.shape)
        for places, axis_dim in zip((t[None], h + corner[:, :1], w + corner[:, 1:]), axis_dims(dim))
    ]
    angles = [angles[0][:, :, None, None], angles[1][:, None, :, None], angles[2][:, None, None]]
    shape = (len(corner), num_frames, height, width, -1)
    waves = [wave(axis).float().expand(shape) for wave in (torch.cos, torch.sin) for axis in angles]
    embedded = torch.cat(waves, dim=-1).flatten(2, 3)
    return embedded[0] if origin is None else embedded


def apply_rope(x: Tensor, table: Tensor) -> Tensor:
    """Rotates each pair (x[2i], x[2i+1]) by its token's angle.

    Args:
        x: (b, t, s, heads, head_dim).
        table: (2, t, s, head_dim) from `rope_table`.
    Returns:
        x's shape and dtype; computed in float32.
    """
    # As complex numbers: one product instead of six passes, and four times faster on a CPU (docs/decisions.md).
    cos, sin = table[:, None, :, :, None, ::2]
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.complex(cos, sin)).flatten(-2).to(x.dtype)
