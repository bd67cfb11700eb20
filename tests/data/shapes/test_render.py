"""Rendering against closed forms, and the folder writer against interruptions."""

import json
from pathlib import Path

import numpy as np
import pytest

from videodit.data.shapes.render import object_boxes, render, shape_distance, world_spec, write_world
from videodit.data.shapes.world import BACKGROUNDS, COLORS, SHAPES, ObjectSpec, SceneSpec, captions, frame_times
from videodit.data.video_io import read_frames
from videodit.errors import UserError

AREAS = {"circle": np.pi, "square": 2.0, "triangle": 0.75 * 3**0.5, "star": 5 * 0.45 * np.sin(np.pi / 5)}


def still(shape: str, size: str = "large", background: str = "dark", x: float = 31.3, y: float = 32.8) -> SceneSpec:
    return SceneSpec((ObjectSpec("red", shape, size, "still", x, y),), background)


def cover(frame: np.ndarray, background: str = "dark") -> np.ndarray:
    """Share of each pixel that a red object covers."""
    behind = BACKGROUNDS[background][0]
    return (frame[..., 0].astype(float) - behind) / (COLORS["red"][0] - behind)


@pytest.mark.parametrize("shape", SHAPES)
def test_area_and_center_of_mass_are_the_outline_s(shape: str) -> None:
    for size, radius in (("small", 5.0), ("medium", 8.0), ("large", 11.0)):
        share = cover(render(still(shape, size), num_frames=1)[0])
        assert share.sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.03)
        assert (share.sum(0) @ (np.arange(64) + 0.5)) / share.sum() == pytest.approx(31.3, abs=0.05)
        assert (share.sum(1) @ (np.arange(64) + 0.5)) / share.sum() == pytest.approx(32.8, abs=0.05)


@pytest.mark.parametrize("shape", SHAPES)
def test_outline_passes_through_its_tips(shape: str) -> None:
    tips = {"circle": [(1, 0), (0, -1)], "square": [(0.5**0.5, 0.5**0.5)], "triangle": [(0, -1), (0.75**0.5, 0.5)]}
    tips["star"] = [(0, -1), (np.sin(0.4 * np.pi), -np.cos(0.4 * np.pi)), (0, 0.45)]
    x, y = np.array(tips[shape], np.float32).T
    np.testing.assert_allclose(shape_distance(shape, x, y), 0.0, atol=1e-6)
    assert np.all(shape_distance(shape, 0.98 * x, 0.98 * y) < 0) and np.all(
        shape_distance(shape, 1.02 * x, 1.02 * y) > 0
    )


@pytest.mark.parametrize("index", range(8))
def test_boxes_hold_the_objects_and_nothing_else_changes(index: int) -> None:
    spec = world_spec(index, "train", 1, num_objects=1 + index % 2)
    frames, boxes = render(spec), object_boxes(spec)
    assert frames.shape == (17, 64, 64, 3) and frames.dtype == np.uint8
    assert boxes.shape == (len(spec.objects), 17, 4) and boxes.min() >= 0 and boxes.max() <= 64
    bare = np.linspace(*BACKGROUNDS[spec.background], 129)[1::2]  # pixel centres of 64 rows
    for t in range(17):
        outside = np.ones((64, 64), bool)
        for x0, y0, x1, y1 in boxes[:, t]:
            assert x0 < x1 and y0 < y1
            outside[y0:y1, x0:x1] = False
            patch = np.ptp(frames[t, y0:y1, x0:x1].astype(int), axis=-1) > 0  # where there is color
            for side in (patch[:2], patch[-2:], patch[:, :2], patch[:, -2:]):
                assert side.any()  # no slack
        grays = frames[t][outside]
        expected = np.broadcast_to(bare[:, None], (64, 64))[outside]
        assert np.abs(grays - expected[:, None]).max() <= 8  # of 255: the faint end of an anti-aliased edge


def test_later_objects_cover_earlier_ones_and_nothing_leaks_over_the_border() -> None:
    red = ObjectSpec("red", "circle", "large", "still", 0.0, 30.0)  # half outside the frame
    blue = ObjectSpec("blue", "square", "small", "still", 2.0, 30.0)
    frame = render(SceneSpec((red, blue), "light"), num_frames=1)[0]
    assert tuple(frame[30, 2]) == COLORS["blue"] and tuple(frame[22, 2]) == COLORS["red"]
    assert np.all(frame[:, 12:] == BACKGROUNDS["light"][0])


def test_a_larger_frame_shows_the_same_scene() -> None:
    spec = world_spec(3, "train", 0)
    small, large = render(spec), render(spec, size=128)
    assert np.abs(large.reshape(17, 64, 2, 64, 2, 3).mean(axis=(2, 4)) - small).mean() < 0.5
    np.testing.assert_array_equal(render(spec, num_frames=33)[::2], small)


def test_folder_holds_captioned_clips_of_the_scenes(tmp_path: Path) -> None:
    counts: list[int] = []
    paths = write_world(tmp_path, 5, "held_out", seed=3, num_frames=9, size=32, fps=8, progress=counts.append)
    assert counts[-1] == 5 and sorted(tmp_path.glob("*.mp4")) == paths and len(list(tmp_path.iterdir())) == 10
    for index, path in enumerate(paths):
        spec = world_spec(index, "held_out", 3)
        sidecar = json.loads(path.with_suffix(".json").read_text())
        assert sidecar["captions"] == captions(spec) and SceneSpec.from_dict(sidecar["spec"]) == spec
        decoded = read_frames(path)
        assert decoded.shape == (9, 32, 32, 3)
        assert np.abs(decoded.astype(int) - render(spec, 9, 32)).mean() < 6


def test_interrupted_folder_is_completed_and_outdated_clips_are_replaced(tmp_path: Path) -> None:
    first = write_world(tmp_path / "a", 4, seed=1, num_frames=5, size=32)
    whole = {p.name: p.read_bytes() for p in sorted((tmp_path / "a").iterdir())}
    kept = first[0].stat().st_mtime_ns
    first[1].unlink()  # stopped between a sidecar and its clip
    first[2].with_suffix(".json").unlink()
    first[3].unlink()
    first[3].with_suffix(".json").write_text('{"captions": ["of something el')
    write_world(tmp_path / "a", 4, seed=1, num_frames=5, size=32)
    assert {p.name: p.read_bytes() for p in sorted((tmp_path / "a").iterdir())} == whole
    assert first[0].stat().st_mtime_ns == kept
    write_world(tmp_path / "a", 4, seed=2, num_frames=5, size=32)
    write_world(tmp_path / "b", 6, seed=2, num_frames=5, size=32)
    for path in first:
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes() != whole[path.name]


def test_processes_write_the_same_bytes(tmp_path: Path) -> None:
    write_world(tmp_path / "one", 40, seed=1, num_frames=5, size=16, workers=1)
    write_world(tmp_path / "two", 40, seed=1, num_frames=5, size=16, workers=2)
    for path in sorted((tmp_path / "one").iterdir()):
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert frame_times(5)[-1] == 16.0


@pytest.mark.parametrize(
    "change, message",
    [({"size": 33}, "size is 33"), ({"num_clips": 0}, "num_clips is 0"), ({"split": "test"}, "split is 'test'")],
)
def test_bad_values_are_named(tmp_path: Path, change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write_world(**{"out_dir": tmp_path, "num_clips": 1, **change})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write clips to"):
        write_world(tmp_path / "file", 1)
