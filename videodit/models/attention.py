"""Attention of the DiT over one contiguous (b t s d) token buffer that nothing rearranges.

Spatial, temporal and full attention differ only in the view that they give to scaled_dot_product_attention:

- spatial 's': batch (b t), sequence s;
- temporal 't': batch b, "heads" (s h), sequence t: the strides of (b t s h d) allow it without a copy;
- full 'f': batch b, sequence (t s).

Legend: b batch, t latent frames, s tokens of a frame, h heads, e channels of a head, l text tokens, d = h * e.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodit.kernels.short_attention import short_attention
from videodit.kernels.temporal_attention import packed, temporal_attention
from videodit.models.layers import RotaryRMSNorm
from videodit.models.rope import apply_rope
from videodit.models.token_layout import WHOLE, TokenLayout

SHORT_SEQUENCE = 128
"""Up to this length a CPU is faster with plain matrix products than with the fused kernel, see `short_attention`
(forward and backward of 5, 16 and 80 tokens: docs/decisions.md)."""
MOST_HEADS = 65_535
"""Heads that a CUDA kernel takes at once: they are an axis of its grid (pytorch/pytorch#142228)."""


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(e)) v: (b, h, n, e) queries, (b, h, l, e) keys and values -> (b, h, n, e).

    Args:
        query: of any strides; likewise key and value.
        mask: bool, broadcast against (b, h, n, l), true where a key may be seen.
    """
    if query.device.type == "meta":
        return _fused_on_meta(query, key, value, mask)
    if query.device.type != "cpu" or key.shape[-2] > SHORT_SEQUENCE:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return short_attention(query, key, value, mask)


def _fused_on_meta(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """The kernels that a GPU would choose; on meta tensors torch itself chooses the one that keeps all scores."""
    if mask is None:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value)[0]
        return out
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device)
    bias = bias.expand(*query.shape[:-1], key.shape[-2])
    out = torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]
    return out


def attend(kind: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Attention of one kind.

    Args:
        kind: 's', 't' or 'f'.
        query: (b, t, s, h, e); likewise key and value.
    Returns:
        (b, t, s, h * e).
    Raises:
        ValueError: for another kind.
    """
    b, t, s, h, e = query.shape
    if kind == "s":
        shape = (b * t, s, h, e)
    elif kind == "t":
        shape = (b, t, s * h, e)
    elif kind == "f":
        shape = (b, t * s, h, e)
    else:
        raise ValueError(f"attention kind {kind!r} is not one of s, t, f")
    query, key, value = (x.view(shape) for x in (query, key, value))
    if shape[2] <= MOST_HEADS:
        return _attend_heads(query, key, value).reshape(b, t, s, h * e)
    count = -(-shape[2] // MOST_HEADS)
    parts = [_attend_heads(*part) for part in zip(*(x.chunk(count, dim=2) for x in (query, key, value)))]
    return torch.cat(parts, dim=2).view(b, t, s, h * e)


def _attend_heads(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`attention` with the heads behind the tokens: (b, n, h, e) -> the same."""
    return attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


class QKNorm(nn.Module):
    """RMS norm of queries and keys: per head (`head`), over all heads at once as Wan does (`all`), or `none`.

    Source: Dehghani et al. (2023), ViT-22B, arXiv:2302.05442, Sec. 2.1.
    """

    def __init__(self, mode: str, num_heads: int, head_dim: int) -> None:
        super().__init__()
        self.mode = mode
        if mode != "none":
            dim = head_dim if mode == "head" else num_heads * head_dim
            self.query = RotaryRMSNorm(dim)
            self.key = RotaryRMSNorm(dim)

    def norm_query(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """(…, h, e) -> the same shape; with a table (b, t, s, h, e) are rotated too."""
        return self._normalize(getattr(self, "query", None), x, rope)

    def norm_key(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        """As `norm_query`."""
        return self._normalize(getattr(self, "key", None), x, rope)

    def attend_frames(self, query: Tensor, key: Tensor, value: Tensor, rope: Tensor) -> Tensor:
        """Temporal attention with norm and rotation in one kernel: (b, t, s, h, e) -> the same, see `packed`."""
        if self.mode == "head":
            weights = (self.query.weight, self.key.weight)
            return temporal_attention(query, key, value, *weights, rope, self.query.eps)
        if self.mode == "none":
            return temporal_attention(query, key, value, None, None, rope)
        # A program of the kernel sees one head, this norm spans all.
        query, key = self.norm_query(query, rope), self.norm_key(key, rope)
        return temporal_attention(query, key, value, None, None, None)

    def _normalize(self, norm: RotaryRMSNorm | None, x: Tensor, rope: Tensor | None) -> Tensor:
        if norm is None:
            return x if rope is None else apply_rope(x, rope)
        if rope is not None:
            return norm(x, rope)
        return norm(x) if self.mode == "head" else norm(x.flatten(-2)).view(x.shape)


class SelfAttention(nn.Module):
    """Multi-head self-attention with QK norm and 3-axis RoPE.

    Args:
        dim: hidden size d.
        num_heads: heads h.
        qk_norm: see `QKNorm`.
    """

    def __init__(self, dim: int, num_heads: int, qk_norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        # A matrix of its own: temporal attention reads (s h) as one axis, which the slices of a fused qkv are not.
        self.value = nn.Linear(dim, dim)
        self.norm = QKNorm(qk_norm, num_heads, dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, kind: str, rope: Tensor, layout: TokenLayout = WHOLE) -> Tensor:
        """(b, t, s, d) -> the same; kind as in `attend`, rope as in `apply_rope`, layout for full attention."""
        query, key, value = (
            layer(x).unflatten(-1, (self.num_heads, -1)) for layer in (self.query, self.key, self.value)
        )
        if kind == "t" and packed(query):
            return self.proj(self.norm.attend_frames(query, key, value, rope).flatten(-2))
        query, key = self.norm.norm_query(query, rope), self.norm.norm_key(key, rope)  # b t s h e
        if kind == "f":
            query, key, value = (layout.spread_heads(x) for x in (query, key, value))
            out = attend(kind, query, key, value).unflatten(-1, query.shape[-2:])
            return self.proj(layout.collect_heads(out).flatten(-2)[..., : x.shape[-1]])
        return self.proj(attend(kind, query, key, value))


class CrossAttention(nn.Module):
    """Attention of all tokens of a clip to its text; keys and values come apart, so that sampling makes them once."""

    def __init__(self, dim: int, num_heads: int, qk_norm: str) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.norm = QKNorm(qk_norm, num_heads, dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def keys_values(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, d) -> keys and values, each (b, h, l, e)."""
        key, value = (layer(text).unflatten(-1, (self.num_heads, -1)) for layer in (self.key, self.value))
        return self.norm.norm_key(key).transpose(1, 2), value.transpose(1, 2)

    def forward(self, x: Tensor, keys_values: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        """(b, t, s, d) -> the same; mask is (b, 1, 1, l) bool, true where there is text, or None for all."""
        query = self.norm.norm_query(self.query(x).flatten(1, 2).unflatten(-1, (self.num_heads, -1)))  # b (t s) h e
        key, value = keys_values
        out = attention(query.transpose(1, 2), key, value, mask)
        return self.proj(out.transpose(1, 2).reshape(x.shape))


def text_attention_mask(mask: Tensor) -> Tensor:
    """(b, l) bool -> (b, 1, 1, l), as `CrossAttention` wants it."""
    return mask[:, None, None, :].to(torch.bool)
