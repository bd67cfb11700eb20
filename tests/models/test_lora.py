"""LoRA: no change at the start, the closed form after, and weights that are merged are the model's own again."""

import copy

import pytest
import torch
from torch import nn

from tests.models.tiny import tiny_dit
from videodit.models.lora import LAYERS, LoRAConfig, LoRALinear, add_lora, merge_lora


def draw_updates(module: nn.Module) -> None:
    """As training would: no update is zero any more."""
    for layer in module.modules():
        if isinstance(layer, LoRALinear):
            nn.init.normal_(layer.up.weight, std=0.2)


def test_a_layer_adds_the_scaled_product() -> None:
    base = nn.Linear(6, 10)
    layer = LoRALinear(copy.deepcopy(base), LoRAConfig(rank=3, alpha=12))
    x = torch.randn(2, 5, 6)
    assert torch.equal(layer(x), base(x))  # B is zero
    draw_updates(layer)
    weight = base.weight + 12 / 3 * layer.up.weight @ layer.down.weight
    torch.testing.assert_close(layer(x), nn.functional.linear(x, weight, base.bias))
    merged = layer.merged()
    torch.testing.assert_close(merged.weight, weight)
    assert torch.equal(merged.bias, base.bias) and merged.weight.requires_grad


def test_alpha_is_the_rank_unless_it_is_given() -> None:
    assert LoRAConfig(rank=8).scale == 1 and LoRAConfig(rank=8, alpha=4).scale == 0.5


def test_the_update_has_the_rank_and_nothing_else_learns() -> None:
    base = nn.Linear(16, 16)
    before = base.weight.clone()
    layer = LoRALinear(base, LoRAConfig(rank=2))
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.5)
    target = torch.randn(16, 16)
    for _ in range(50):
        optimizer.zero_grad()
        (layer(torch.eye(16)) - target).square().mean().backward()
        optimizer.step()
    assert torch.equal(base.weight, before) and base.weight.grad is None
    change = layer.merged().weight.detach() - before
    assert torch.linalg.matrix_rank(change, rtol=1e-5) == 2


@pytest.mark.parametrize("layers", [LAYERS, ("query", "value")])
def test_the_dit_s_blocks(layers: tuple[str, ...]) -> None:
    dit, sample = (
        tiny_dit(),
        (
            torch.randn(2, 4, 3, 4, 6),
            torch.tensor([0.3, 0.9]),
            torch.randn(2, 5, 12),
            torch.ones(2, 5, dtype=torch.bool),
        ),
    )
    names, out = list(dit.state_dict()), dit(*sample)
    dit.requires_grad_(False)
    add_lora(dit.blocks, LoRAConfig(rank=2, layers=layers))
    learning = {name for name, p in dit.named_parameters() if p.requires_grad}
    assert {name.split(".")[-3] for name in learning} == set(layers)
    assert all(name.startswith("blocks.") for name in learning)
    torch.testing.assert_close(dit(*sample), out, rtol=0, atol=0)
    draw_updates(dit)
    changed = dit(*sample)
    assert not torch.allclose(changed, out, atol=1e-3)
    merge_lora(dit)
    assert list(dit.state_dict()) == names
    torch.testing.assert_close(dit(*sample), changed, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="lora.rank -1 is negative"):
        LoRAConfig(rank=-1)
    with pytest.raises(ValueError, match="lora.layers: mlp is not among query, "):
        LoRAConfig(rank=1, layers=("mlp",))
    with pytest.raises(ValueError, match="lora.rank 9 is above the 8 of a layer: use 8 or less"):
        LoRALinear(nn.Linear(8, 16), LoRAConfig(rank=9))
