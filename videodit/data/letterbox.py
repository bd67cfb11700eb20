"""Black bars above and below a picture or beside it: found in a few frames, so that clips can be cut without them."""

from collections.abc import Iterable
from typing import NamedTuple

import av
import cv2
import numpy as np

from videodit.data.yuv_planes import to_bgr

_BLACK = 12  # of 255, full range: a coded bar stays within a few levels of 0
_EDGE = 40  # of 255, that the picture reaches within two pixels of a bar: the shade of dark scenery ends slowly
_LEAST = 0.02  # of the side, for both bars together: less is a blurred edge
_UNEQUAL = 0.02  # of the side, that the two bars may differ by: dark scenery is not centered
_CONTENT = 0.4  # of the side, that must be left
_FEW = 0.01  # of a row's pixels


class Bars(NamedTuple):
    """Rows and columns of bars, in pixels of the displayed picture."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def find_bars(frames: Iterable[np.ndarray | av.VideoFrame]) -> Bars:
    """Finds the bars that all frames have.

    Args:
        frames: as shards hold them or (h, w, 3) uint8 RGB, of one size, from different moments; frames that are black
            altogether say nothing. No more of them are asked for once there can be no bars.
    Returns:
        The bars; none where the two of a pair are too unequal or would leave too little.
    """
    brightest: np.ndarray | None = None
    sides: list[_Side] = []
    for frame in frames:
        channels = cv2.split(to_bgr(frame))
        strongest = cv2.max(cv2.max(channels[0], channels[1]), channels[2])
        brightest = strongest if brightest is None else cv2.max(brightest, strongest)
        sides = [_Side(brightest, axis=1), _Side(brightest, axis=0)]
        if not any(side.may_have_bars() for side in sides):
            return Bars()
    rows, columns = [side.bars() for side in sides] or [(0, 0), (0, 0)]
    return Bars(*rows, *columns)


class _Side:
    """The rows of a picture (axis 1) or its columns (axis 0): where there is something to see.

    Args:
        picture: (h, w) uint8, the brightest that each pixel gets.
    """

    def __init__(self, picture: np.ndarray, axis: int) -> None:
        self._picture, self._axis = picture, axis
        self._content = self._brighter_than(_BLACK)
        self._length = len(self._content)
        self._seen = bool(self._content.any())
        self._first, self._last = int(self._content.argmax()), int(self._content[::-1].argmax())

    def may_have_bars(self) -> bool:
        """Whether there may be bars, also when more frames have been seen: these only make bars shorter."""
        return not self._seen or self._first + self._last >= _LEAST * self._length

    def bars(self) -> tuple[int, int]:
        """How long the bars at both ends are."""
        first, last, length = self._first, self._last, self._length
        if not self._seen or not self.may_have_bars() or abs(first - last) > max(2, _UNEQUAL * length):
            return 0, 0
        if length - first - last < _CONTENT * length:
            return 0, 0
        bright = self._brighter_than(_EDGE - 1)
        sharp = all(bar == 0 or edge[bar : bar + 3].any() for bar, edge in ((first, bright), (last, bright[::-1])))
        return (first, last) if sharp else (0, 0)

    def _brighter_than(self, level: int) -> np.ndarray:
        """Which rows have more than a hundredth of their pixels above a level: fewer, such as a line of analogue
        noise, do not end a bar.
        """
        above = cv2.reduce(cv2.compare(self._picture, level, cv2.CMP_GT), self._axis, cv2.REDUCE_AVG, dtype=cv2.CV_32F)
        return above.ravel() > 255 * _FEW
