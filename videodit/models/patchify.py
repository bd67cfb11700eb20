"""Latents to tokens and back: 3D patches in one contiguous (b t s d) buffer.

Legend: b batch, c channels, t s tokens over time and space, pt ph pw patch size.
"""

from einops import rearrange
from torch import Tensor


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
