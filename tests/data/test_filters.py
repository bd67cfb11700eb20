"""Thresholds at their edges, and near-duplicates against comparing every pair."""

import dataclasses
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.filters import THRESHOLDS, FilterConfig, duplicates, funnel, judge
from videodit.data.scores import HASH_BITS, ClipScores, hash_distance

META: dict[str, Any] = {"height": 240, "width": 320, "num_frames": 40, "fps": 8.0}
META |= {
    "brightness": 0.5,
    "sharpness": 100.0,
    "motion": 0.2,
    "static": 0.1,
    "text_cover": 0.02,
    "text_match": 0.25,
    "aesthetic": 5.0,
    "picture_hash": "0" * 48,
}
LIMITS = {  # each as it just lets META pass, and as it just does not
    "min_short_side": (240, 241),
    "min_duration_s": (5.0, 5.1),
    "min_brightness": (0.5, 0.51),
    "max_brightness": (0.5, 0.49),
    "min_sharpness": (100.0, 100.1),
    "min_motion": (0.2, 0.21),
    "max_motion": (0.2, 0.19),
    "max_static": (0.1, 0.09),
    "max_text": (0.02, 0.01),
    "min_match": (0.25, 0.26),
    "min_aesthetic": (5.0, 5.1),
}


@pytest.mark.parametrize("setting", [field.name for field in dataclasses.fields(FilterConfig)][:-1])
def test_each_threshold_at_its_edge(setting: str) -> None:
    passes, fails = LIMITS[setting]
    assert judge([META], ["a"], FilterConfig(**{setting: passes})) == [None]
    (verdict,) = judge([META], ["a"], FilterConfig(**{setting: fails}))
    assert verdict is not None and verdict.setting == setting
    assert f"{setting} {fails:g}" in verdict.reason


def test_every_score_has_a_threshold_and_clips_without_scores_pass() -> None:
    measured = {field.name for field in dataclasses.fields(ClipScores)} - {"picture_hash"}
    assert measured <= {threshold.score for threshold in THRESHOLDS}
    strict = FilterConfig(min_motion=9, min_sharpness=9e9, max_static=0, min_duration_s=99, duplicate_bits=12)
    assert judge([{}, {}], ["a", "b"], strict) == [None, None]


def test_the_first_failure_is_the_reason_and_is_counted_once() -> None:
    config = FilterConfig(min_brightness=0.9, min_motion=0.9, duplicate_bits=0)
    dark, still = META | {"motion": 1.0}, META | {"brightness": 1.0}
    good = META | {"brightness": 1.0, "motion": 1.0}
    verdicts = judge([dark, still, META, good, good], list("abcde"), config)
    stages = funnel(verdicts, list("abcde"))
    assert {name: stage.clips for name, stage in stages.items()} == {
        "min_brightness": 2,
        "min_motion": 1,
        "duplicate_bits": 1,
    }
    assert stages["duplicate_bits"].example == f"e: duplicate of d, 0 of {HASH_BITS} bits differ"


def test_what_is_filtered_does_not_make_a_duplicate() -> None:
    """The dark copy comes first, but the bright one has to stay."""
    verdicts = judge([META | {"brightness": 0.0}, META], ["a", "b"], FilterConfig(min_brightness=0.1, duplicate_bits=0))
    assert [verdict and verdict.setting for verdict in verdicts] == ["min_brightness", None]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 47), st.integers(0, 2**32), st.integers(1, 40))
def test_duplicates_are_those_of_comparing_all_pairs(most_bits: int, seed: int, count: int) -> None:
    import random

    rng = random.Random(seed)
    centers = [rng.getrandbits(HASH_BITS) for _ in range(4)]
    values = []
    for _ in range(count):
        value = rng.choice(centers)
        for bit in rng.sample(range(HASH_BITS), rng.choice([0, 1, most_bits // 2, most_bits, most_bits + 1])):
            value ^= 1 << bit
        values.append(f"{value:048x}")
    expected: dict[int, int] = {}
    for index, text in enumerate(values):
        stays = [other for other in range(index) if other not in expected]
        near = [other for other in stays if hash_distance(text, values[other]) <= most_bits]
        if near:
            expected[index] = near[0]
    assert duplicates(dict(enumerate(values)), most_bits) == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"min_motion": -1}, "filters.min_motion is -1"),
        ({"max_brightness": 2}, "filters.max_brightness is 2"),
        ({"min_brightness": 0.6, "max_brightness": 0.5}, "no clip would be left"),
        ({"min_motion": 3, "max_motion": 2}, "no clip would be left"),
        ({"duplicate_bits": 48}, "-1 (keep all) to 47"),
        ({"max_static": float("nan")}, "filters.max_static is nan"),
    ],
)
def test_impossible_thresholds_are_refused(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        FilterConfig(**values)
    assert words in str(caught.value)
