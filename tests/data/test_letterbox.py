"""Black bars: found where they were put, also through H.264, and not where a scene is only dark."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_scores import moving, texture
from videodit.data.frame_convert import ToRGB, ToYUV
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.letterbox import Bars, find_bars
from videodit.data.mp4 import encode_mp4, write_mp4
from videodit.data.shards import ShardSet
from videodit.data.video_io import iter_samples, read_frames, sample_frames


def barred(clip: np.ndarray, bars: Bars) -> np.ndarray:
    pad = ((0, 0), (bars.top, bars.bottom), (bars.left, bars.right), (0, 0))
    return np.pad(clip, pad)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(-2, 2), st.integers(0, 40), st.integers(0, 99))
def test_bars_are_found_where_they_are(rows: int, more: int, columns: int, seed: int) -> None:
    clip = np.maximum(moving(seed, 3, frames=3, height=96, width=160), 60)
    bars = Bars(rows, max(0, rows + more), columns, columns)
    found = find_bars(barred(clip, bars))
    few = (columns + columns) < 0.02 * (160 + 2 * columns)  # too thin to count
    assert found == bars._replace(left=0 if few else columns, right=0 if few else columns)


def test_bars_survive_encoding() -> None:
    clip = barred(np.maximum(moving(1, 2, height=96, width=192), 60), Bars(24, 24, 0, 0))
    assert find_bars(read_frames(encode_mp4(clip, 8, crf=30))) == Bars(24, 24, 0, 0)


def test_what_is_not_a_bar() -> None:
    clip = np.maximum(moving(2, 2, frames=4, height=96, width=160), 60)
    assert find_bars(clip) == Bars()
    assert find_bars(np.zeros((3, 96, 160, 3), np.uint8)) == Bars()
    assert find_bars([]) == Bars()
    assert find_bars(barred(clip, Bars(0, 30, 0, 0))) == Bars()  # on one side only
    assert find_bars(barred(clip, Bars(80, 80, 0, 0))) == Bars()  # more bar than picture
    fading = (clip * np.abs(np.linspace(-1, 1, 96) ** 2 - 1)[None, :, None, None]).astype(np.uint8)
    assert find_bars(np.minimum(fading, clip) // 4) == Bars()  # a dark scene, darker to both sides
    once = barred(clip, Bars(20, 20, 0, 0))
    once[2, :20] = 90  # content reaches there in one of the frames
    assert find_bars(once) == Bars()


def test_no_more_frames_are_asked_for_than_tell() -> None:
    """The first that reaches all sides says that there are no bars; black ones and those with bars do not."""
    clip = np.maximum(moving(2, 2, frames=4, height=96, width=160), 60)
    black = np.zeros_like(clip[0])
    frames = iter([black, clip[0], *clip])
    assert find_bars(frames) == Bars() and len(list(frames)) == 4
    barred_frames = iter(barred(clip, Bars(20, 20, 0, 0)))
    assert find_bars(barred_frames) == Bars(20, 20, 0, 0) and not list(barred_frames)


def test_planes_have_the_bars_of_their_picture() -> None:
    """Coloured ones are none, however dark they are."""
    clip = np.maximum(moving(4, 2, frames=3, height=96, width=160), 60)
    for colour, bars in (((0, 0, 0), Bars(20, 20, 0, 0)), ((0, 0, 60), Bars())):
        frames = barred(clip, Bars(20, 20, 0, 0))
        frames[:, :20] = frames[:, -20:] = colour
        assert find_bars(frames) == find_bars(map(ToYUV(), frames)) == bars


def test_a_keyframe_is_decoded_once(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", moving(5, 2, frames=40, height=48, width=64), 8)  # keyframes 0, 16, 32
    frames = list(iter_samples(tmp_path / "a.mp4", 12))
    assert len(frames) == 12 and len({id(frame) for frame in frames}) == 3
    pictures = map(ToRGB(), frames)
    assert all(np.array_equal(a, b) for a, b in zip(pictures, sample_frames(tmp_path / "a.mp4", 12), strict=True))


def test_frames_are_sampled_over_the_whole_video(tmp_path: Path) -> None:
    levels = np.arange(0, 240, 2, dtype=np.uint8)  # 120 frames, each a little brighter
    write_mp4(tmp_path / "a.mp4", np.broadcast_to(levels[:, None, None, None], (120, 32, 48, 3)).copy(), 8)
    seen = [int(frame.mean()) for frame in sample_frames(tmp_path / "a.mp4", 6)]
    assert len(seen) == 6 and seen[0] <= 2 and seen[-1] >= 150 and seen == sorted(seen)


@pytest.mark.parametrize("crop", [True, False])
def test_ingest_cuts_bars_and_records_them(tmp_path: Path, crop: bool) -> None:
    picture = np.maximum(texture(3, 96, 192), 60)
    clip = barred(np.stack([np.roll(picture, t, axis=1) for t in range(17)]), Bars(24, 24, 0, 0))
    write_mp4(tmp_path / "a.mp4", clip, 8)
    ingest(tmp_path / "a.mp4", tmp_path / "out", IngestConfig(workers=1, crop_bars=crop, max_short_side=48))
    shards = ShardSet.open(tmp_path / "out")
    record, frames = shards.read_json(0), read_frames(shards.read(0, "mp4"))
    if crop:  # 96 rows of picture to 48
        assert record["bars"] == {"top": 24, "bottom": 24, "left": 0, "right": 0}
        assert frames.shape == (17, 48, 96, 3) == (17, record["height"], record["width"], 3)
        assert frames.min(axis=(0, 2, 3)).min() > 30
    else:  # 144 rows to 48
        assert "bars" not in json.dumps(record)
        assert frames.shape == (17, 48, 64, 3) and frames[:, :7].max() < 12
