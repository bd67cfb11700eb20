"""Latents to tokens and back: 3D patches in one contiguous (b t s d) buffer.

Features of local layers have their channels last. Their patches keep them there, which is a copy of whole vectors; put
into the order of `patchify`, the copy goes number by number, which takes a CPU forty times as long (docs/decisions.md).
`PatchIn` and `PatchOut` reorder their weights instead, so that what is saved has one order.

Legend: b batch, c channels, t s tokens over time and space, pt ph pw patch size, d hidden size.
"""

import math

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def patchify(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(b, c, t, h, w) -> (b, t / pt, (h / ph) * (w / pw), c * pt * ph * pw)."""
    pt, ph, pw = patch
    return rearrange(latents, "b c (t pt) (h ph) (w pw) -> b t (h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, patch: tuple[int, int, int], height: int, width: int) -> Tensor:
    """The inverse of `patchify`; height and width are in tokens."""
    pt, ph, pw = patch
    return rearrange(
        tokens, "b t (h w) (c pt ph pw) -> b c (t pt) (h ph) (w pw)", h=height, w=width, pt=pt, ph=ph, pw=pw
    )


def patchify_last(features: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """(b, t, h, w, c) -> (b, t / pt, (h / ph) * (w / pw), pt * ph * pw * c)."""
    pt, ph, pw = patch
    return rearrange(features, "b (t pt) (h ph) (w pw) c -> b t (h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify_last(tokens: Tensor, patch: tuple[int, int, int], height: int, width: int) -> Tensor:
    """The inverse of `patchify_last`; height and width are in tokens."""
    pt, ph, pw = patch
    return rearrange(
        tokens, "b t (h w) (pt ph pw c) -> b (t pt) (h ph) (w pw) c", h=height, w=width, pt=pt, ph=ph, pw=pw
    )


class PatchIn(nn.Linear):
    """Linear layer over the patches of `patchify_last`; its weight is kept as one over those of `patchify`.

    Args:
        channels: c.
        patch: pt, ph, pw.
        dim: d.
    """

    def __init__(self, channels: int, patch: tuple[int, int, int], dim: int) -> None:
        super().__init__(channels * math.prod(patch), dim)
        self.places = math.prod(patch)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, s, pt * ph * pw * c) -> (b, t, s, d)."""
        return F.linear(x, self.weight.unflatten(1, (-1, self.places)).mT.flatten(1), self.bias)


class PatchOut(nn.Linear):
    """Linear layer to the patches of `unpatchify_last`; its weight is kept as one to those of `unpatchify`.

    Args:
        dim: d.
        channels: c.
        patch: pt, ph, pw.
    """

    def __init__(self, dim: int, channels: int, patch: tuple[int, int, int]) -> None:
        super().__init__(dim, channels * math.prod(patch))
        self.places = math.prod(patch)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, s, d) -> (b, t, s, pt * ph * pw * c)."""
        weight = self.weight.unflatten(0, (-1, self.places)).transpose(0, 1).flatten(0, 1)
        return F.linear(x, weight, self.bias.unflatten(0, (-1, self.places)).mT.flatten())
