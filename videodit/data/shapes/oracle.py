"""Reads color, shape, size and motion of the shapes world back from pixels alone.

The backgrounds are achromatic, so an object is where there is chroma: `color` is its hue; how much of a pixel it covers
is its chroma relative to the palette's; center and area come from that cover; `shape` is the outline that fits it best
(outline.py); `size` is the radius that goes with the area; `motion` is the path that fits the centers and radii
(motion.py).

Whatever is not plainly one of the answers is "unclear". Nothing is learned or random: the same pixels give the same
reading.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from videodit.data.shapes.motion import Track, classify_motion
from videodit.data.shapes.outline import AREA_RADIUS, classify_shape
from videodit.data.shapes.world import COLORS, SIZES, WORLD_SIZE, SceneSpec

UNCLEAR = "unclear"

# Chroma is the part of RGB at right angles to gray, in two orthonormal coordinates.
_CHROMA = (np.array([[1.0, -1.0, 0.0], [1.0, 1.0, -2.0]]) / np.sqrt([[2.0], [6.0]])).astype(np.float32)
_PALETTE = np.array(list(COLORS.values()), np.float32) @ _CHROMA.T  # (6, 2)
_PALETTE_LENGTH = np.linalg.norm(_PALETTE, axis=1)
_PALETTE_HUE = np.arctan2(_PALETTE[:, 1], _PALETTE[:, 0])

MIN_COVER = 0.15  # smoothed cover below this is background: 6/255 of noise stays ten deviations below it
MIN_AREA = 8.0  # px² at 64x64; the smallest object (a shrunk small triangle) has 12
MAX_AREA = 1000.0  # the largest (a grown large circle) has 745
MAX_HUE_ERROR = np.radians(18.0)  # palette hues are 52 to 65 degrees apart
MIN_SATURATION = 0.55  # of the palette's chroma, where the object is most colorful
MIN_HUE_AGREEMENT = 0.95  # |sum of chroma| / sum of |chroma|
MIN_MEAN_AREA = 14.0  # px² a frame at 64x64: a color that covers more is an object; the smallest has 32
MAX_STRAY = 0.15  # share of the color's area that may lie away from the object
MAX_SPREAD = 0.75  # mean square distance from the center over area / pi: a disc 0.5, a triangle 0.6, two discs more
BLUR_SPREAD = 4.0  # px² that blur may add to it
MAX_MISSING = 2  # frames in which the object may be absent or broken

LUMA_WEIGHT = 20.0  # of luma's square contrast against chroma's when edges are drawn: even at a luma contrast of 35
SIZE_RANGE = (3.9, 13.5)  # circumradii outside are no size of this world


@dataclass(frozen=True)
class Reading:
    """What the oracle saw; each is a word of the world or "unclear"."""

    color: str = UNCLEAR
    shape: str = UNCLEAR
    size: str = UNCLEAR
    motion: str = UNCLEAR


def read(frames: np.ndarray) -> Reading:
    """Reads a clip of one object; another object of another color makes it unclear.

    Args:
        frames: (t, h, w, 3) uint8 RGB, any number of frames; motion needs at least 5.
    """
    readings = read_all(frames)
    return readings[0] if len(readings) == 1 else Reading()


def read_all(frames: np.ndarray) -> list[Reading]:
    """Reads every object of a clip whose objects differ in color, the largest first.

    Args:
        frames: (t, h, w, 3) uint8 RGB.
    Returns:
        One reading per color that covers enough to be an object; empty if none does.
    Raises:
        ValueError: if frames has another shape.
    """
    if frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(f"frames has shape {frames.shape}: the oracle reads (t, h, w, 3)")
    view = _View.of(frames)
    inside = np.square(view.smooth).sum(axis=0) > (MIN_COVER * _PALETTE_LENGTH.min()) ** 2
    values = view.smooth[:, inside]  # (2, n)
    nearest = np.argmax((_PALETTE / _PALETTE_LENGTH[:, None]) @ values, axis=0)
    mass = np.bincount(nearest, weights=np.hypot(*values), minlength=len(COLORS)) / _PALETTE_LENGTH
    floor = MIN_MEAN_AREA * len(frames) / view.scale**2
    readings = []
    for index in np.argsort(-mass, kind="stable"):
        if mass[index] >= floor:
            mask = np.zeros(inside.shape, bool)
            mask[inside] = nearest == index
            readings.append(_read_object(view, mask, inside, int(index)))
    return readings


@dataclass(frozen=True)
class _View:
    """A clip, split into what tells objects from backgrounds and what draws their edges.

    Attributes:
        chroma: (2, t, h, w) float32.
        smooth: chroma after a 3x3 binomial blur.
        luma: (t, h, w) float32, BT.709: coded video has it in full resolution, and chroma in half.
        scale: world units per pixel.
    """

    chroma: np.ndarray
    smooth: np.ndarray
    luma: np.ndarray
    scale: float

    @classmethod
    def of(cls, frames: np.ndarray) -> "_View":
        """Splits frames (t, h, w, 3) uint8."""
        r, g, b = (frames[..., i].astype(np.float32) for i in range(3))
        chroma = np.stack([(r - g) * _CHROMA[0, 0], (r + g - 2 * b) * _CHROMA[1, 0]])
        luma = 0.2126 * r + 0.7152 * g + 0.0722 * b
        return cls(chroma, _smooth(chroma), luma, WORLD_SIZE / min(frames.shape[1:3]))

    def background(self, inside: np.ndarray) -> np.ndarray:
        """(h, w) luma of the plane that fits best what lies outside every object (inside is (t, h, w) bool)."""
        outside = ~inside
        count = outside.sum(axis=0)
        mean = (self.luma * outside).sum(axis=0) / np.maximum(count, 1)
        h, w = count.shape
        y, x = np.mgrid[:h, :w] / max(h, w)
        basis = np.stack([np.ones_like(x), x, y]).reshape(3, -1)
        weighted = basis * count.ravel()
        plane = np.linalg.lstsq(weighted @ basis.T, weighted @ mean.ravel(), rcond=None)[0]
        return (plane @ basis).reshape(h, w).astype(np.float32)


def _smooth(x: np.ndarray) -> np.ndarray:
    """Binomial 3x3 blur over the last two axes, the border repeated."""
    padded = np.pad(x, [(0, 0)] * (x.ndim - 2) + [(1, 1), (1, 1)], mode="edge")
    rows = 0.25 * (padded[..., :-2, :] + padded[..., 2:, :]) + 0.5 * padded[..., 1:-1, :]
    return 0.25 * (rows[..., :-2] + rows[..., 2:]) + 0.5 * rows[..., 1:-1]


def _read_object(view: _View, mask: np.ndarray, inside: np.ndarray, index: int) -> Reading:
    """Reads the object of one color.

    Args:
        view: the clip.
        mask: (t, h, w) bool: where there is chroma nearest to this color.
        inside: (t, h, w) bool: where there is chroma at all.
        index: of the color.
    """
    values = view.smooth[:, mask]
    lengths = np.hypot(*values)
    total = values.sum(axis=1)
    hue_error = abs(np.angle(np.exp(1j * (np.arctan2(total[1], total[0]) - _PALETTE_HUE[index]))))
    agreement = np.hypot(*total) / lengths.sum()
    saturation = np.quantile(lengths, 0.9) / _PALETTE_LENGTH[index]
    if hue_error > MAX_HUE_ERROR or agreement < MIN_HUE_AGREEMENT or saturation < MIN_SATURATION:
        return Reading()

    along = _PALETTE[index] / _PALETTE_LENGTH[index] ** 2
    gate = mask & (along[0] * view.smooth[0] + along[1] * view.smooth[1] > MIN_COVER)
    cover = (along[0] * view.chroma[0] + along[1] * view.chroma[1]) * gate  # (t, h, w): 1 inside the object
    color = list(COLORS)[index]
    track, near, seen = _track(cover, view.scale)
    enough = max(1, len(cover) - MAX_MISSING)
    if seen.sum() < enough:
        return Reading()
    if track.present.sum() < enough:
        return Reading(color)
    near &= gate
    shape = classify_shape(_sharpen(view, cover * near, near, inside, index), track, view.scale)
    size = UNCLEAR
    if shape != UNCLEAR:
        radius = float(np.median(track.radius[track.present])) / AREA_RADIUS[shape]
        if SIZE_RANGE[0] <= radius <= SIZE_RANGE[1]:
            size = min(SIZES, key=lambda name: abs(np.log(radius / SIZES[name])))
    return Reading(color, shape, size, classify_motion(track))


def _sharpen(view: _View, cover: np.ndarray, near: np.ndarray, inside: np.ndarray, index: int) -> np.ndarray:
    """Cover from chroma and luma together: edges are as sharp as luma shows them, where the object stands out in it.

    Args:
        view: the clip.
        cover: (t, h, w) cover by chroma alone, 0 outside near.
        near: (t, h, w) bool, the object's surroundings.
        inside: (t, h, w) bool, where any object is.
        index: of the color.
    """
    behind = view.background(inside)
    excess = (view.luma - behind) * near
    # excess = cover (own - behind) holds pixel by pixel in a sharp picture, and in its sums in a blurred one.
    own = (excess.sum() + (cover * behind).sum()) / cover.sum()
    contrast = own - behind  # (h, w)
    chroma_weight = _PALETTE_LENGTH[index] ** 2
    return (cover * chroma_weight + LUMA_WEIGHT * excess * contrast) / (chroma_weight + LUMA_WEIGHT * contrast**2)


def _track(cover: np.ndarray, scale: float) -> tuple[Track, np.ndarray, np.ndarray]:
    """Center and radius of the object in each frame.

    Args:
        cover: (t, h, w).
        scale: world units per pixel.
    Returns:
        The track in world units, present where the object is in one piece; (t, h, w) bool, the object's surroundings;
        and (t,) bool, where its color covers as much as an object does, in whatever form.
    """
    t, h, w = cover.shape
    x, y = np.arange(w, dtype=np.float32) + 0.5, np.arange(h, dtype=np.float32) + 0.5
    area = everywhere = cover.sum(axis=(1, 2))
    near, window = cover, np.ones(cover.shape, bool)
    cx = cy = spread = np.zeros(t, np.float32)
    for again in (True, False):  # once everywhere, once around what was found: a stray speck then has no say
        safe = np.maximum(area, 1e-6)
        columns, rows = near.sum(axis=1), near.sum(axis=2)  # (t, w), (t, h)
        cx, cy = columns @ x / safe, rows @ y / safe
        spread = (columns @ x**2 + rows @ y**2) / safe - cx**2 - cy**2  # mean square distance from the center
        if again:
            reach = 2.0 * np.sqrt(safe / np.pi) + 2.0  # triangle and star reach out 1.6 times sqrt(area / pi)
            inside_x, inside_y = np.abs(x - cx[:, None]) < reach[:, None], np.abs(y - cy[:, None]) < reach[:, None]
            window = inside_y[:, :, None] & inside_x[:, None, :]
            near = cover * window
            area = near.sum(axis=(1, 2))
    radius = np.sqrt(np.maximum(area, 0.0) / np.pi) * scale
    seen = (everywhere * scale**2 > MIN_AREA) & (everywhere * scale**2 < MAX_AREA)
    whole = (everywhere - area < MAX_STRAY * everywhere) & (spread * scale**2 < MAX_SPREAD * radius**2 + BLUR_SPREAD)
    return Track(cx * scale, cy * scale, radius, seen & whole), window, seen


def oracle_report(clips: Iterable[np.ndarray], specs: Sequence[SceneSpec]) -> dict[str, float]:
    """How often the oracle reads in the clips what their one-object scenes say; unclear counts as wrong.

    Args:
        clips: (t, h, w, 3) uint8 each.
        specs: the scenes, in the clips' order.
    Returns:
        Shares of clips that are right in "color", "shape", "motion" and "size", and in the first three together
        ("all"), and the number of clips "n".
    Raises:
        ValueError: if there are not as many clips as scenes, or a scene has several objects.
    """
    names = ("color", "shape", "motion", "size")
    hits = []
    for clip, spec in zip(clips, specs, strict=True):
        (wanted,) = spec.objects
        reading = asdict(read(clip))
        hits.append([reading[name] == getattr(wanted, name) for name in names])
    table = np.asarray(hits, bool).reshape(-1, len(names))
    n = len(table)
    report = {name: float(table[:, i].sum() / max(n, 1)) for i, name in enumerate(names)}
    return {**report, "all": float(table[:, :3].all(axis=1).sum() / max(n, 1)), "n": n}
