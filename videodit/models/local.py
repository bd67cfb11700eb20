"""Local layers of the DiT: convolutions at the resolution of the latents, around the transformer over patches.

A token is a patch of latent positions, and one vector of the hidden size has to hold all of its detail. These layers
hold it instead: convolutional blocks read the latents before they are cut into patches, and as many write them after,
seeing what the tokens say beside what the first ones read. What is already plain in the noisy latents does not have to
go through the layers' width: each value passes by them through a gate. What all this gains is in docs/decisions.md.
Source: the idea, not the form: Bao et al. (2022), U-ViT, arXiv:2209.12152 (long skips and a last convolution), and
Crowson et al. (2024), HDiT, arXiv:2401.11605 (local levels around a global one).

Legend: b batch, t latent frames, h w latent rows and columns, f local width, d hidden size.
"""

from collections.abc import Iterable
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodit.models.layers import MLP, Modulation, modulate
from videodit.models.token_layout import WHOLE, TokenLayout


class FrameConv(nn.Module):
    """3x3 convolution in each latent frame; its kernel is kept as a matrix (f, f 3 3), which Muon takes as such.

    Args:
        width: f.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width, 9 * width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, h, w, f) -> the same."""
        frames = x.flatten(0, 1).permute(0, 3, 1, 2)  # (b t) f h w, channels last in memory
        frames = F.conv2d(frames, self.weight.unflatten(1, (-1, 3, 3)), self.bias, padding=1)
        return frames.permute(0, 2, 3, 1).view(x.shape)


class LocalBlock(nn.Module):
    """adaLN, 3x3 convolution in each latent frame, SiLU, convolution over three latent frames, MLP; gated, added to x.

    The modulations are the shared ones plus this block's bias, as in the transformer's blocks.

    Args:
        width: f.
        activation: of the MLP.
    """

    muon_exclude = ("modulation_bias",)

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.modulation_bias = nn.Parameter(torch.zeros(3, width))
        self.spatial = FrameConv(width)
        self.temporal = nn.Linear(3 * width, width)  # over the frame before, the frame itself and the one after
        self.mlp = MLP(width, 4 * width, activation=activation)

    def forward(self, x: Tensor, shared: Tensor, layout: TokenLayout = WHOLE) -> Tensor:
        """(b, t, h, w, f) -> the same; shared is (b, t or 1, 1, 1, 3, f); layout says who has the frames beside x's."""
        modulation = Modulation(*(shared + self.modulation_bias).unbind(-2))
        frames = F.silu(self.spatial(modulate(x, modulation)))
        before, after = layout.neighbours(frames)
        hidden = self.temporal(torch.cat([before, frames, after], dim=-1))
        return torch.addcmul(x, modulation.gate, hidden + self.mlp(hidden))


class LocalLayers(nn.Module):
    """The layers before the patches (`read`) and after them (`write`).

    Args:
        channels: c of the latents.
        width: f.
        depth: blocks on each side.
        hidden_size: d of the condition.
        activation: of the blocks' MLPs.
    """

    # First and last layers and modulations: Muon is meant for the hidden matrices only.
    muon_exclude = ("conv_in", "conv_out", "latent_gate", "modulation", "final_modulation")

    def __init__(self, channels: int, width: int, depth: int, hidden_size: int, activation: str) -> None:
        super().__init__()
        self.conv_in = nn.Linear(channels, width)
        self.modulation = nn.Linear(hidden_size, 3 * width)
        self.before = nn.ModuleList(LocalBlock(width, activation) for _ in range(depth))
        self.after = nn.ModuleList(LocalBlock(width, activation) for _ in range(depth))
        self.final_modulation = nn.Linear(hidden_size, 2 * width)
        self.conv_out = nn.Linear(width, channels)
        self.latent_gate = nn.Linear(width, channels)

    def read(self, latents: Tensor, condition: Tensor, layout: TokenLayout = WHOLE) -> Tensor:
        """Latents (b, t, h, w, c) and condition (b, t or 1, d) of this rank's frames -> features (b, t, h, w, f)."""
        return self._run(self.before, self.conv_in(latents), condition, layout)

    def write(self, features: Tensor, latents: Tensor, condition: Tensor, layout: TokenLayout = WHOLE) -> Tensor:
        """Prediction of the noisy latents' clean ones or velocity.

        Args:
            features: (b, t, h, w, f), of this rank's frames.
            latents: (b, t, h, w, c), as `read` had them.
            condition: (b, t or 1, d).
            layout: where the other frames are.
        Returns:
            (b, t, h, w, c).
        """
        x = self._run(self.after, features, condition, layout)
        shift, scale = self.final_modulation(condition)[:, :, None, None].chunk(2, dim=-1)
        hidden = modulate(x, Modulation(shift, scale, gate=scale))
        return torch.addcmul(self.conv_out(hidden), self.latent_gate(hidden), latents)

    def _run(self, blocks: nn.ModuleList, x: Tensor, condition: Tensor, layout: TokenLayout) -> Tensor:
        shared = self.modulation(condition).unflatten(-1, (3, -1))[:, :, None, None]
        for block in cast("Iterable[LocalBlock]", blocks):
            x = block(x, shared, layout)
        return x
