"""Pictures as shards hold them, YUV 4:2:0: half the bytes of RGB. They stay so until the device where a model computes.

Packed frames are (…, 3h/2, w) uint8: h rows of luma, then the two chroma planes of h/2 x w/2, one after the other
(I420); BT.709, limited range; h and w are even.
"""

from typing import TypeVar

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

Array = TypeVar("Array", np.ndarray, Tensor)

# R, G, B of the chroma planes U, V, as parts of full scale. Source: BT.709-6, items 3.2 to 3.4; 8 bits: luma 16 to 235,
# chroma 128 +- 112.
_KR, _KB = 0.2126, 0.0722
_OF_CHROMA = (
    (0.0, 2 * (1 - _KR)),
    (-2 * (1 - _KB) * _KB / (1 - _KR - _KB), -2 * (1 - _KR) * _KR / (1 - _KR - _KB)),
    (2 * (1 - _KB), 0.0),
)
_BLACK, _WHITE, _GRAY, _CHROMA_SPAN = 16, 235, 128, 224


def split(packed: Array) -> tuple[Array, Array]:
    """Luma (…, h, w) and chroma (…, 2, h/2, w/2) of packed frames: views."""
    *rest, rows, width = packed.shape
    height = rows * 2 // 3
    flat = packed.reshape(*rest, rows * width)
    luma, chroma = flat[..., : height * width], flat[..., height * width :]
    return luma.reshape(*rest, height, width), chroma.reshape(*rest, 2, height // 2, width // 2)


def packed_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """(t, 3h/2, w) of packed frames; an odd last row or column is not in them."""
    return num_frames, height // 2 * 3, width // 2 * 2


def size(packed: np.ndarray) -> tuple[int, int]:
    """(h, w) of packed frames."""
    return packed.shape[-2] * 2 // 3, packed.shape[-1]


def fill_black(packed: Array) -> None:
    """Makes packed frames black."""
    luma, chroma = split(packed)
    luma[...], chroma[...] = _BLACK, _GRAY


def resize_to_cover(packed: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes frames (antialiased bilinear) until they cover height x width, one of the two exact or a pixel more.

    Args:
        packed: (t, 3h/2, w) uint8.
        height, width: pixels wanted, even.
    Returns:
        Packed frames; `packed` itself where it fits.
    """
    h, w = size(packed)
    scale = max(height / h, width / w)
    covering = max(height, _even(h * scale)), max(width, _even(w * scale))
    if covering == (h, w):
        return packed
    resized = np.empty(packed_shape(len(packed), *covering), np.uint8)
    luma, chroma = split(packed)
    for plane, out in zip((luma[:, None], chroma), split(resized), strict=True):
        pixels = F.interpolate(torch.from_numpy(plane), size=out.shape[-2:], mode="bilinear", antialias=True)
        out[:] = pixels.numpy().reshape(out.shape)
    return resized


def crop(
    packed: np.ndarray, height: int, width: int, rng: np.random.Generator | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Cuts height x width out of frames, at even rows and columns.

    Args:
        packed: (t, 3h/2, w) uint8.
        height, width: pixels wanted, even.
        rng: draws top and left; None takes the centre, or a pixel before it.
    Returns:
        Packed frames, `packed` itself where nothing is cut, and their top and left in `packed`.
    Raises:
        ValueError: if frames are smaller.
    """
    h, w = size(packed)
    if (h, w) == (height, width):
        return packed, (0, 0)
    if h < height or w < width:
        raise ValueError(f"frames of {h}x{w} are smaller than the bucket's {height}x{width}")
    rows, columns = (h - height) // 2, (w - width) // 2  # of chroma, that stand out
    top = rows // 2 if rng is None else int(rng.integers(rows + 1))
    left = columns // 2 if rng is None else int(rng.integers(columns + 1))
    part = np.empty(packed_shape(len(packed), height, width), np.uint8)
    (luma, chroma), (out_luma, out_chroma) = split(packed), split(part)
    out_luma[:] = luma[:, 2 * top : 2 * top + height, 2 * left : 2 * left + width]
    out_chroma[:] = chroma[:, :, top : top + height // 2, left : left + width // 2]
    return part, (2 * top, 2 * left)


def to_model_range(packed: Tensor) -> Tensor:
    """Packed frames to what models see; colours outside of RGB are clamped, chroma is repeated over its four pixels.

    Args:
        packed: (b, t, 3h/2, w) uint8.
    Returns:
        (b, 3, t, h, w) float32 in [-1, 1] on the same device, contiguous.
    """
    luma, chroma = split(packed)
    b, t, h, w = luma.shape
    out = torch.empty(b, 3, t, h, w, device=packed.device)
    weights = torch.tensor(_OF_CHROMA, device=packed.device) * (2 / _CHROMA_SPAN)
    slope = 2 / (_WHITE - _BLACK)
    for row in range(b):  # clip by clip, so that the passes stay in a CPU's cache
        colour = torch.einsum("cu,tuhw->cthw", weights, chroma[row].float() - _GRAY)
        colour.sub_(1 + _BLACK * slope)
        wide = F.interpolate(colour, scale_factor=2, mode="nearest")
        torch.add(wide, luma[row].float(), alpha=slope, out=out[row]).clamp_(-1, 1)
    return out


def to_pixels(packed: Tensor) -> Tensor:
    """Packed frames to RGB: (b, t, 3h/2, w) uint8 -> (b, t, h, w, 3) uint8, full range."""
    pixels = to_model_range(packed).add_(1).mul_(127.5).round_().to(torch.uint8)
    return rearrange(pixels, "b c t h w -> b t h w c").contiguous()


def _even(value: float) -> int:
    return 2 * round(value / 2)
