"""Planes without RGB: matrices against the formula in float64, every kind of source against the way over RGB."""

import io
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from av.video.reformatter import ColorRange, Colorspace

from tests.data.test_scene_cuts import scene
from tests.data.test_video_io import rotated
from videodit.data.frame_convert import ToRGB, ToShardFormat, ToYUV, display_matrix
from videodit.data.mp4 import encode_mp4
from videodit.data.scene_cuts import find_cuts
from videodit.data.yuv_planes import BT2020, ToBT709, gray_of, planes_of, small_bgr

RED_BLUE = {Colorspace.ITU601: (0.299, 0.114), Colorspace.FCC: (0.3, 0.11), Colorspace.SMPTE240M: (0.212, 0.087)}
RED_BLUE |= {BT2020: (0.2627, 0.0593), Colorspace.ITU709: (0.2126, 0.0722)}


def picture(height: int, width: int) -> np.ndarray:
    """Colours that change slowly, as chroma of half the size can show them, and are within every gamut."""
    noise = np.random.default_rng(0).standard_normal((height, width, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 10)
    return np.clip(128 + 35 * smooth / smooth.std(), 20, 235).astype(np.uint8)


def to_rgb(planes: list[np.ndarray], red: float, blue: float) -> list[np.ndarray]:
    y, u, v = (planes[0] - 16) / 219, (planes[1] - 128) / 224, (planes[2] - 128) / 224
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return [r, (y - red * r - blue * b) / (1 - red - blue), b]


def from_rgb(rgb: list[np.ndarray], red: float, blue: float) -> list[np.ndarray]:
    r, g, b = rgb
    y = red * r + (1 - red - blue) * g + blue * b
    return [16 + 219 * y, 128 + 112 * (b - y) / (1 - blue), 128 + 112 * (r - y) / (1 - red)]


@pytest.mark.parametrize("colorspace", list(RED_BLUE))
def test_another_matrix_is_the_formula_to_one_level(colorspace: Colorspace) -> None:
    """Also where the result is beyond all levels: there it is the last one."""
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (64, 96), np.uint8), *rng.integers(0, 256, (2, 32, 48), np.uint8)
    ours = planes_of(ToBT709(colorspace)(planes))
    whole = [planes[0], *(plane.repeat(2, 0).repeat(2, 1) for plane in planes[1:])]
    exact = from_rgb(to_rgb([plane.astype(float) for plane in whole], *RED_BLUE[colorspace]), 0.2126, 0.0722)
    for plane, wanted in zip(ours, (exact[0], exact[1][::2, ::2], exact[2][::2, ::2])):
        assert plane.shape == wanted.shape
        assert np.abs(plane - wanted.clip(0, 255)).max() <= 1


@pytest.mark.parametrize("colorspace", [1, 2, 9])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv422p10le", "yuv444p", "gbrp", "gray", "bgra"])
@pytest.mark.parametrize(("source", "size"), [((96, 144), None), ((33, 49), None), ((96, 144), (48, 70))])
def test_shard_format_is_what_rgb_would_have_given(
    colorspace: int, pix_fmt: str, source: tuple[int, int], size: tuple[int, int] | None
) -> None:
    full = pix_fmt == "yuvj420p"
    frame = av.VideoFrame.from_ndarray(picture(*source), "rgb24")
    if pix_fmt != "bgra":
        swscale = {1: Colorspace.ITU709, 9: BT2020}.get(colorspace, Colorspace.ITU601)
        to = ColorRange.JPEG if full else ColorRange.MPEG
        frame = frame.reformat(format=pix_fmt, dst_colorspace=swscale, src_color_range=2, dst_color_range=to)
        frame.colorspace, frame.color_range = colorspace, to
    else:
        frame = frame.reformat(format=pix_fmt)
    ours = ToShardFormat(size)(frame)
    height, width = (side - side % 2 for side in size or source)
    assert (ours.format.name, ours.height, ours.width) == ("yuv420p", height, width)
    over_rgb = ToYUV()(ToRGB(size)(frame)[:height, :width])
    for plane, wanted in zip(planes_of(ours), planes_of(over_rgb)):
        difference = np.abs(plane.astype(int) - wanted)  # swscale makes RGB one to two levels too dark
        assert difference.mean() < 2 and difference.max() <= 5


@pytest.mark.parametrize("size", [None, (32, 48)])
@pytest.mark.parametrize("pix_fmt", ["yuv420p", "yuvj420p", "yuv420p10le", "yuv422p"])
def test_plain_colours_keep_their_values(pix_fmt: str, size: tuple[int, int] | None) -> None:
    full, deep = pix_fmt == "yuvj420p", pix_fmt.endswith("10le")
    for values in np.random.default_rng(1).integers(30, 226, (20, 3)).tolist():
        frame = av.VideoFrame(96, 64, pix_fmt)
        for plane, value in zip(frame.planes, values):
            level = np.array(4 * value if deep else value, "<u2" if deep else "u1")
            plane.update(level.tobytes() * (plane.buffer_size // level.itemsize))
        frame.colorspace, frame.color_range = 1, 2 if full else 1
        exact = [16 + values[0] * 219 / 255, *(128 + (c - 128) * 224 / 255 for c in values[1:])] if full else values
        for plane, value in zip(planes_of(ToShardFormat(size)(frame)), exact):
            assert np.abs(plane.astype(float) - value).max() <= 1


@pytest.mark.parametrize("size", [None, (24, 36)])
@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_turned_planes_are_the_turned_picture(degrees: int, mirrored: bool, size: tuple[int, int] | None) -> None:
    clip = encode_mp4(picture(32, 48)[None], 8)
    with av.open(io.BytesIO(rotated(degrees, mirrored, False, clip))) as container:
        frame = next(container.decode(video=0))
    if size and degrees % 180:
        size = size[::-1]
    assert display_matrix(frame) is not None or not (degrees or mirrored)
    ours, over_rgb = ToShardFormat(size)(frame), ToYUV()(ToRGB(size)(frame))
    for plane, wanted in zip(planes_of(ours), planes_of(over_rgb)):
        assert plane.shape == wanted.shape
        assert np.abs(plane.astype(int) - wanted).mean() < 2


def test_a_frame_in_shard_format_is_copied_bit_for_bit_and_alone() -> None:
    frame = ToYUV()(picture(64, 96))
    frame.pts, frame.time_base, frame.pict_type = 77, Fraction(1, 8), 1
    ours = ToShardFormat()(frame)
    assert all(np.array_equal(one, other) for one, other in zip(planes_of(ours), planes_of(frame)))
    assert (ours.pts, ours.pict_type, len(ours.side_data)) == (None, 0, 0)
    planes_of(frame)[0][:] = 0
    assert planes_of(ours)[0].min() > 0


@pytest.mark.parametrize("colorspace", [1, 5])
def test_rows_may_lie_upside_down_in_memory(colorspace: int) -> None:
    frame = ToYUV()(picture(64, 96))
    frame.colorspace = colorspace
    graph = av.filter.Graph()
    graph.link_nodes(graph.add_buffer(width=96, height=64, format=frame.format, time_base=Fraction(1)),
                     graph.add("vflip"), graph.add("buffersink")).configure()  # fmt: skip
    graph.vpush(frame)
    flipped = graph.vpull()
    assert flipped.planes[0].line_size < 0
    for plane, wanted in zip(planes_of(ToShardFormat()(flipped)), planes_of(ToShardFormat()(frame))):
        assert np.array_equal(plane, wanted[::-1])


def test_grey_and_small_pictures_of_planes_are_those_of_rgb() -> None:
    for height, width in ((64, 96), (270, 480), (482, 854)):
        image = 96 + picture(height, width) // 4
        frame = ToYUV()(image)
        assert np.abs(gray_of(frame).astype(int) - gray_of(image)).max() <= 3
        small, wanted = small_bgr(frame), small_bgr(image)
        assert 60 <= min(small.shape[:2]) < 120
        wanted = cv2.resize(wanted, small.shape[1::-1], interpolation=cv2.INTER_AREA)
        assert np.abs(small.astype(int) - wanted).mean() < 5  # OpenCV's matrix is BT.601's


def test_cuts_of_planes_are_those_of_rgb() -> None:
    video = np.concatenate([scene(seed, length) for seed, length in enumerate((30, 25, 40))])
    assert find_cuts(map(ToYUV(), video), 25) == find_cuts(video, 25) == [0, 30, 55]
