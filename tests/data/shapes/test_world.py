"""The world's rules: what is held out, that objects stay in the frame, that captions say everything."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.shapes.world import (
    BACKGROUNDS,
    COLORS,
    DURATION,
    EXTENTS,
    MOTION_PHRASES,
    MOTIONS,
    SHAPES,
    SIZES,
    ObjectSpec,
    SceneSpec,
    captions,
    frame_times,
    is_held_out,
    place_object,
    prompt_specs,
    sample_spec,
    split_triples,
)


def test_splits_part_the_240_triples_by_the_rule() -> None:
    held_out, train = split_triples("held_out"), split_triples("train")
    assert len(held_out) + len(train) == len(set(held_out) | set(train)) == 6 * 4 * 10
    assert len(held_out) == 30  # 240 / 8
    assert ("red", "circle", "left") in held_out  # 0 + 0 + 0
    assert ("cyan", "square", "diagonal") not in held_out  # 5 + 2 + 12 = 19
    assert ("cyan", "star", "diagonal") not in held_out  # 5 + 6 + 12 = 23
    assert ("green", "circle", "shrink") not in held_out and is_held_out(
        "yellow", "square", "right"
    )  # 22; 3 + 2 + 3 = 8
    for values in zip(*held_out):
        assert len(set(values)) in (6, 4, 10)  # each single attribute is seen in both splits
    with pytest.raises(ValueError, match="held-out"):
        split_triples("held-out")  # type: ignore[arg-type]


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("num_objects", [1, 2])
def test_sampled_scenes_keep_to_their_split(split: str, num_objects: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(150):
        spec = sample_spec(rng, split, num_objects)  # type: ignore[arg-type]
        assert len({obj.color for obj in spec.objects}) == num_objects
        assert all(is_held_out(o.color, o.shape, o.motion) == (split == "held_out") for o in spec.objects)


def test_two_objects_never_touch() -> None:
    rng = np.random.default_rng(1)
    u = frame_times(17)
    for _ in range(50):
        a, b = sample_spec(rng, num_objects=2).objects
        assert np.all(np.hypot(*(a.centers(u) - b.centers(u)).T) > a.radii(u) + b.radii(u))
    with pytest.raises(ValueError, match="num_objects is 3"):
        sample_spec(rng, num_objects=3)


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(MOTIONS), st.sampled_from(SHAPES), st.sampled_from(list(SIZES)), st.integers(0, 2**32 - 1))
def test_paths_stay_in_frame_at_1_to_3_px_a_frame(motion: str, shape: str, size: str, seed: int) -> None:
    obj = place_object(np.random.default_rng(seed), "red", shape, size, motion)
    u = frame_times(65)
    centers, radii = obj.centers(u), obj.radii(u)
    corners = centers[:, None] + radii[:, None, None] * np.reshape(EXTENTS[shape], (2, 2))
    assert corners.min() > -1e-9 and corners.max() < 64 + 1e-9
    np.testing.assert_allclose(centers[0], [obj.x, obj.y], atol=1e-9)
    assert np.median(radii) == pytest.approx(SIZES[size])
    steps = np.linalg.norm(np.diff(centers, axis=0), axis=1) * 64 / DURATION  # px a frame
    if motion in ("grow", "shrink", "still"):
        assert steps.max() == 0.0
    else:
        assert steps.max() <= 3.0 + 1e-9 and np.median(steps) >= 0.98  # chords of an orbit are a little short
    dx, dy = centers[-1] - centers[0]
    signs = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
    if motion in signs:
        assert tuple(np.sign(np.round([dx, dy], 9))) == signs[motion]
    if motion == "diagonal":
        assert abs(dx) == pytest.approx(abs(dy))
    if motion == "bounce":
        turns = np.sign(np.diff(centers[:, 1]))
        assert {-1.0, 1.0} <= set(turns) and np.ptp(centers[:, 0]) < 1e-9
    if motion == "orbit":
        distance = np.linalg.norm(centers - _circle_center(obj), axis=1)
        np.testing.assert_allclose(distance, abs(obj.turn_radius), atol=1e-9)
        assert obj.speed * DURATION >= 0.75 * 2 * np.pi * abs(obj.turn_radius) - 1e-9


def _circle_center(obj: ObjectSpec) -> np.ndarray:
    return np.array([obj.x, obj.y]) + obj.turn_radius * np.array([-np.sin(obj.heading), np.cos(obj.heading)])


def test_a_longer_clip_samples_the_same_path_more_finely() -> None:
    obj = sample_spec(np.random.default_rng(3)).objects[0]
    np.testing.assert_allclose(obj.centers(frame_times(33))[::2], obj.centers(frame_times(17)))


def test_captions_name_every_attribute() -> None:
    rng = np.random.default_rng(4)
    seen: dict[tuple[str, ...], str] = {}
    for num_objects in (1, 2):
        for _ in range(100):
            spec = sample_spec(rng, num_objects=num_objects)
            texts = captions(spec)
            assert len(set(texts)) == 3
            for i, text in enumerate(texts):
                for obj in spec.objects:
                    assert f"a {obj.size} {obj.color} {obj.shape} {MOTION_PHRASES[obj.motion][i]}" in text
                assert f"{spec.background} background" in text
                words = tuple(w for o in spec.objects for w in (o.size, o.color, o.shape, o.motion)) + (
                    spec.background,
                )
                assert seen.setdefault((str(i), *words), text) == text
    phrases = [phrase for three in MOTION_PHRASES.values() for phrase in three]
    assert len(set(phrases)) == 3 * len(MOTIONS)  # no two motions share a phrase
    assert captions(SceneSpec((ObjectSpec("red", "circle", "small", "left", 40, 40, 1, np.pi),), "dark"))[0] == (
        "a small red circle moves left over a dark background"
    )


def test_specs_survive_json_exactly() -> None:
    rng = np.random.default_rng(5)
    for num_objects in (1, 2):
        spec = sample_spec(rng, num_objects=num_objects)
        assert SceneSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_prompts_are_balanced(split: str) -> None:
    specs = prompt_specs(240, split, seed=3)  # type: ignore[arg-type]
    assert specs[:50] == prompt_specs(50, split, seed=3)  # type: ignore[arg-type]
    assert specs != prompt_specs(240, split, seed=4)  # type: ignore[arg-type]
    objects = [spec.objects[0] for spec in specs]
    assert all(is_held_out(o.color, o.shape, o.motion) == (split == "held_out") for o in objects)
    vocabulary = {"motion": MOTIONS, "color": tuple(COLORS), "shape": SHAPES, "size": tuple(SIZES)}
    for name, words in vocabulary.items():
        counts = Counter(getattr(o, name) for o in objects)
        assert set(counts) == set(words) and max(counts.values()) - min(counts.values()) <= 8, (name, counts)
    assert set(Counter(spec.background for spec in specs).values()) == {60} and len(BACKGROUNDS) == 4
