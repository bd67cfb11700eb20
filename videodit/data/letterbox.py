"""Black bars above and below a picture or beside it: found in a few frames, so that clips can be cut without them."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_BLACK = 12  # of 255, full range: a coded bar stays within a few levels of 0
_EDGE = 40  # of 255, that the picture reaches within two pixels of a bar: the shade of dark scenery ends slowly
_LEAST = 0.02  # of the side, for both bars together: less is a blurred edge
_UNEQUAL = 0.02  # of the side, that the two bars may differ by: dark scenery is not centered
_CONTENT = 0.4  # of the side, that must be left


class Bars(NamedTuple):
    """Rows and columns of bars, in pixels of the displayed picture."""

    top: int = 0
    bottom: int = 0
    left: int = 0
    right: int = 0


def find_bars(frames: Iterable[np.ndarray]) -> Bars:
    """Finds the bars that all frames have.

    Args:
        frames: (h, w, 3) uint8 RGB each, of one size, from different moments; frames that are black altogether say
            nothing.
    Returns:
        The bars; none where the two of a pair are too unequal or would leave too little.
    """
    brightest: np.ndarray | None = None
    for frame in frames:
        brightest = frame if brightest is None else np.maximum(brightest, frame)
    if brightest is None or brightest.max() <= _BLACK:
        return Bars()
    brightest = np.maximum(np.maximum(brightest[..., 0], brightest[..., 1]), brightest[..., 2])  # max(axis=2) is slow
    # The 99th percentile: a few bright pixels, such as a line of analogue noise, do not end a bar.
    return Bars(*_pair(np.percentile(brightest, 99, axis=1)), *_pair(np.percentile(brightest, 99, axis=0)))


def _pair(level: np.ndarray) -> tuple[int, int]:
    """How long the bars at both ends of a side are, given how bright each row or column gets."""
    content = level > _BLACK
    if not content.any():
        return 0, 0
    first, last = int(content.argmax()), int(content[::-1].argmax())
    side = len(level)
    if first + last < _LEAST * side or abs(first - last) > max(2, _UNEQUAL * side):
        return 0, 0
    if side - first - last < _CONTENT * side:
        return 0, 0
    sharp = all(bar == 0 or edge[bar : bar + 3].max() >= _EDGE for bar, edge in ((first, level), (last, level[::-1])))
    return (first, last) if sharp else (0, 0)
