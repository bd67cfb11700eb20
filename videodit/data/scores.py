"""What a clip looks like, in a few numbers: measured while it is cut, kept beside it, so that a threshold may change
later without decoding anything again.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import av
import cv2
import numpy as np

from videodit.data.text_overlay import TextCover
from videodit.data.yuv_planes import full_range, gray_of, halved, planes_of

_PAIRS_PER_S = 2  # pairs of neighbouring frames that are looked at
_SMALL = 96  # short side, in pixels, of the pictures that stillness and hashes are measured on
_FLOW = 48  # short side that motion is measured on, as well as at 96 and in a fifth of the time
_SHARP = 256  # short side that sharpness and text are measured on, so that a threshold means the same at every size
_SAME = 0.5  # mean difference, of 255 grey levels, below which two frames are one picture
_BESIDE = 0.115  # weight of the pixel on each side, at a factor of 2
_HASHED = (0.1, 0.5, 0.9)  # moments of a clip, in parts of its length, that its hash sees
_HASH_SIDE, _HASH_KEPT = 32, 8
HASH_BITS = len(_HASHED) * _HASH_KEPT**2


@dataclass(frozen=True)
class ClipScores:
    """What is measured of every clip; the names are those in its json and in the index."""

    brightness: float
    """Mean luma (BT.709's) over the clip, 0 (black) to 1 (white)."""
    sharpness: float
    """Variance of the Laplacian of the luma at 256 pixels of short side, mean over frames; blurred clips are near 0."""
    motion: float
    """Mean length of the optical flow, in short sides a second."""
    static: float
    """Share of neighbouring frames that are one picture: 1 for a still shown as a video."""
    text_cover: float
    """Share of the picture that writing covers which stays in its place: titles, subtitles, logos."""
    picture_hash: str
    """192 bits as hexadecimal digits, of which two encodings of the same pictures differ in a few."""

    def record(self) -> dict[str, Any]:
        """For the clip's json."""
        return asdict(self)


class ClipScorer:
    """Scores one clip's frames as they come, in a kilobyte a second.

    Args:
        fps: frames per second.
    """

    def __init__(self, fps: float) -> None:
        self._every = max(1, round(fps / _PAIRS_PER_S))
        self._fps = fps
        self._number = 0
        self._before: np.ndarray | None = None
        self._brightness: list[float] = []
        self._sharpness: list[float] = []
        self._motion: list[float] = []
        self._same: list[bool] = []
        self._text = TextCover()
        self._pictures: list[np.ndarray] = []

    def push(self, frame: np.ndarray | av.VideoFrame) -> None:
        """Takes the next frame, as shards hold it or (h, w, 3) uint8 RGB."""
        place = self._number % self._every
        self._number += 1
        if place > 1 or (place == 1 and self._before is None):
            return
        luma = gray_of(frame) if isinstance(frame, np.ndarray) else planes_of(frame)[0]
        to_gray = (lambda picture: picture) if isinstance(frame, np.ndarray) else full_range  # when they are small
        small = to_gray(shrink(luma, _SMALL))
        if self._before is not None and (place == 1 or self._every == 1):
            change = cv2.absdiff(small, self._before)
            self._same.append(float(change.mean()) < _SAME)
            self._motion.append(_flow_length(self._before, small) * self._fps if change.any() else 0.0)
        self._before = small if place == 0 else None
        if place == 0:
            black, white = (0, 255) if isinstance(frame, np.ndarray) else (16, 235)
            self._brightness.append(min(max((cv2.mean(luma)[0] - black) / (white - black), 0.0), 1.0))
            sharp = to_gray(shrink(luma, _SHARP))
            self._sharpness.append(_variance(cv2.Laplacian(sharp, cv2.CV_16S)))
            self._text.push(sharp)
            self._pictures.append(cv2.resize(small, (_HASH_SIDE, _HASH_SIDE), interpolation=cv2.INTER_AREA))

    def finish(self) -> ClipScores:
        """The scores of the frames so far, at least one; a single frame is a picture: no motion, static 1."""
        return ClipScores(
            brightness=_rounded(self._brightness),
            sharpness=_rounded(self._sharpness),
            motion=_rounded(self._motion),
            static=_rounded(self._same) if self._same else 1.0,
            text_cover=round(self._text.share(), 4),
            picture_hash="".join(_hash(self._pictures[int(part * len(self._pictures))]) for part in _HASHED),
        )


def score_clip(frames: np.ndarray, fps: float) -> ClipScores:
    """Scores of a whole clip, (t, h, w, 3) uint8 RGB."""
    scorer = ClipScorer(fps)
    for frame in frames:
        scorer.push(frame)
    return scorer.finish()


def hash_distance(one: str, other: str) -> int:
    """In how many bits two picture hashes differ."""
    return (int(one, 16) ^ int(other, 16)).bit_count()


def _flow_length(before: np.ndarray, after: np.ndarray) -> float:
    """Mean length of the optical flow between two pictures, in short sides.

    Source: Farneback (2003), Two-Frame Motion Estimation Based on Polynomial Expansion, in OpenCV, whose faster DIS
    flow crashes on some small and long pictures, such as 16x90 (5.0.0).
    """
    before, after = shrink(before, _FLOW), shrink(after, _FLOW)
    flow = cv2.calcOpticalFlowFarneback(before, after, None, 0.5, 4, 15, 2, 5, 1.1, 0)  # type: ignore[call-overload]
    return cv2.mean(cv2.magnitude(*cv2.split(flow)))[0] / min(after.shape)


def _variance(values: np.ndarray) -> float:
    """Of all values, by their sums: meanStdDev takes ten times as long."""
    return max(0.0, cv2.norm(values, cv2.NORM_L2SQR) / values.size - (cv2.sumElems(values)[0] / values.size) ** 2)


def _hash(picture: np.ndarray) -> str:
    """Perceptual hash of a 32x32 picture: signs of its 64 lowest frequencies around their median.

    Source: Zauner (2010), Implementation and Benchmarking of Perceptual Image Hash Functions, Sec. 3.2.1 (DCT based).
    """
    low = cv2.dct(picture.astype(np.float32))[1 : _HASH_KEPT + 1, 1 : _HASH_KEPT + 1]
    bits = np.packbits((low > np.median(low)).ravel())
    return bits.tobytes().hex()


def shrink(gray: np.ndarray, at_most: int) -> np.ndarray:
    """The picture with a short side of so many pixels or fewer, nearly as by the mean over areas.

    Args:
        gray: (h, w) uint8.
    """
    gray = halved(gray, max(0, (min(gray.shape) // (2 * at_most)).bit_length()))
    factor = min(gray.shape) / at_most
    if factor <= 1:
        return gray
    size = max(1, round(gray.shape[1] / factor)), max(1, round(gray.shape[0] / factor))
    # What lies between a bilinear sample and the mean over an area, fitted to the Laplacians of eleven real pictures:
    # INTER_AREA itself takes five times as long for factors that are not whole.
    beside = _BESIDE * (factor - 1)
    blurred = cv2.GaussianBlur(gray, (3, 3), (2 * math.log((1 - 2 * beside) / beside)) ** -0.5)
    return cv2.resize(blurred, size, interpolation=cv2.INTER_LINEAR)


def _rounded(values: list[float] | list[bool]) -> float:
    return round(float(np.mean(values)), 4) if values else 0.0
