"""HDR and full-range files, written here with their tags: light, hue and brightness come out as they should."""

import io

import av
import numpy as np
import pytest
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from videodit.data.clip_cutter import CutRules, cut_source
from videodit.data.tone_mapping import hlg_scene, pq_light, to_standard_range
from videodit.data.video_io import read_frames

PQ, HLG, SDR = int(ColorTrc.SMPTE2084), int(ColorTrc.ARIB_STD_B67), int(ColorTrc.BT2020_10)
WIDE, NARROW = int(ColorPrimaries.BT2020), int(ColorPrimaries.BT709)
FROM_709 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])  # BT.2087


def pq_value(nits: np.ndarray) -> np.ndarray:
    """The inverse of PQ, by search: independent of the formula that is tested."""
    values = np.linspace(0, 1, 1 << 16)
    return np.interp(nits, pq_light(values) * 203, values)


def hdr_file(rgb: np.ndarray, transfer: int = PQ, codec: str = "libx265", primaries: int = WIDE) -> bytes:
    """One colour, in [0, 1] and the file's own curve, as 10-bit 4:2:0 of BT.2020, limited range, tagged."""
    red, green, blue = rgb
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    planes = 64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        stream.codec_context.options = {"crf": "4", "x265-params": "log-level=none:pools=1:frame-threads=1"}
        for target in (stream.codec_context,):
            target.color_trc, target.color_primaries = transfer, primaries
            target.colorspace, target.color_range = 9, 1
        for number in range(9):
            frame = av.VideoFrame(96, 64, "yuv420p10le")
            for plane, value in zip(frame.planes, planes):
                plane.update(np.full(plane.buffer_size // 2, round(value), "<u2").tobytes())
            frame.pts, frame.color_trc, frame.color_primaries = number, transfer, primaries
            frame.colorspace, frame.color_range = 9, 1
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


def light_of(frames: np.ndarray) -> np.ndarray:
    """(3,) mean light, 1 is full white."""
    return (frames.astype(float).mean((0, 1, 2)) / 255) ** 2.4


@pytest.mark.parametrize("codec", ["libx265", "libx264"])
def test_pq_below_the_knee_keeps_its_light_and_colour(codec: str) -> None:
    """50, 20 and 8 cd/m² of BT.709's primaries: by then 203 is white, and nothing is compressed."""
    nits = np.array([50.0, 20.0, 8.0])
    frames = read_frames(hdr_file(pq_value(FROM_709 @ nits), codec=codec))
    assert frames.dtype == np.uint8 and frames.shape == (9, 64, 96, 3)
    np.testing.assert_allclose(light_of(frames), nits / 203, rtol=0.06)


@pytest.mark.parametrize(("nits", "light"), [(0, 0), (40, 40 / 203), (203, 0.68), (1000, 1), (4000, 1)])
def test_greys_of_pq(nits: float, light: float) -> None:
    frames = read_frames(hdr_file(np.full(3, pq_value(np.array(float(nits))))))
    np.testing.assert_allclose(light_of(frames), light, rtol=0.05, atol=2e-4)
    assert np.ptp(frames.mean((0, 1, 2))) <= 2


def test_greys_of_hlg() -> None:
    """Its reference white is 75% of the signal: 203 cd/m² on a display of 1000."""
    assert 1000 * float(hlg_scene(np.array(0.75))) ** 1.2 == pytest.approx(203, rel=0.01)
    np.testing.assert_allclose(light_of(read_frames(hdr_file(np.full(3, 0.75), HLG))), 0.68, rtol=0.05)


def test_wide_gamut_of_standard_range_is_converted() -> None:
    light = np.array([0.5, 0.2, 0.1])
    frames = read_frames(hdr_file((FROM_709 @ light) ** (1 / 2.4), SDR))
    np.testing.assert_allclose(light_of(frames), light, rtol=0.05)


def test_hues_stay_and_brightness_never_turns_around() -> None:
    steps = np.linspace(0, 65535, 400).astype(np.uint16)
    for colour in ((1, 1, 1), (1, 0.5, 0.25)):
        levels = (pq_value(np.outer(pq_light(steps / 65535) * 203, colour)) * 65535).astype(np.uint16)
        mapped = to_standard_range(levels[None], PQ, NARROW)[0].astype(int)
        assert (np.diff(mapped[:, 0]) >= 0).all() and mapped[0, 0] == 0 and mapped[-1, 0] == 255
        bright = mapped[mapped[:, 0] > 100]
        ratios = (bright / bright[:, :1]) ** 2.4
        assert np.abs(ratios - colour).max() < 0.03


def test_ingest_makes_standard_clips_of_hdr(tmp_path) -> None:
    source = hdr_file(pq_value(FROM_709 @ np.array([50.0, 20.0, 8.0])))
    (clip,) = cut_source(source, tmp_path / "spool", CutRules(5, 10, 0, True, 3.0, 18)).clips
    data = (tmp_path / "spool").read_bytes()[: clip.size]
    with av.open(io.BytesIO(data)) as container:
        frame = next(container.decode(video=0))
    assert (frame.format.name, frame.colorspace, frame.color_trc) == ("yuv420p", Colorspace.ITU709, ColorTrc.BT709)
    np.testing.assert_allclose(light_of(read_frames(data)), np.array([50, 20, 8]) / 203, rtol=0.12)


@pytest.mark.parametrize(("pix_fmt", "full"), [("yuvj420p", True), ("yuv420p", True), ("yuv420p", False)])
def test_full_and_limited_range(pix_fmt: str, full: bool) -> None:
    """Luma 16 to 235 is all of it, or a part, as the tag says; colour at its tagged strength."""
    shades = []
    for luma in (16, 128, 235):
        out = io.BytesIO()
        with av.open(out, "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=8)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
            stream.codec_context.color_range = 2 if full else 1
            stream.codec_context.options = {"crf": "2"}
            frame = av.VideoFrame(64, 48, pix_fmt)
            for plane, value in zip(frame.planes, (luma, 128, 128)):
                plane.update(bytes([value]) * plane.buffer_size)
            frame.color_range = ColorRange.JPEG if full else ColorRange.MPEG
            frame.pts = 0
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
        shades.append(read_frames(out.getvalue()).mean())
    expected = (16, 128, 235) if full else (0, 130.4, 255)
    np.testing.assert_allclose(shades, expected, atol=1.6)
