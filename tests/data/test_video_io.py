"""Video I/O: colours and positions survive a round trip, rotation is applied, damage is an error."""

import gc
import io
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.mp4 import encode_mp4, write_mp4
from videodit.data.video_io import KEYFRAME_EVERY, VideoError, iter_frames, probe, read_frames


def counter(num_frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames that say their number: grey 60 with eight blocks in the middle row, white for the bits that are set."""
    frames = np.full((num_frames, height, width, 3), 60, np.uint8)
    for number in range(num_frames):
        for bit in range(6):
            frames[number, 8:24, 8 * bit : 8 * bit + 8] = 220 if number >> bit & 1 else 20
    return frames


def read_counter(frame: np.ndarray) -> int:
    return sum(int(frame[12:20, 8 * bit + 2 : 8 * bit + 6].mean() > 120) << bit for bit in range(6))


CLIP = encode_mp4(counter(50), 25)


@pytest.mark.parametrize(
    "colour",
    [
        (255, 0, 0),
        (0, 255, 0),
        (0, 0, 255),
        (255, 255, 0),
        (255, 0, 255),
        (0, 255, 255),
        (255,) * 3,
        (0,) * 3,
        (128,) * 3,
        (200, 100, 50),
    ],
)
def test_pure_colours_survive(colour: tuple[int, int, int]) -> None:
    frames = np.full((3, 16, 16, 3), colour, np.uint8)
    assert np.abs(read_frames(encode_mp4(frames, 8)).astype(int) - frames).max() <= 3


def test_same_frames_give_the_same_bytes() -> None:
    assert encode_mp4(counter(50), 25) == CLIP


def test_bytes_do_not_depend_on_what_the_process_did_before() -> None:
    """Without mbtree=0 about one of 60 differed, on some processors only."""
    rng = np.random.default_rng(0)
    tint = 24 * rng.standard_normal((1, 1, 1, 3))
    clip = (127 + tint + 40 * rng.standard_normal((9, 48, 64, 3))).clip(0, 255).astype(np.uint8)
    written = set()
    for _ in range(60):
        written.add(encode_mp4(clip, 12))
        encode_mp4(rng.integers(0, 256, (9, 64, 80, 3), np.uint8)[:, :48, :64], 12)
    assert len(written) == 1


def test_written_form() -> None:
    with av.open(io.BytesIO(CLIP)) as container:
        stream = container.streams.video[0]
        frames = list(container.decode(stream))
        assert (stream.codec_context.name, stream.pix_fmt) == ("h264", "yuv420p")
        assert {(f.colorspace, f.color_range, f.color_primaries, f.color_trc) for f in frames} == {
            (1, 1, 1, 1)
        }  # BT.709, limited
        keys = [number for number, frame in enumerate(frames) if frame.key_frame]
        assert keys[0] == 0 and max(np.diff([*keys, len(frames)])) <= KEYFRAME_EVERY


@pytest.mark.parametrize("fps", [8, 12.5, 24, 30000 / 1001, 24000 / 1001, 60])
def test_probe_says_what_was_written(fps: float) -> None:
    info = probe(encode_mp4(counter(20), fps))
    assert (info.num_frames, info.height, info.width, info.codec, info.pix_fmt, info.rotation) == (
        20,
        32,
        48,
        "h264",
        "yuv420p",
        0,
    )
    assert info.fps == pytest.approx(fps, rel=1e-5) and info.duration_s == pytest.approx(20 / fps, rel=1e-3)


def test_a_frame_a_day_is_written_as_slowly_as_a_file_can_say() -> None:
    assert encode_mp4(counter(3), 1 / 86400) == encode_mp4(counter(3), 1 / 1001) != encode_mp4(counter(3), 1 / 1000)
    assert len(read_frames(encode_mp4(counter(3), 1 / 86400))) == 3


def test_odd_last_row_and_column_are_cut_off() -> None:
    frames = np.zeros((2, 33, 49, 3), np.uint8)
    frames[:, 32:], frames[:, :, 48:] = 255, 255
    decoded = read_frames(encode_mp4(frames, 8))
    assert decoded.shape == (2, 32, 48, 3) and decoded.max() <= 3


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 49), st.integers(1, 50))
def test_any_range_is_the_same_frames(start: int, length: int) -> None:
    stop = min(50, start + length)
    assert [read_counter(frame) for frame in read_frames(CLIP, start, stop)] == list(range(start, stop))


def test_file_and_bytes_are_the_same(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", counter(50), 25)
    assert (tmp_path / "a.mp4").read_bytes() == CLIP
    assert np.array_equal(read_frames(tmp_path / "a.mp4", 20), np.stack(list(iter_frames(CLIP)))[20:])
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_range_beyond_the_end_is_an_error() -> None:
    with pytest.raises(VideoError, match="ends after 50 frames, 51 were"):
        read_frames(CLIP, 40, 51)
    with pytest.raises(VideoError, match="before frame 50"):
        read_frames(CLIP, 50)
    with pytest.raises(ValueError, match="no range"):
        read_frames(CLIP, 5, 5)


def rotated(degrees: float, hflip: bool, vflip: bool, clip: bytes = CLIP) -> bytes:
    """The clip's packets with a display matrix."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(clip)) as source, av.open(buffer, "w", format="mp4") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        stream.set_display_rotation(degrees, hflip=hflip, vflip=vflip)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    return buffer.getvalue()


@pytest.mark.parametrize("degrees", [0, 90, 180, 270])
def test_rotation_is_applied(degrees: int) -> None:
    turned, plain = rotated(degrees, False, False), read_frames(CLIP)
    info, frames = probe(turned), read_frames(turned)
    assert frames.shape[1:3] == (info.height, info.width) == ((32, 48) if degrees in (0, 180) else (48, 32))
    assert np.array_equal(frames, np.rot90(plain, info.rotation // 90, axes=(1, 2)))
    assert info.rotation % 360 in (degrees, -degrees % 360)


def test_mirror_images_are_applied() -> None:
    plain = read_frames(CLIP)
    assert np.array_equal(read_frames(rotated(0, True, False)), plain[:, :, ::-1])
    assert np.array_equal(read_frames(rotated(0, False, True)), plain[:, ::-1])


@pytest.mark.parametrize("data", [b"", b"no video at all" * 100, CLIP[: len(CLIP) // 2], CLIP[:40]])
def test_damaged_files_are_video_errors(data: bytes) -> None:
    with pytest.raises(VideoError):
        list(iter_frames(data))


def test_missing_file_is_a_video_error(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match="cannot be opened: No such file"):
        probe(tmp_path / "none.mp4")


@pytest.mark.parametrize(
    "listed",
    [
        "ffconcat version 1.0\nfile private/other.mp4\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:2,\nprivate/other.mp4\n#EXT-X-ENDLIST\n",
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration='
        '"PT2S"><Period><AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1"><BaseURL>private/'
        "other.mp4</BaseURL></Representation></AdaptationSet></Period></MPD>",
    ],
    ids=["concat", "hls", "dash"],
)
def test_a_list_of_other_files_is_no_video(tmp_path: Path, listed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg goes by content: a list under a video's name would read the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "other.mp4").write_bytes(CLIP)
    for name in ("x.mp4", "x.ts"):
        (tmp_path / name).write_text(listed)
        for source in (name, tmp_path / name, listed.encode()):
            with pytest.raises(VideoError, match="cannot be opened"):
                probe(source)


def test_a_name_with_a_colon_is_no_protocol(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("Talk: part 1.mp4").write_bytes(CLIP)
    assert probe("Talk: part 1.mp4").num_frames == 50


def test_audio_alone_is_a_video_error() -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoError, match="no video stream"):
        probe(buffer.getvalue())


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((2, 8, 8, 3)),
        np.zeros((2, 8, 8), np.uint8),
        np.zeros((2, 1, 8, 3), np.uint8),
    ],
)
def test_what_is_no_clip_is_refused(frames: np.ndarray) -> None:
    with pytest.raises(ValueError):
        encode_mp4(frames, 8)


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").mkdir()
    with pytest.raises(OSError):
        write_mp4(tmp_path / "a.mp4", counter(2), 8)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("name", "num_frames", "height", "width", "rotation"),
    [
        ("nasa_13013.mp4", 390, 270, 480, 0),  # the best of two streams
        ("nasa_13013_rotated.mp4", 17, 480, 270, 90),
        ("av1_video.mkv", 125, 360, 640, 0),
        ("h265_10bits.mp4", 30, 200, 200, 0),
        ("testsrc2_mpeg4.avi", 30, 720, 1280, 0),
    ],
)
def test_real_clips(real_clips: Path, name: str, num_frames: int, height: int, width: int, rotation: int) -> None:
    info = probe(real_clips / name)
    assert (info.num_frames, info.height, info.width, info.rotation) == (num_frames, height, width, rotation)
    assert [(frame.shape, frame.dtype) for frame in iter_frames(real_clips / name)] == [
        ((height, width, 3), np.uint8)
    ] * num_frames


def test_real_colours_are_right(real_clips: Path) -> None:
    """The first bar of FFmpeg's test picture is red in 8-bit and in 10-bit, tagged or not."""
    for name, row, column in (("h265_10bits.mp4", 100, 10), ("testsrc2_mpeg4.avi", 400, 100)):
        red = read_frames(real_clips / name, 0, 1)[0, row, column].astype(int)
        assert np.abs(red - (255, 0, 0)).max() <= 6, name


def test_real_corruption_is_an_error(real_clips: Path) -> None:
    with pytest.raises(VideoError, match="does not decode"):
        list(iter_frames(real_clips / "corrupted.mp4"))


def test_frames_do_not_wait_for_the_garbage_collector() -> None:
    """Each holds its pixels: memory would grow by what is decoded between two passes of it."""
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        read_frames(CLIP)
        gc.collect()
        assert not [item for item in gc.garbage if isinstance(item, av.VideoFrame)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
