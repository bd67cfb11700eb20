"""Activation checkpointing of the DiT's blocks by policy: memory for a second forward pass, whole or in part.

none keeps every activation that the backward pass needs. attention keeps the outputs of matrix products and attention,
where the time goes, and computes the elementwise rest (norms, modulation, RoPE, GELU) again. full keeps a block's input
and computes all of it again, a fourth forward-sized pass in a step of three.
Source: Chen et al. (2016), arXiv:1604.06174 (full); Korthikanti et al. (2022), arXiv:2205.05198 (selective, there the
other way round: attention is what is computed again).
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

POLICIES = ("none", "attention", "full")
"""From the most memory to the least, and from the least work to the most."""
# Not mm: linear layers with a bias are addmm, except DeepSpeed's at ZeRO-3, which adds the bias to the product in
# place: kept, it would have the bias twice. There products are computed again.
_KEPT = {
    torch.ops.aten.addmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
}
_KEPT_TRITON = "videodit.temporal_attention.default"
"""By name: the operation is there only once Triton's kernels are."""


def _keep_products(_: Any, op: Any, *__: Any, **___: Any) -> CheckpointPolicy:
    kept = op in _KEPT or str(op) == _KEPT_TRITON
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def run_block(policy: str, block: nn.Module, *args: Any) -> Tensor:
    """block(*args), keeping of its activations what the policy says; the same numbers whatever it is.

    Args:
        policy: one of POLICIES.
        block: without randomness of its own.
        args: of its forward.
    """
    if policy == "none" or not torch.is_grad_enabled():
        out: Tensor = block(*args)
    elif policy == "full":
        out = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False)
    else:
        contexts = partial(create_selective_checkpoint_contexts, _keep_products)
        out = checkpoint(block, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)
    return out
