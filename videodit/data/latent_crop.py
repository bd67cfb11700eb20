"""Crops of latents for training: a window in space, the same in all frames, chosen where there is something to learn.

In most clips most of the picture is background, which a model has learned long before it can draw what is in front of
it. A window that holds the object costs a part of the work, so that as much time shows the model more objects.

Source: the idea of training a diffusion model on patches that know where they lie, Wang et al. (2023), Patch Diffusion,
arXiv:2304.12526; there the place is uniform. What it gains here is in docs/decisions.md.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentCropConfig:
    """Windows that a part of the training sees instead of whole latents."""

    size: tuple[int, int] = (0, 0)
    """rows and columns of latents, multiples of the DiT's patch; 0 for whole ones"""
    share: float = 0.0
    """share of max_steps, the first ones, that trains on windows; the rest sees whole latents"""
    contrast_power: float = 4.0
    """a window is drawn in proportion to its contrast to this power: 0 uniformly, a large one always the richest"""

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 0 or (max(self.size) > 0 and min(self.size) == 0):
            raise ValueError(f"crop.size {list(self.size)} is not 2 sizes: use for example [6, 6], or [0, 0] for none")
        if not 0 <= self.share <= 1:
            raise ValueError(f"crop.share {self.share} is no share: use a number from 0 to 1")
        if self.share > 0 and max(self.size) == 0:
            raise ValueError(f"crop.share {self.share} without crop.size: give for example --crop.size [6,6]")
        if self.contrast_power < 0:
            raise ValueError(f"crop.contrast_power {self.contrast_power} is negative: 0 draws every window alike")

    def size_in(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the windows of such latents; smaller ones stay whole."""
        return min(self.size[0], height), min(self.size[1], width)


def window_weights(latents: Tensor, size: tuple[int, int], step: tuple[int, int], power: float) -> Tensor:
    """How likely each window is: its contrast to a power.

    A window's contrast is the sum, over its positions and all frames and channels, of the squared distance from the
    clip's mean latent.

    Args:
        latents: (b, c, t, h, w).
        size: rows and columns of a window, at most h and w.
        step: rows and columns between neighbouring windows (the patch, so that tokens stay the same).
        power: see `LatentCropConfig.contrast_power`.
    Returns:
        (b, rows, columns) float64, one number for each window; the largest of a clip is 1.
    """
    energy = (
        (latents - latents.mean(dim=(2, 3, 4), keepdim=True)).square().sum(dim=(1, 2), dtype=torch.float64)
    )  # b h w
    windows = energy.unfold(1, size[0], step[0]).unfold(2, size[1], step[1]).sum(dim=(-1, -2))
    contrast = windows + torch.finfo(torch.float32).tiny  # a clip of one color has none: all windows alike
    return (contrast / contrast.amax(dim=(1, 2), keepdim=True)) ** power


def draw_windows(weights: Tensor, step: tuple[int, int], uniform: Tensor) -> Tensor:
    """Where each clip's window lies.

    Args:
        weights: (b, rows, columns) from `window_weights`.
        step: as there.
        uniform: (b,) in (0, 1), decides.
    Returns:
        (b, 2) int64, the first row and column of each window.
    """
    total = weights.flatten(1).cumsum(dim=1)
    place = (total < uniform[:, None] * total[:, -1:]).sum(dim=1)
    columns = weights.shape[2]
    return torch.stack([place // columns * step[0], place % columns * step[1]], dim=1)


def crop(latents: Tensor, origins: Tensor, size: tuple[int, int]) -> Tensor:
    """(b, c, t, h, w) and (b, 2) from `draw_windows` -> the windows, (b, c, t, rows, columns)."""
    b, c, t, h, w = latents.shape
    rows = origins[:, 0, None] + torch.arange(size[0], device=origins.device)  # b rows
    columns = origins[:, 1, None] + torch.arange(size[1], device=origins.device)
    index = (rows[:, :, None] * w + columns[:, None, :]).flatten(1)[:, None].expand(-1, c * t, -1)
    return latents.reshape(b, c * t, h * w).gather(2, index).view(b, c, t, *size)
