"""How much of a picture writing covers: titles, subtitles, logos, found as rows of letters without any model."""

import cv2
import numpy as np

_STROKE = 9  # what is thinner than so many pixels may be a stroke
_CONTRAST = 32  # grey levels between a stroke and what is around it
_MIN_HEIGHT, _MAX_HEIGHT = 5, 64  # of a letter
_MAX_LETTERS = 400  # a picture with more candidates is a texture: the largest are looked at
_NEAR = 15  # pixels around a stroke that its strength is held against
_ALIKE = 40  # grey levels that letters of a row differ in
_MIN_ROW = 4  # letters in a row that are taken for writing
_SHIFT = 2  # pixels by which writing that stays may shake


def text_mask(gray: np.ndarray) -> np.ndarray:
    """Where there is writing.

    A row of at least four strokes' components of about one height, on one line, near each other and of one brightness
    is writing. Letters below 5 pixels at 256 of short side, joined script and slanted lines are not seen; railings,
    windows and keyboards may be taken for it.

    Args:
        gray: (h, w) uint8, with a short side of 256 pixels or fewer.
    Returns:
        (h, w) bool, true within the boxes of rows of letters.
    """
    mask = np.zeros(gray.shape, bool)
    kernel = cv2.getStructuringElement(cv2.MORPH_RECT, (_STROKE, _STROKE))
    for operation in (cv2.MORPH_TOPHAT, cv2.MORPH_BLACKHAT):  # bright letters, dark letters
        strokes = cv2.morphologyEx(gray, operation, kernel)
        for top, bottom, left, right in _rows(_letters(strokes, gray)):
            mask[top:bottom, left:right] = True
    return mask


class TextCover:
    """The share of a clip's picture that writing covers, from pictures of it in turn.

    Writing counts where it is found at the same place in two pictures in turn: what is taken for it by mistake rarely
    stays, for what is filmed moves. Credits that roll are therefore not seen either.
    """

    def __init__(self) -> None:
        self._before: _Picture | None = None
        self._shares: list[float] = []

    def push(self, gray: np.ndarray) -> None:
        """Takes the next picture, as `text_mask` does."""
        picture = _Picture(gray)
        if self._before is not None:
            self._shares.append(_share_of_both(self._before, picture))
        self._before = picture

    def share(self) -> float:
        """Mean over the pictures so far, 0 to 1; of a single one, all that is found in it."""
        if self._shares:
            return float(np.mean(self._shares))
        return 0.0 if self._before is None else float(self._before.mask.mean())


class _Picture:
    """A picture, looked at when that is asked for."""

    def __init__(self, gray: np.ndarray) -> None:
        self._gray = gray
        self._mask: np.ndarray | None = None

    @property
    def is_read(self) -> bool:
        return self._mask is not None

    @property
    def mask(self) -> np.ndarray:
        if self._mask is None:
            self._mask = text_mask(self._gray)
        return self._mask


def _share_of_both(before: _Picture, after: _Picture) -> float:
    """The share of the picture with writing in both: with none in one, the other is not looked at."""
    first = before if before.is_read else after
    if not first.mask.any():
        return 0.0
    grown = cv2.dilate(before.mask.view(np.uint8), np.ones((2 * _SHIFT + 1, 2 * _SHIFT + 1), np.uint8))
    return float((after.mask & (grown > 0)).mean())


def _letters(strokes: np.ndarray, gray: np.ndarray) -> np.ndarray:
    """(5, n) left, top, width, height, brightness of what may be letters."""
    # Less than half as strong as the strongest nearby is what lies between outlined letters, and would join them.
    strongest = cv2.dilate(strokes, np.ones((_NEAR, _NEAR), np.uint8))
    inked = (strokes > _CONTRAST) & (strokes > strongest // 2)
    rows, columns = np.divmod(np.flatnonzero(inked), gray.shape[1])  # np.nonzero takes eight times as long
    if len(rows) < _MIN_ROW * _MIN_HEIGHT:
        return np.empty((5, 0), np.float32)
    # Each component takes at least 2x2 pixels of its own; 16 bits are three times as fast.
    kind = cv2.CV_16U if gray.size < 1 << 17 else cv2.CV_32S
    count, labels = cv2.connectedComponents(inked.view(np.uint8), connectivity=8, ltype=kind)
    # Of the few pixels with ink: OpenCV's own statistics are of the background too, and take twice as long.
    label = labels[rows, columns].astype(np.intp)
    area = np.bincount(label, minlength=count)
    top, bottom, right = np.zeros((3, count), np.intp)
    left = np.full(count, gray.shape[1])
    top[label[::-1]], bottom[label] = rows[::-1], rows  # rows ascend, and the last one written stays
    np.minimum.at(left, label, columns)
    np.maximum.at(right, label, columns)
    height, width = bottom - top + 1, right - left + 1
    good = (height >= _MIN_HEIGHT) & (height <= _MAX_HEIGHT) & (width <= 2.5 * height) & (area > 0.2 * width * height)
    good[0] = False  # the background
    kept = np.flatnonzero(good)
    kept = kept[np.argsort(-area[kept], kind="stable")[:_MAX_LETTERS]]
    level = np.bincount(label, gray[rows, columns], count)[kept] / area[kept]
    return np.stack([left[kept], top[kept], width[kept], height[kept], level]).astype(np.float32)


def _rows(letters: np.ndarray) -> list[tuple[int, int, int, int]]:
    """(top, bottom, left, right) of every row of letters."""
    if letters.shape[1] < _MIN_ROW:
        return []
    left, top, width, height, level = letters
    right, bottom, middle = left + width, top + height, top + height / 2
    # Pairs are looked at from left to right, so that each comes once, and few of them are near each other.
    one, other = np.nonzero(
        (left[:, None] < left)
        & (left - right[:, None] < _MAX_HEIGHT)
        & (np.abs(middle[:, None] - middle) < _MAX_HEIGHT)
    )
    tall = np.maximum(height[one], height[other])
    gap = left[other] - right[one]
    linked = (gap < 0.8 * tall) & (gap > -0.3 * tall)
    linked &= np.abs(height[one] - height[other]) < 0.45 * tall
    linked &= np.abs(level[one] - level[other]) < _ALIKE
    linked &= (np.abs(bottom[one] - bottom[other]) < 0.3 * tall) | (np.abs(middle[one] - middle[other]) < 0.25 * tall)
    groups = _groups(len(left), one[linked], other[linked])
    rows = []
    for label in np.flatnonzero(np.bincount(groups, minlength=1) >= _MIN_ROW):
        group = groups == label
        box = top[group].min(), bottom[group].max(), left[group].min(), right[group].max()
        if box[1] - box[0] < 2.2 * np.median(height[group]):
            rows.append((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    return rows


def _groups(count: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """(count,) for each the lowest number of those that pairs connect it to."""
    lowest = np.arange(count)
    while True:
        both = np.minimum(lowest[one], lowest[other])
        new = lowest.copy()
        np.minimum.at(new, one, both)
        np.minimum.at(new, other, both)
        if (new == lowest).all():
            return lowest
        lowest = new
