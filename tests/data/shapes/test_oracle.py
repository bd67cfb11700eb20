"""The oracle reads what was rendered, through compression, blur and noise, and says unclear to everything else."""

from dataclasses import replace

import numpy as np
import pytest

from videodit.data.mp4 import encode_mp4
from videodit.data.shapes.oracle import Reading, oracle_report, read, read_all
from videodit.data.shapes.render import render, world_spec
from videodit.data.shapes.world import ObjectSpec, SceneSpec, place_object, prompt_specs
from videodit.data.video_io import read_frames


def truth(obj: ObjectSpec) -> Reading:
    return Reading(obj.color, obj.shape, obj.size, obj.motion)


def blurred(frames: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    kernel = np.exp(-0.5 * (np.arange(-4, 5) / sigma) ** 2)
    kernel /= kernel.sum()
    out = frames.astype(np.float32)
    for axis in (1, 2):
        padded = np.pad(out, [(4, 4) if i == axis else (0, 0) for i in range(4)], mode="edge")
        out = np.stack([np.take(padded, range(i, i + out.shape[axis]), axis) for i in range(9)], -1) @ kernel
    return out


def noisy(frames: np.ndarray, seed: int, std: float = 6.0) -> np.ndarray:
    return np.clip(frames + np.random.default_rng(seed).normal(0, std, frames.shape), 0, 255).astype(np.uint8)


def test_rendered_and_coded_clips_are_read_right() -> None:
    specs = prompt_specs(100, "train", 11) + prompt_specs(50, "held_out", 12)
    clips = [render(spec) for spec in specs]
    exact = {"color": 1.0, "shape": 1.0, "motion": 1.0, "size": 1.0, "all": 1.0, "n": 150}
    assert oracle_report(clips, specs) == exact
    coded = oracle_report((read_frames(encode_mp4(clip, 8)) for clip in clips), specs)
    assert all(coded[name] >= 0.99 for name in exact)


def test_blur_and_noise_do_not_confuse_it() -> None:
    specs = prompt_specs(60, "train", 13)
    report = oracle_report((noisy(blurred(render(spec)), i) for i, spec in enumerate(specs)), specs)
    assert min(report.values()) >= 0.98


@pytest.mark.parametrize("num_frames, size", [(9, 64), (33, 64), (17, 32), (17, 128)])
def test_other_lengths_and_sizes(num_frames: int, size: int) -> None:
    specs = prompt_specs(20, "train", 14)
    assert oracle_report((render(spec, num_frames, size) for spec in specs), specs)["all"] >= 0.95


def test_report_counts_each_attribute_by_itself() -> None:
    spec = world_spec(1, "train", 0)
    obj = spec.objects[0]
    other = replace(obj, color="red" if obj.color != "red" else "blue")
    wrong = SceneSpec((other,), spec.background)
    report = oracle_report([render(spec), render(wrong)], [spec, spec])
    assert report == {"color": 0.5, "shape": 1.0, "motion": 1.0, "size": 1.0, "all": 0.5, "n": 2}
    with pytest.raises(ValueError):
        oracle_report([render(spec)], [spec, spec])
    assert oracle_report([], [])["n"] == 0


def test_noise_and_blank_are_unclear() -> None:
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (17, 8, 8, 3)).repeat(8, 1).repeat(8, 2).astype(np.uint8)
    for clip in (
        rng.integers(0, 256, (17, 64, 64, 3)).astype(np.uint8),
        coarse,
        np.repeat(coarse[:1], 17, axis=0),
        np.zeros((17, 64, 64, 3), np.uint8),
        np.full((17, 64, 64, 3), (230, 40, 40), np.uint8),
        noisy(np.full((17, 64, 64, 3), 128), 1),
        read_frames(encode_mp4(noisy(np.full((17, 64, 64, 3), 128), 1), 8)),
    ):
        assert read(clip) == Reading()


def test_shuffled_frames_have_no_motion_except_still() -> None:
    for i, spec in enumerate(prompt_specs(60, "train", 15)):
        obj = spec.objects[0]
        reading = read(render(spec)[np.random.default_rng(i).permutation(17)])
        assert reading == replace(truth(obj), motion="still" if obj.motion == "still" else "unclear")


def test_incoherent_clips_are_unclear() -> None:
    rng = np.random.default_rng(2)
    shown = place_object(rng, "green", "square", "medium", "right")
    clip = render(SceneSpec((shown,), "gray"))
    bare = np.full_like(clip, 122)
    assert read(clip) == truth(shown)
    assert read(np.concatenate([clip[:9], bare[9:]])) == Reading()  # it vanishes
    assert read(np.concatenate([clip[:9], clip[9:, :, :, [1, 2, 0]]])) == Reading()  # it changes color
    there_and_back = np.concatenate([clip[:9], clip[7::-1]])
    assert read(there_and_back).motion == "unclear"  # a turn, but not up and down at a border
    twin = render(SceneSpec((replace(shown, y=12.0), replace(shown, y=50.0)), "gray"))
    assert read(twin) == Reading("green")  # two of the same color
    assert read(clip[:1]) == replace(truth(shown), motion="unclear")


def test_shape_that_is_none_of_the_four_is_unclear() -> None:
    clip = np.full((17, 64, 64, 3), 28, np.uint8)
    clip[:, 30:34, 20:44] = (230, 40, 40)  # a bar
    ring = np.full((17, 64, 64, 3), 28, np.uint8)
    y, x = np.mgrid[:64, :64] - 31.5
    ring[:, (np.hypot(x, y) < 14) & (np.hypot(x, y) > 9)] = (45, 70, 240)
    for frames in (clip, ring):
        assert read(frames).shape == read(frames).size == "unclear"


def test_two_objects_are_read_apart() -> None:
    right = 0
    for index in range(20):
        spec = world_spec(index, "train", 3, num_objects=2)
        frames = render(spec)
        assert read(frames) == Reading()
        right += {truth(obj) for obj in spec.objects} == set(read_all(frames))
    assert right == 20


def test_wrong_layout_is_named() -> None:
    with pytest.raises(ValueError, match=r"\(3, 17, 64, 64\)"):
        read(np.zeros((3, 17, 64, 64), np.uint8))
