"""Between a codec's pictures, RGB arrays and the 8-bit 4:2:0 of shards: colour matrix and range always said outright,
display rotation applied.
"""

from typing import Any

import av
import cv2
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from videodit.data.tone_mapping import needs_mapping, to_standard_range
from videodit.data.yuv_planes import BT2020, Planes, ToBT709, frame_of, planes_of

_SWSCALE = {  # tag -> swscale's; 10 is constant luminance, which it has not
    1: Colorspace.ITU709,
    4: Colorspace.FCC,
    5: Colorspace.ITU601,
    6: Colorspace.ITU601,
    7: Colorspace.SMPTE240M,
    9: BT2020,
    10: BT2020,
}

_ACCURATE_ROUNDING = 1 << 18  # swscale's flag; PyAV 17, the last for Python 3.10, has no name for it

DisplayMatrix = tuple[int, int, int, int]  # (a, b, c, d) of x' = a x + c y, y' = b x + d y; x right, y down


class ToRGB:
    """Converts the decoded frames of one video to displayed RGB, all at one size; keeps swscale's state between them.

    Args:
        size: (height, width) as displayed, to scale to; None for the first frame's own.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self._reformatter = VideoReformatter()
        self._displayed = size
        self._size: tuple[int, int] | None = None  # (width, height) as coded

    def __call__(self, frame: av.VideoFrame) -> np.ndarray:
        """Converts one frame.

        Args:
            frame: as decoded, of any pixel format.
        Returns:
            (h, w, 3) uint8, full range, rotation applied; standard range and BT.709, whatever the frame is tagged as.
        """
        matrix = display_matrix(frame)
        if self._size is None:
            height, width = self._displayed or (frame.height, frame.width)
            turned = self._displayed is not None and is_transposed(matrix)
            self._size = (height, width) if turned else (width, height)
        colorspace = _colorspace(frame)
        wide = needs_mapping(frame.color_trc, frame.color_primaries)
        rgb = self._reformatter.reformat(
            frame,
            width=self._size[0],
            height=self._size[1],
            format="rgb48le" if wide else "rgb24",
            src_colorspace=colorspace,
            dst_colorspace=colorspace,
            src_color_range=ColorRange.JPEG if frame.color_range == ColorRange.JPEG else ColorRange.MPEG,
            dst_color_range=ColorRange.JPEG,
            interpolation=Interpolation.BICUBIC,
            threads=1,
        )
        image = rgb.to_ndarray()
        if wide:
            image = to_standard_range(image, frame.color_trc, frame.color_primaries)
        return turn(image, matrix)


class ToYUV:
    """Converts RGB frames to 8-bit 4:2:0, BT.709 limited range; keeps swscale's state between them."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def __call__(self, image: np.ndarray) -> av.VideoFrame:
        """Converts one frame.

        Args:
            image: (h, w, 3) uint8, full range; h and w even.
        """
        return self._reformatter.reformat(
            av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24"),
            format="yuv420p",
            src_colorspace=Colorspace.ITU709,
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            threads=1,
        )


class ToShardFormat:
    """Converts the decoded frames of one video to what shards hold: 8-bit 4:2:0, BT.709, limited range, as displayed.

    Planes stay planes where the file has them in standard range; the rest goes over RGB.

    Args:
        size: (height, width) as displayed, to scale to; None for the first frame's own. An odd last row or column is
            cut off, as 4:2:0 needs even sizes.
    """

    def __init__(self, size: tuple[int, int] | None = None) -> None:
        self._size = size
        self._reformatter = VideoReformatter()
        self._to_bt709: dict[int, ToBT709] = {}
        self._to_rgb: ToRGB | None = None
        self._to_yuv = ToYUV()

    def __call__(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Converts one frame, of any pixel format, to a yuv420p frame of even size with pixels of its own.

        It has nothing else of the decoded one: an encoder would take its picture type for a wish and write its
        captions into the stream.

        Raises:
            ValueError: if it is below 2x2 pixels.
        """
        made = self._convert(frame)
        return made if isinstance(made, av.VideoFrame) else frame_of(made)

    def planes(self, frame: av.VideoFrame) -> Planes:
        """The planes of what a frame becomes: views into it, where nothing has to be converted."""
        made = self._convert(frame)
        return planes_of(made) if isinstance(made, av.VideoFrame) else made

    def _convert(self, frame: av.VideoFrame) -> av.VideoFrame | Planes:
        """A new frame, or the planes of this one where they are what is wanted."""
        coded = self._as_coded(frame)
        if coded is None:
            return self._over_rgb(frame)
        planes, colorspace = coded
        if colorspace == Colorspace.ITU709:
            return planes
        if colorspace not in self._to_bt709:
            self._to_bt709[colorspace] = ToBT709(colorspace)
        return self._to_bt709[colorspace](planes)

    def _as_coded(self, frame: av.VideoFrame) -> tuple[Planes, int] | None:
        """A frame's planes as displayed, at the size wanted, and the matrix that they are in; None if it has none."""
        matrix = display_matrix(frame)
        if self._size is None:
            self._size = (frame.width, frame.height) if is_transposed(matrix) else (frame.height, frame.width)
        height, width = self._size
        if min(height, width) < 2:
            raise ValueError(f"frames of {height}x{width}: at least 2x2 is needed")
        # Of an odd size the last row is cut off, which in a picture that is turned may be the first of its planes.
        turned_odd = matrix is not None and (height % 2 or width % 2)
        wide = needs_mapping(frame.color_trc, frame.color_primaries)
        if wide or turned_odd or not frame.format.name.startswith("yuv"):
            return None
        planes = planes_of(self._to_8_bits(frame, matrix))
        if matrix is not None:
            y, u, v = (turn(plane, matrix) for plane in planes)
            planes = y, u, v
        elif height % 2 or width % 2:
            y, u, v = planes
            half = slice(height // 2), slice(width // 2)
            planes = y[: height - height % 2, : width - width % 2], u[half], v[half]
        return planes, _colorspace(frame)

    def _over_rgb(self, frame: av.VideoFrame) -> av.VideoFrame:
        assert self._size is not None
        self._to_rgb = self._to_rgb or ToRGB(self._size)
        height, width = self._size
        return self._to_yuv(self._to_rgb(frame)[: height - height % 2, : width - width % 2])

    def _to_8_bits(self, frame: av.VideoFrame, matrix: DisplayMatrix | None) -> av.VideoFrame:
        """yuv420p in limited range, scaled; its colour matrix and its turn are still the file's."""
        assert self._size is not None
        height, width = reversed(self._size) if is_transposed(matrix) else self._size
        full = frame.color_range == ColorRange.JPEG
        if frame.format.name == "yuv420p" and not full and (frame.height, frame.width) == (height, width):
            return frame
        colorspace = _colorspace(frame)
        return self._reformatter.reformat(
            frame,
            width=width,
            height=height,
            format="yuv420p",
            src_colorspace=colorspace,
            dst_colorspace=colorspace,
            src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
            dst_color_range=ColorRange.MPEG,
            # A change of range on top of a change of size is off by more than a level without exact sums.
            interpolation=int(Interpolation.BICUBIC) | (_ACCURATE_ROUNDING if full else 0),
            threads=1,
        )


def display_matrix(frame: av.VideoFrame) -> DisplayMatrix | None:
    """The transformation a player applies to the coded picture, None if it shows it as it is."""
    # Not frame.side_data, which the frame keeps and which keeps the frame: with its pixels it would wait for a pass of
    # the garbage collector. Typed as a mapping by name, kept by kind.
    side_data: Any = SideDataContainer(frame)  # type: ignore[call-arg]  # its stub has no arguments
    data = side_data.get(SideData.DISPLAYMATRIX) if len(side_data) else None  # it is slow
    if data is None:
        return None
    a, b, _, c, d = np.frombuffer(bytes(data), np.int32)[:5].tolist()
    return a, b, c, d


def is_transposed(matrix: DisplayMatrix | None) -> bool:
    """Whether height and width change places in display."""
    return matrix is not None and abs(matrix[1]) > abs(matrix[0])


def turn(image: np.ndarray, matrix: DisplayMatrix | None) -> np.ndarray:
    """Applies a display matrix to the nearest quarter turn, mirrored or not.

    Args:
        image: (h, w, 3), or (h, w) for one plane.
        matrix: as `display_matrix` gives it.
    Returns:
        (h, w, 3) or (h, w), or (w, h, 3) or (w, h) where the matrix transposes.
    """
    if matrix is None:
        return image
    a, b, c, d = matrix
    if is_transposed(matrix):  # x' = c y, y' = b x
        image, flip_x, flip_y = cv2.transpose(image), c < 0, b < 0
    else:
        flip_x, flip_y = a < 0, d < 0
    return np.ascontiguousarray(image[:: -1 if flip_y else 1, :: -1 if flip_x else 1])


def _colorspace(frame: av.VideoFrame) -> int:
    # Without a tag it is BT.601, as FFmpeg writes and reads: players guess BT.709 for high definition, the tools that
    # make data sets do not.
    return int(_SWSCALE.get(frame.colorspace, Colorspace.ITU601))
