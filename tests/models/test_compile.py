"""Compiled blocks: one graph for each kind, none anew while the sizes stay, and the same numbers.

The graphs are caught by a backend that counts them and runs them as they are: what a compiler makes of them is torch's.
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.models.tiny import tiny_dit
from videodit.training.dit_model import compile_blocks


def step(model: torch.nn.Module, seed: int, hw: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents, sigma = torch.randn(2, 4, 3, hw, hw, generator=generator), torch.rand(2, 3, generator=generator)
    text, mask = torch.randn(2, 5, 12, generator=generator), torch.arange(5) < torch.tensor([[3], [5]])
    model.zero_grad()
    out = model(latents, sigma, text, mask)
    out.square().mean().backward()
    return out.detach()


@pytest.mark.parametrize("policy", ["none", "full"])
@pytest.mark.parametrize("changes", [{"pattern": "st", "depth": 6}, {"pattern": "stf", "depth": 6, "qk_norm": "all"}])
def test_one_graph_a_kind_and_none_anew_in_later_steps(changes: dict, policy: str) -> None:
    torch._dynamo.reset()
    plain, model = tiny_dit(**changes).train(), tiny_dit(**changes).train()
    plain.checkpointing = model.checkpointing = policy
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    for seed in range(3):
        torch.testing.assert_close(step(model, seed), step(plain, seed))
    assert counter.frame_count == len(changes["pattern"])
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad)
    step(model, 3, hw=8)  # another bucket
    assert counter.frame_count <= 3 * len(changes["pattern"])  # for this size, and for any size
    count = counter.frame_count
    step(model, 4, hw=8)
    step(model, 5)
    assert counter.frame_count == count
