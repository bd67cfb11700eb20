"""Activation checkpointing: the same numbers, whatever is kept."""

import pytest
import torch
from torch import Tensor

from tests.models.tiny import tiny_dit
from videodit.models.checkpointing import POLICIES


def gradients(policy: str, **changes) -> tuple[Tensor, list[Tensor]]:
    model = tiny_dit(**changes).train()
    model.checkpointing = policy
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 4, 3, 4, 4, generator=generator)
    text, mask = torch.randn(2, 5, 12, generator=generator), torch.ones(2, 5, dtype=torch.bool)
    out = model(latents, torch.tensor([0.2, 0.9]), text, mask)
    (out * latents).sum().backward()
    return out.detach(), [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("policy", POLICIES[1:])
@pytest.mark.parametrize("changes", [{}, {"pattern": "f"}, {"local_width": 8, "qk_norm": "all"}])
def test_outputs_and_gradients_are_the_same_bits(policy: str, changes: dict) -> None:
    assert computes_the_same(policy, changes)


def computes_the_same(policy: str, changes: dict) -> bool:
    """Whether output and gradients are, bit for bit, those that come with everything kept."""
    expected, plain = gradients("none", **changes)
    out, again = gradients(policy, **changes)
    same = [torch.equal(a, b) for a, b in zip([out, *again], [expected, *plain], strict=True)]
    return all(same)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_gradients_are_right_with_deepspeeds_linear_layers(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At ZeRO-3 DeepSpeed replaces F.linear by one that adds the bias in place."""
    zero3 = pytest.importorskip("deepspeed.runtime.zero.linear")
    monkeypatch.setattr(torch.nn.functional, "linear", zero3.zero3_linear_wrap)
    assert computes_the_same(policy, {})


@pytest.mark.parametrize(("policy", "runs"), [("none", 1), ("attention", 2), ("full", 2)])
def test_a_block_runs_again_in_the_backward_pass_only(policy: str, runs: int) -> None:
    model = tiny_dit().train()
    model.checkpointing = policy
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda *_: seen.append(1))
    args = (torch.randn(1, 4, 3, 4, 4), torch.tensor([0.5]), torch.randn(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
    with torch.no_grad():
        model(*args)
    assert len(seen) == len(model.blocks)
    model(*args).sum().backward()
    assert len(seen) == (1 + runs) * len(model.blocks)
