"""Compiled blocks: one graph for each kind, none anew while the sizes stay, and the same numbers.

The graphs are caught by a backend that counts them and runs them as they are: what a compiler makes of them is torch's.
"""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from tests.models.tiny import tiny_dit
from videodit.training.dit_model import compile_blocks


def step(model: torch.nn.Module, seed: int, hw: int = 4, t: int = 3, words: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    latents, sigma = torch.randn(2, 4, t, hw, hw, generator=generator), torch.rand(2, t, generator=generator)
    text = torch.randn(2, words, 12, generator=generator)
    mask = torch.arange(words) < torch.tensor([[max(words - 2, 1)], [words]])
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


@pytest.mark.slow
def test_captions_and_clips_of_any_length_make_few_graphs() -> None:
    """The second length of a kind makes a graph for all others; a single frame or word is one of its own."""
    torch._dynamo.reset()
    plain, model = tiny_dit().train(), tiny_dit().train()
    counter = CompileCounter()
    compile_blocks(model, backend=counter)
    kinds = 2  # of which one reads the text

    def new_graphs(**sizes: int) -> int:
        before = counter.frame_count
        torch.testing.assert_close(step(model, 1, **sizes), step(plain, 1, **sizes), rtol=1e-4, atol=1e-4)
        return counter.frame_count - before

    assert new_graphs(words=5) == kinds
    assert new_graphs(words=3) == 1
    assert [new_graphs(words=words) for words in (7, 2, 64, 5, 3)] == [0] * 5  # within a bucket
    assert new_graphs(t=6) == kinds
    assert [new_graphs(t=t, words=words) for t, words in ((2, 4), (9, 6), (3, 5))] == [0] * 3
    assert new_graphs(hw=8) <= kinds
    assert [new_graphs(hw=hw, t=t, words=words) for hw, t, words in ((6, 4, 9), (10, 2, 3), (4, 3, 5))] == [0] * 3
    # Images, and captions without a word: more than the 8 graphs that torch allows by itself, where it gives up.
    single = [{"t": 1, "hw": 8}, {"t": 1, "hw": 4, "words": 7}, {"words": 1}, {"t": 1, "words": 1}]
    assert sum(new_graphs(**sizes) for sizes in single) <= 4 * kinds
    assert counter.frame_count > 8
    assert [new_graphs(**sizes) for sizes in (*single, {"t": 1, "hw": 6, "words": 9})] == [0] * 5
