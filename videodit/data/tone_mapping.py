"""High dynamic range and wide gamut (PQ, HLG, BT.2020) to what shards hold: standard range, BT.709.

decoded values → light, 1 is reference white (203 cd/m², BT.2408) → BT.709 primaries → compressed to 0..1 → gamma 2.4
"""

from collections.abc import Callable
from functools import cache

import cv2
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorTrc

_WHITE = 203.0  # cd/m² of reference white, BT.2408
_PEAK = 1000.0  # cd/m² that becomes full white; most material is graded for it
_LINEAR = 0.3  # light up to which nothing is compressed
_GAMMA = 2.4  # BT.1886
_LEVELS = 4096
# BT.2087 Annex 2: linear BT.2020 to linear BT.709.
_TO_709 = np.array([[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32)


def needs_mapping(transfer: int, primaries: int) -> bool:
    """Whether frames tagged so are no standard range in BT.709 or what is shown like it."""
    return transfer in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67) or primaries == ColorPrimaries.BT2020


def to_standard_range(image: np.ndarray, transfer: int, primaries: int) -> np.ndarray:
    """Maps a frame that `needs_mapping`.

    Light up to 61 cd/m² keeps its brightness and hue; above, it is compressed, reference white to 0.68 of full white
    and 1000 cd/m² to full white. Colours that BT.709 has not are cut.

    Args:
        image: (h, w, 3) uint16 RGB, full range, in the frame's own transfer curve and primaries.
        transfer, primaries: the frame's tags.
    Returns:
        (h, w, 3) uint8 RGB, full range, gamma 2.4, BT.709 primaries.
    Source: BT.2100-2 Tables 4 and 5 (PQ, HLG), BT.2408-7 (reference white), BT.2087-0 (primaries); FFmpeg's vf_tonemap,
        "mobius" (compression, by the largest of R, G, B, so that the hue stays).
    """
    light = _light_of_levels(transfer)[image >> 4]
    if transfer == ColorTrc.ARIB_STD_B67:
        light = _shown(light)
    if primaries == ColorPrimaries.BT2020:
        light = cv2.transform(light, _TO_709)
    np.maximum(light, 0, out=light)
    if transfer in (ColorTrc.SMPTE2084, ColorTrc.ARIB_STD_B67):
        strongest = np.maximum(np.maximum(light[..., 0], light[..., 1]), light[..., 2])
        light *= (_compress(strongest) / np.maximum(strongest, 1e-6))[..., None]
    # Square roots are spaced nearly as eyes see, and fast.
    steps = np.sqrt(np.minimum(light, 1)) * (_LEVELS - 1) + 0.5
    return _encoded()[steps.astype(np.uint16)]


def pq_light(value: np.ndarray) -> np.ndarray:
    """PQ values in [0, 1] to light, 1 is reference white. Source: BT.2100-2, Table 4 (SMPTE ST 2084)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    power = value ** (1 / m2)
    return (np.maximum(power - c1, 0) / (c2 - c3 * power)) ** (1 / m1) * 10000 / _WHITE


def hlg_scene(value: np.ndarray) -> np.ndarray:
    """HLG values in [0, 1] to the scene's light, 1 at the top. Source: BT.2100-2, Table 5."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)


def _shown(scene: np.ndarray) -> np.ndarray:
    """What a display of 1000 cd/m² shows of HLG, 1 is reference white. Source: BT.2100-2, Table 5 (OOTF, gamma 1.2)."""
    luminance = scene @ np.array([0.2627, 0.6780, 0.0593], np.float32)
    return scene * (np.maximum(luminance, 1e-6) ** 0.2 * (_PEAK / _WHITE))[..., None]


def _compress(light: np.ndarray) -> np.ndarray:
    """Light, 1 is reference white, to [0, 1]: as it is below 0.3, full white at the peak, smooth between."""
    j, peak = _LINEAR, _PEAK / _WHITE
    a = -(j**2) * (peak - 1) / (j**2 - 2 * j + peak)
    b = (j**2 - 2 * j * peak + peak) / (peak - 1)
    curved = (b**2 + 2 * b * j + j**2) / (b - a) * (light + a) / (light + b)
    return np.where(light <= j, light, np.minimum(curved, 1))


@cache
def _light_of_levels(transfer: int) -> np.ndarray:
    values = np.linspace(0, 1, _LEVELS)
    curves: dict[int, Callable[[np.ndarray], np.ndarray]]
    curves = {int(ColorTrc.SMPTE2084): pq_light, int(ColorTrc.ARIB_STD_B67): hlg_scene}
    return curves.get(transfer, lambda value: value**_GAMMA)(values).astype(np.float32)


@cache
def _encoded() -> np.ndarray:
    light = np.linspace(0, 1, _LEVELS) ** 2
    return np.rint(255 * light ** (1 / _GAMMA)).astype(np.uint8)
