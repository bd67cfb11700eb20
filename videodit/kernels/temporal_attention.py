"""Attention over the frames of every position, with QK norm and rotary embedding, as one operation on a GPU.

`temporal_attention_reference` says what is computed. `packed` says whether Triton's kernel is to be used, `gpu` has it:
the DiT takes its own steps otherwise, which are those of the reference.

Legend: b batch, t latent frames, s tokens of a frame, h heads, e channels of a head.
"""

import torch
from torch import Tensor

from videodit.kernels.choice import triton_runs
from videodit.kernels.norm_rope import norm_rope_reference, rotate_reference

LONGEST = 64
"""Frames up to which the kernel takes a sequence; longer ones fill a kernel for one sequence at a time."""


def temporal_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    table: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """softmax(q k^T / sqrt(e)) v over the t tokens of each of s positions, q and k normed per head and rotated.

    Args:
        query: (b, t, s, h, e); likewise key and value.
        query_weight: (e,) of the RMS norm, or None for no norm; likewise key_weight.
        table: (2, t, s, e) cos and sin, see `rope_table`; or None, then nothing is normed or rotated.
        eps: added to the mean square.
    Returns:
        (b, t, s, h, e).
    Source: Vaswani et al. (2017), arXiv:1706.03762, Eq. 1; for norm and rotation see `norm_rope_reference`.
    """
    if table is not None and query_weight is not None and key_weight is not None:
        query = norm_rope_reference(query, query_weight, table, eps)
        key = norm_rope_reference(key, key_weight, table, eps)
    elif table is not None:
        query, key = rotate_reference(query, table), rotate_reference(key, table)
    scores = torch.einsum("btshe,bushe->bshtu", query, key) * query.shape[-1] ** -0.5
    return torch.einsum("bshtu,bushe->btshe", torch.softmax(scores, dim=-1), value)


def packed(query: Tensor) -> bool:
    """Whether the kernel is chosen and can take these queries (b, t, s, h, e)."""
    return query.shape[1] <= LONGEST and triton_runs(query)


def temporal_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_weight: Tensor | None,
    key_weight: Tensor | None,
    table: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """As `temporal_attention_reference`, by the kernel; only where `packed` says so."""
    from videodit.kernels.gpu import temporal_attention as gpu

    query, key, value = (x.contiguous() for x in (query, key, value))
    table = None if table is None else table.contiguous()
    return gpu.temporal_attention(query, key, value, query_weight, key_weight, table, eps)
