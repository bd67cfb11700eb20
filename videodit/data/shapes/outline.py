"""Names the outline of a tracked object.

Its cover in each frame is brought to one place and to unit area, averaged over the frames, and compared with what
each rendered shape would look like there, under several blurs.
"""

from functools import lru_cache

import numpy as np

from videodit.data.shapes.motion import Track
from videodit.data.shapes.render import shape_distance
from videodit.data.shapes.world import SHAPES, STAR_INNER_RATIO

GRID = 24  # canonical patches are GRID x GRID over [-GRID_REACH, GRID_REACH]², in units of sqrt(area / pi)
GRID_REACH = 2.1
MAX_SHAPE_ERROR = 0.09  # |patch - template|² / |template|²
MIN_SHAPE_MARGIN = 1.25  # the second best shape's error over the best one's
BLURS = (0.5, 0.8, 1.1, 1.4)  # px
# sqrt(area / pi) at circumradius 1
AREA_RADIUS = {
    "circle": 1.0,
    "square": np.sqrt(2.0 / np.pi),
    "triangle": np.sqrt(0.75 * np.sqrt(3.0) / np.pi),
    "star": np.sqrt(5.0 * STAR_INNER_RATIO * np.sin(np.pi / 5) / np.pi),
}


def classify_shape(cover: np.ndarray, track: Track, scale: float) -> str:
    """The shape whose template fits the object best, if it fits well enough and plainly best, or "unclear".

    Args:
        cover: (t, h, w), 0 away from the object.
        track: of the object.
        scale: world units per pixel.
    """
    frames = np.flatnonzero(track.present)
    radius = track.radius[frames] / scale  # px
    patches = _canonical(cover[frames], track.x[frames] / scale, track.y[frames] / scale, radius)
    weights = radius / radius.sum()  # larger is seen more sharply
    patch = np.tensordot(weights, patches, 1).ravel()
    templates = _templates(int(np.round(8 * np.log2(max(float(weights @ radius), 1.5)))))  # (shapes, blurs, GRID²)
    errors = np.square(templates - patch).sum(axis=2) / np.square(templates).sum(axis=2)
    best = errors.min(axis=1)
    order = np.argsort(best, kind="stable")
    if best[order[0]] > MAX_SHAPE_ERROR or best[order[1]] < MIN_SHAPE_MARGIN * best[order[0]]:
        return "unclear"
    return SHAPES[order[0]]


def _canonical(cover: np.ndarray, cx: np.ndarray, cy: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Cover on a grid around each center, in units of its radius, interpolated bilinearly.

    Args:
        cover: (n, h, w).
        cx: (n,) px; cy: (n,) px; radius: (n,) px.
    Returns:
        (n, GRID, GRID).
    """
    n, h, w = cover.shape
    unit = np.linspace(-GRID_REACH, GRID_REACH, GRID)

    def bounds(center: np.ndarray, limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        position = center[:, None] + unit * radius[:, None] - 0.5  # (n, GRID), index of the pixel
        low = np.floor(position)
        part = position - low
        index = low.astype(int) + 1  # into the padded frames
        return index.clip(0, limit), (index + 1).clip(0, limit), part

    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))
    y0, y1, fy = bounds(cy, h + 1)
    x0, x1, fx = bounds(cx, w + 1)
    k = np.arange(n)[:, None, None]
    rows = padded[k, y0[:, :, None], x0[:, None, :]], padded[k, y0[:, :, None], x1[:, None, :]]
    below = padded[k, y1[:, :, None], x0[:, None, :]], padded[k, y1[:, :, None], x1[:, None, :]]
    fx, fy = fx[:, None, :], fy[:, :, None]
    return (rows[0] * (1 - fx) + rows[1] * fx) * (1 - fy) + (below[0] * (1 - fx) + below[1] * fx) * fy


@lru_cache(maxsize=64)
def _templates(radius_bin: int) -> np.ndarray:
    """What _canonical sees of each shape with sqrt(area / pi) = 2^(bin / 8) px, by blur: (shapes, blurs, GRID²)."""
    radius = 2.0 ** (radius_bin / 8)
    fine = 4  # samples a grid step
    step = 2 * GRID_REACH / (GRID - 1) / fine
    half = int(np.ceil(1.0 / step))  # beyond the grid, for the blur's reach
    axis = (np.arange(-half, (GRID - 1) * fine + half + 1) * step - GRID_REACH).astype(np.float32)
    x, y = np.meshgrid(axis, axis)
    bank = []
    for shape in SHAPES:
        unit = float(AREA_RADIUS[shape])  # circumradius 1 in units of sqrt(area / pi) is 1 / unit
        cover = np.clip(0.5 - shape_distance(shape, x * unit, y * unit) / unit / step, 0.0, 1.0)
        for blur in BLURS:
            taps = np.arange(-half, half + 1) * step * radius / blur
            kernel = np.exp(-0.5 * np.square(taps))
            kernel /= kernel.sum()
            soft = np.apply_along_axis(np.convolve, 0, cover, kernel, "valid")
            soft = np.apply_along_axis(np.convolve, 1, soft, kernel, "valid")
            bank.append(soft[::fine, ::fine].ravel())
    return np.asarray(bank, np.float32).reshape(len(SHAPES), len(BLURS), -1)
