"""Ingest of files as they come from elsewhere, each written here: what the clips show, how fast, how large."""

import io
import json
import resource
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from videodit.data.clip_cutter import CutRules, cut_source
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.shards import ShardSet
from videodit.data.video_io import read_frames

TICK = Fraction(1, 1000)
CONFIG = IngestConfig(workers=1, max_memory_gb=2.0, min_frames=5, scene_cuts=False)
SWEEP_PX_PER_S = 16
UNEVEN_S = np.cumsum([0, *[0.05] * 20, *[0.15] * 19])  # of 40 frames: begins at 20 a second, goes on at 6.7


def bar_at(position: float, height: int = 48, width: int = 96) -> np.ndarray:
    """A white bar of 8 pixels whose left edge is at `position`, on dark blue."""
    image = np.full((height, width, 3), (0, 0, 90), np.uint8)
    image[:, round(position) : round(position) + 8] = 255
    return image


def bar_of(frame: np.ndarray) -> float:
    """Where the bar is."""
    return float(np.flatnonzero(frame[..., 1].mean(0) > 128).mean()) - 3.5


def written(
    images: Iterable[np.ndarray],
    times_s: Iterable[float],
    form: str = "mp4",
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    sound: bool = False,
    **options: str,
) -> bytes:
    """A video file of frames that begin at these times."""
    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        stream: Any = container.add_stream(codec, rate=10, options={"crf": "8", "bf": "0"} | options)
        stream.pix_fmt, stream.time_base, stream.codec_context.time_base = pix_fmt, TICK, TICK
        stream.codec_context.thread_count = 1
        if sound:
            audio: Any = container.add_stream("aac", rate=16000, layout="mono")
            noise = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            noise.sample_rate = 16000
        for number, (image, time_s) in enumerate(zip(images, times_s)):
            if number == 0:
                stream.height, stream.width = image.shape[:2]
            frame = av.VideoFrame.from_ndarray(image, "rgb24").reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(time_s / TICK), TICK
            container.mux(stream.encode(frame))
            if sound and number % 10 == 0:
                noise.pts = number * 1600
                container.mux(audio.encode(noise))
        container.mux(stream.encode(None))
        if sound:
            container.mux(audio.encode(None))
    return out.getvalue()


def gif(seconds: list[float]) -> bytes:
    out = io.BytesIO()
    first, *others = (Image.fromarray(bar_at(2 * number)) for number in range(len(seconds)))
    first.save(out, "GIF", save_all=True, append_images=others, duration=[round(1000 * s) for s in seconds])
    return out.getvalue()


def captioned(stream: bytes) -> bytes:
    """An H.264 byte stream with closed captions (ATSC A/53, in a user data message) before each picture."""
    text = b"\xb5\x00\x31GA94\x03\x41\xff\xfc\x94\x20\xff"
    message = b"\x00\x00\x00\x01\x06\x04" + bytes([len(text)]) + text + b"\x80"
    for start in (b"\x00\x00\x00\x01", b"\x00\x00\x01"):
        stream = stream.replace(start, b"<start%d>" % len(start))
    parts = stream.replace(b"<start4>", b"<start3>").split(b"<start3>")
    pictures = (message if part[:1] and part[0] & 31 in (1, 5) else b"" for part in parts)
    return b"".join(more + b"\x00\x00\x00\x01" + part for more, part in zip(pictures, parts) if part)


def losslessly(data: bytes) -> bytes:
    """The pictures of a video without anything that is not a pixel."""
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(out, "w", format="matroska") as target:
        stream: Any = target.add_stream("ffv1", rate=source.streams.video[0].average_rate)
        coded = source.streams.video[0]
        stream.height, stream.width, stream.pix_fmt = coded.height, coded.width, "yuv420p"
        for frame in source.decode(coded):
            target.mux(stream.encode(av.VideoFrame.from_ndarray(frame.to_ndarray(), "yuv420p")))
        target.mux(stream.encode(None))
    return out.getvalue()


Clip = tuple[dict[str, Any], bytes]


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Clip]:
    """Record and bytes of the clip of each source, which workers that may take 2 GB made."""
    folder = tmp_path_factory.mktemp("formats")
    even = [number / 10 for number in range(20)]
    steps = [bar_at(2 * number) for number in range(20)]
    sweep = [bar_at(SWEEP_PX_PER_S * time) for time in UNEVEN_S]
    plain = written(steps, even, "h264", g="5")
    files = {
        "late.ts": written(steps, [3600.5 + time for time in even], "mpegts"),
        "odd.mkv": written([image[:33, :49] for image in steps], even, "matroska", "ffv1", "yuv444p"),
        "silent.mp4": written(steps, even),
        "sound.mp4": written(steps, even, sound=True),
        "uneven.mp4": written(sweep, UNEVEN_S),
        "uneven.mkv": written(sweep, UNEVEN_S, "matroska"),
        "even.gif": gif([0.1] * 20),
        "uneven.gif": gif([0.1] * 10 + [0.3] * 10),
        "captions.h264": captioned(plain),
        "pixels.mkv": losslessly(plain),
        "large.mp4": written((bar_at(80 * n, 2160, 3840) for n in range(17)), even, preset="ultrafast"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    (folder / "list.jsonl").write_text("".join(json.dumps({"path": name}) + "\n" for name in files))
    ingest(folder / "list.jsonl", folder / "shards", CONFIG)
    shards = ShardSet.open(folder / "shards")
    return {
        shards.entries[index].meta["source"]: (shards.read_json(index), shards.read(index, "mp4"))
        for index in range(len(shards))
    }


def check_steps(clip: Clip, fps: float = 10) -> None:
    """20 frames, the bar 2 pixels further in each, the colours as written."""
    record, frames = clip[0], read_frames(clip[1])
    assert (len(frames), record["num_frames"]) == (20, 20) and record["fps"] == pytest.approx(fps)
    assert (record["start_s"], record["end_s"]) == (0, pytest.approx(20 / fps))
    assert [bar_of(frame) for frame in frames] == pytest.approx([2 * n for n in range(20)], abs=0.6)
    assert np.abs(frames[:, :, 60:].astype(int) - (0, 0, 90)).mean() < 4


@pytest.mark.parametrize("name", ["late.ts", "silent.mp4", "even.gif"])
def test_even_frames_stay_as_they_are(clips: dict[str, Clip], name: str) -> None:
    check_steps(clips[name])


def test_sound_makes_no_difference(clips: dict[str, Clip]) -> None:
    assert clips["sound.mp4"][1] == clips["silent.mp4"][1]


def test_an_odd_size_is_recorded_as_the_clip_has_it(clips: dict[str, Clip]) -> None:
    record, data = clips["odd.mkv"]
    assert read_frames(data).shape == (20, record["height"], record["width"], 3) == (20, 32, 48, 3)


def test_large_pictures_in_little_memory(clips: dict[str, Clip]) -> None:
    frames = read_frames(clips["large.mp4"][1])
    assert frames.shape == (17, 480, 854, 3)


@pytest.mark.parametrize("name", ["uneven.mp4", "uneven.mkv"])
def test_an_uneven_rate_keeps_its_speed(clips: dict[str, Clip], name: str) -> None:
    record, frames = clips[name][0], read_frames(clips[name][1])
    moments = np.arange(len(frames)) / record["fps"]
    assert record["end_s"] == pytest.approx(UNEVEN_S[-1], abs=0.2)
    late = np.array([bar_of(frame) for frame in frames]) / SWEEP_PX_PER_S - moments
    assert late.max() < 0.8 / record["fps"] + 0.04 and late.min() > -0.15 - 0.04


def test_an_uneven_gif_keeps_its_speed(clips: dict[str, Clip]) -> None:
    record, frames = clips["uneven.gif"][0], read_frames(clips["uneven.gif"][1])
    assert record["end_s"] == pytest.approx(4, abs=0.3)
    begins = np.cumsum([0, *[0.1] * 10, *[0.3] * 9])
    for number, frame in enumerate(frames):
        shown, moment = round(bar_of(frame) / 2), number / record["fps"]
        assert begins[shown] < moment + 0.8 / record["fps"]
        assert shown == 19 or begins[shown + 1] > moment


def test_only_pixels_of_a_decoded_frame_reach_the_clip(clips: dict[str, Clip]) -> None:
    """Neither its captions nor its keyframes, of which this source has one in five frames."""
    assert b"GA94" not in clips["captions.h264"][1]
    assert clips["captions.h264"][1] == clips["pixels.mkv"][1]


@pytest.mark.slow
def test_an_hour_in_constant_memory(tmp_path: Path) -> None:
    fps, used_mb = 8, []
    frames = (bar_at(number % 56, 32, 64) for number in range(3600 * fps))
    data = written(frames, (number / fps for number in range(3600 * fps)))

    def beat() -> None:  # called at each frame
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        used_mb.append(pages * resource.getpagesize() / 2**20)

    result = cut_source(data, tmp_path / "spool", CutRules(17, 10.0, 480, True, 3.0, 18, crop_bars=True), beat)
    parts = [*result.clips, *result.dropped]  # of the last clip too little may be left
    assert sum(part.num_frames for part in parts) == len(used_mb) - 1 == pytest.approx(3600 * fps, abs=1)
    assert used_mb[-1] < used_mb[300 * fps] + 8
