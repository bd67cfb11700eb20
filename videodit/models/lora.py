"""LoRA: fine-tuning of linear layers by the product of two small matrices beside each, the weights themselves frozen.

Source: Hu et al. (2021), arXiv:2106.09685, Sec. 4.1: W x + (alpha / r) B A x, with B zero at the start.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from videodit.models.initialise import whole

LAYERS = ("query", "key", "value", "proj", "fc1", "fc2")
"""Linear layers of the DiT's blocks, by name: of self-attention, of cross-attention, and of the MLP."""


@dataclass(frozen=True)
class LoRAConfig:
    """Which layers learn low-rank updates, and of what rank."""

    rank: int = 0
    """rank of each layer's update; 0 trains all weights instead"""
    alpha: float = 0.0
    """the update is multiplied by alpha / rank; 0 for alpha = rank"""
    layers: tuple[str, ...] = LAYERS
    """linear layers of the blocks: query, key, value and proj of both attentions, fc1 and fc2 of the MLP"""

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"lora.rank {self.rank} is negative: use 0 to train all weights")
        if self.alpha < 0:
            raise ValueError(f"lora.alpha {self.alpha} is negative: use 0 for as much as lora.rank")
        unknown = [name for name in self.layers if name not in LAYERS]
        if unknown or not self.layers:
            name = unknown[0] if unknown else "[]"
            raise ValueError(f"lora.layers: {name} is not among {', '.join(LAYERS)}")

    @property
    def scale(self) -> float:
        """Factor of the update."""
        return (self.alpha or self.rank) / self.rank


class LoRALinear(nn.Module):
    """A frozen linear layer and its update.

    Args:
        base: the layer; its weights are frozen.
        config: of the update.
    Raises:
        ValueError: if the rank is above that of the weight.
    """

    def __init__(self, base: nn.Linear, config: LoRAConfig) -> None:
        super().__init__()
        limit = min(base.in_features, base.out_features)
        if config.rank > limit:
            raise ValueError(f"lora.rank {config.rank} is above the {limit} of a layer: use {limit} or less")
        self.base, self.scale = base.requires_grad_(False), config.scale
        self.down = nn.Linear(base.in_features, config.rank, bias=False)
        self.up = nn.Linear(config.rank, base.out_features, bias=False)
        with whole(self.down.weight, self.up.weight):
            nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return torch.add(self.base(x), self.up(self.down(x)), alpha=self.scale)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The base layer with the update added to its weight."""
        update = self.up.weight.double() @ self.down.weight.double()
        self.base.weight += (self.scale * update).to(self.base.weight.dtype)
        return self.base.requires_grad_(True)


def add_lora(blocks: nn.Module, config: LoRAConfig) -> None:
    """Puts a LoRALinear in the place of each linear layer that the config names.

    Args:
        blocks: searched at all depths.
        config: of the updates.
    Raises:
        ValueError: if the rank is above that of a layer.
    """
    for module in list(blocks.modules()):
        for name, layer in list(module.named_children()):
            if name in config.layers and isinstance(layer, nn.Linear):
                setattr(module, name, LoRALinear(layer, config))


def merge_lora(module: nn.Module) -> None:
    """Undoes `add_lora`: every layer is linear again, with its update in its weight."""
    for parent in list(module.modules()):
        for name, layer in list(parent.named_children()):
            if isinstance(layer, LoRALinear):
                setattr(parent, name, layer.merged())
