"""What is done to the planes of 8-bit 4:2:0 pictures without ever making RGB of them: colour matrix, small pictures,
grey.

A frame here is what shards hold, a yuv420p `av.VideoFrame` of even size in BT.709 and limited range, or (h, w, 3) uint8
RGB in full range.
"""

from functools import cache

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange, Colorspace

Planes = tuple[np.ndarray, np.ndarray, np.ndarray]  # luma (h, w), chroma blue and red (h / 2, w / 2), uint8

BT2020 = 9
"""swscale's number of the matrix; PyAV 17, the last for Python 3.10, has no name for it."""
_RED_BLUE = {  # share of red and of blue in luma, by swscale's number of the matrix. Source: H.273, Table 4
    int(Colorspace.ITU709): (0.2126, 0.0722),
    int(Colorspace.ITU601): (0.299, 0.114),
    int(Colorspace.FCC): (0.30, 0.11),
    int(Colorspace.SMPTE240M): (0.212, 0.087),
    BT2020: (0.2627, 0.0593),
}
_SMALL = 120  # short side below which a picture is not halved any more: noise goes, cuts stay


def planes_of(frame: av.VideoFrame) -> Planes:
    """Luma (h, w) and chroma (h / 2, w / 2) twice of a yuv420p frame, uint8 views into it."""
    height, width = frame.height, frame.width
    half = (height + 1) // 2, (width + 1) // 2
    y, u, v = map(_rows, frame.planes, ((height, width), half, half))
    return y, u, v


def _rows(plane: av.video.plane.VideoPlane, shape: tuple[int, int]) -> np.ndarray:
    pitch: int = plane.line_size
    first = 0 if pitch > 0 else (1 - shape[0]) * pitch  # below 0, the last row is first in memory
    return np.ndarray(shape, np.uint8, plane, first, (pitch, 1))  # type: ignore[arg-type]  # which is a buffer


def frame_of(planes: Planes) -> av.VideoFrame:
    """A yuv420p frame with copies of planes and with nothing else: no time, no picture type, no captions.

    Args:
        planes: of 8-bit 4:2:0 in BT.709 and limited range; h and w even.
    """
    frame = _new_frame(planes)
    for target, plane in zip(planes_of(frame), planes):
        np.copyto(target, plane)
    return frame


class ToBT709:
    """Makes frames of planes of other matrices, 8-bit 4:2:0 in limited range; keeps its working memory.

    Args:
        colorspace: the matrix, as swscale numbers it.
    """

    def __init__(self, colorspace: int) -> None:
        self._luma, self._blue, self._red = to_bt709(colorspace)
        self._change = self._pairs = self._doubled = np.empty((0, 0), np.uint8)

    def __call__(self, planes: Planes) -> av.VideoFrame:
        """A frame as `frame_of` gives it, within one level of the formula; chroma counts for its four pixels."""
        frame = _new_frame(planes)
        y, u, v = planes_of(frame)
        if self._change.shape != u.shape:
            self._change, self._pairs = np.empty(u.shape, np.uint8), np.empty(u.shape, np.uint16)
            self._doubled = np.empty(y.shape, np.uint8)
        for target, (blue, red) in ((u, self._blue), (v, self._red), (self._change, self._luma)):
            cv2.addWeighted(planes[1], blue, planes[2], red, 128 * (1 - blue - red), dst=target)  # 128 is none
        # Twice in each row by a multiplication, then each row twice: the fastest way to double a picture.
        np.multiply(self._change, np.uint16(0x0101), out=self._pairs)
        self._doubled.view(np.uint16).reshape(len(u), 2, -1)[:] = self._pairs[:, None]
        cv2.addWeighted(planes[0], 1, self._doubled, 1, -128, dst=y)
        return frame


def _new_frame(planes: Planes) -> av.VideoFrame:
    height, width = planes[0].shape
    frame = av.VideoFrame(width, height, "yuv420p")
    frame.colorspace, frame.color_range = Colorspace.ITU709, ColorRange.MPEG
    return frame


@cache
def to_bt709(colorspace: int) -> np.ndarray:
    """How chroma of another matrix becomes that of BT.709, 8-bit limited range, chroma centred at 0.

    Args:
        colorspace: as swscale numbers it.
    Returns:
        (3, 2) what (blue, red) chroma add to luma, and what blue and red chroma are in BT.709. Luma itself stays.
    """
    change = _from_rgb(Colorspace.ITU709) @ np.linalg.inv(_from_rgb(colorspace))
    change[0] *= 219 / 224
    return change[:, 1:]


def _from_rgb(colorspace: int) -> np.ndarray:
    """(3, 3) RGB to luma in [0, 1] and chroma in [-0.5, 0.5]. Source: BT.709-6, item 3."""
    red, blue = _RED_BLUE[int(colorspace)]
    luma = np.array([red, 1 - red - blue, blue])
    return np.stack([luma, (np.eye(3)[2] - luma) / (2 - 2 * blue), (np.eye(3)[0] - luma) / (2 - 2 * red)])


def gray_of(frame: np.ndarray | av.VideoFrame) -> np.ndarray:
    """(h, w) uint8, full range: BT.709's luma of a frame."""
    if isinstance(frame, np.ndarray):
        return cv2.transform(frame, np.array([[0.2126, 0.7152, 0.0722]], np.float32)).reshape(frame.shape[:2])
    return full_range(planes_of(frame)[0])


def full_range(luma: np.ndarray) -> np.ndarray:
    """Luma of limited range, (h, w) uint8, at 0 to 255."""
    return cv2.convertScaleAbs(cv2.subtract(luma, 16), alpha=255 / 219)  # type: ignore[call-overload]


def small_bgr(frame: np.ndarray | av.VideoFrame) -> np.ndarray:
    """A frame, halved while its short side is 120 pixels or more, (h, w, 3) uint8 BGR, full range; see `to_bgr`."""
    height, width = frame.shape[:2] if isinstance(frame, np.ndarray) else (frame.height, frame.width)
    return to_bgr(frame, (min(height, width) // _SMALL).bit_length())


def to_bgr(frame: np.ndarray | av.VideoFrame, halvings: int = 0) -> np.ndarray:
    """A frame halved so many times, (h, w, 3) uint8 BGR, full range.

    OpenCV reads planes as BT.601, so hues are a little off; they are in every frame.
    """
    if isinstance(frame, np.ndarray):
        return cv2.cvtColor(halved(frame, halvings), cv2.COLOR_RGB2BGR)
    y, u, v = (halved(plane, halvings) for plane in planes_of(frame))
    height, width = u.shape
    packed = np.empty((3 * height, 2 * width), np.uint8)
    packed[: 2 * height] = y[: 2 * height, : 2 * width]
    packed[2 * height :].reshape(2, height, width)[:] = u, v
    return cv2.cvtColor(packed, cv2.COLOR_YUV2BGR_I420)


def halved(picture: np.ndarray, times: int) -> np.ndarray:
    """A picture, (h, w) or (h, w, 3), with 2x2 pixels made one so many times; an odd last row or column is cut off."""
    for _ in range(times):  # OpenCV's fast way, ten times that of 3x3 and 4x4
        height, width = picture.shape[0] // 2, picture.shape[1] // 2
        picture = cv2.resize(picture[: 2 * height, : 2 * width], (width, height), interpolation=cv2.INTER_AREA)
    return picture
