"""Attention over short sequences on a CPU, as one operation.

`short_attention_reference` says what it computes. In float32 `short_attention` is the same without copies of queries,
keys and values, which `matmul` over heads and clips at once makes: products take the strides as they are, a head or a
clip at a time, and their gradient is written by hand. Without a gradient it is the fused kernel, which copies nothing;
its own gradient is slow below some 128 tokens. In bfloat16, where both are slower (docs/performance.md), and under
torch.compile, it is the reference.

Legend: b batch, h heads, n queries, l keys, e channels of a head.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def short_attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(e)) v.

    Args:
        query: (b, h, n, e), of any strides.
        key: (b, h, l, e); likewise value.
        mask: bool, broadcast against (b, h, n, l), true where a key may be seen.
    Returns:
        (b, h, n, e).
    Source: Vaswani et al. (2017), arXiv:1706.03762, Eq. 1.
    """
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return torch.softmax(scores, dim=-1) @ value


def short_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `short_attention_reference`; without copies of token buffers where that is faster."""
    if torch.compiler.is_compiling() or query.dtype not in (torch.float32, torch.float64):
        return short_attention_reference(query, key, value, mask)
    if not torch.is_grad_enabled():
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    out: Tensor = _ShortAttention.apply(query, key, value, mask)
    return out


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        ctx.axis = 0 if query.shape[0] < query.shape[1] else 1  # the one that is looped over
        q, k, v = (x.unbind(ctx.axis) for x in (query, key, value))
        zero, scale = query.new_zeros(1, 1, 1), query.shape[-1] ** -0.5
        # Products by themselves, not into a whole: selective checkpointing keeps what these operations return.
        scores = [torch.baddbmm(zero, q_i, k_i.mT, beta=0, alpha=scale) for q_i, k_i in zip(q, k)]
        if mask is not None:
            masks = (~mask).expand(*query.shape[:-1], key.shape[-2]).unbind(ctx.axis)
            scores = [part.masked_fill(mask_i, -torch.inf) for part, mask_i in zip(scores, masks)]
        weights = [torch.softmax(part, dim=-1) for part in scores]
        parts = [torch.bmm(w_i, v_i) for w_i, v_i in zip(weights, v)]
        ctx.save_for_backward(query, key, value, *weights)
        # Heads last in memory, as the layer after attention takes them.
        out = torch.stack(parts, dim=2) if ctx.axis else torch.stack([part.transpose(0, 1) for part in parts])
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *weights = ctx.saved_tensors
        q, k, v, g = (x.unbind(ctx.axis) for x in (query, key, value, grads[0]))
        dq, dk, dv = (x[0].new_empty(len(x), *x[0].shape) for x in (q, k, v))
        scale = query.shape[-1] ** -0.5
        for i, w in enumerate(weights):
            torch.bmm(w.mT, g[i], out=dv[i])
            dscores = torch._softmax_backward_data(torch.bmm(g[i], v[i].mT), w, -1, w.dtype)
            torch.baddbmm(dq[i], dscores, k[i], beta=0, alpha=scale, out=dq[i])
            torch.baddbmm(dk[i], dscores.mT, q[i], beta=0, alpha=scale, out=dk[i])
        return dq.movedim(0, ctx.axis), dk.movedim(0, ctx.axis), dv.movedim(0, ctx.axis), None
