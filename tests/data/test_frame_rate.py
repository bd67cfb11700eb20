"""Uneven frames at a constant rate: each moment shows the frame of its time, jitter changes nothing."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.frame_rate import at_constant_rate


def shown(times: list[float | None], fps: float) -> list[int]:
    """Which of the frames that begin at these times each moment shows."""
    frames: Any = (SimpleNamespace(time=time, number=number) for number, time in enumerate(times))
    return list(at_constant_rate(frames, fps, lambda frame: frame.number))  # type: ignore[attr-defined]


@settings(deadline=None)
@given(st.integers(1, 60), st.sampled_from([0.5, 8, 24000 / 1001, 60]), st.integers(0, 99), st.floats(-5, 1e5))
def test_jitter_changes_nothing(count: int, fps: float, seed: int, start_s: float) -> None:
    jitter = np.random.default_rng(seed).uniform(-0.36, 0.36, count)
    assert shown((start_s + (np.arange(count) + jitter) / fps).tolist(), fps) == list(range(count))


@settings(deadline=None)
@given(st.lists(st.floats(0.01, 4), min_size=1, max_size=60), st.sampled_from([1, 12.5, 30]))
def test_each_moment_shows_the_frame_of_its_time(lengths: list[float], fps: float) -> None:
    begins = np.cumsum([0, *lengths])  # in frames of the constant rate
    frames = shown((begins / fps).tolist(), fps)
    assert frames[0] < len(begins) and frames[-1] == len(lengths) and frames == sorted(frames)
    assert abs(len(frames) - 1 - begins[-1]) <= 0.751
    for moment, number in enumerate(frames):
        assert begins[number] <= moment + 0.751
        assert number == len(lengths) or begins[number + 1] >= moment + 0.249


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([], []),
        ([None] * 4, [0, 1, 2, 3]),
        ([5.0, None, 5.2, None, 5.4], [0, 1, 2, 3, 4]),
        ([0, 0.1, 0.2, 0.0, 0.1, 0.2, 0.4], [0, 1, 2, 3, 4, 5, 5, 6]),  # the times begin anew
        ([0, 0.1, 95443.7, 95443.8, 95443.9], [0, 1, 2, 3, 4]),  # and jump by the 33 bits of an MPEG stream
        ([0, 0.1, 0.5, 0.6], [0, 1, 1, 1, 1, 2, 3]),
        ([0, 0.02, 0.04, 0.06, 0.08, 0.1], [1, 5]),
    ],
)
def test_holes_jumps_and_crowds(times: list[float | None], expected: list[int]) -> None:
    assert shown(times, 10) == expected


def test_a_frame_is_converted_once_however_long_it_stays() -> None:
    frames: Any = iter([SimpleNamespace(time=time) for time in (0.0, 0.01, 2.0)])
    made: list[object] = []
    pictures = list(at_constant_rate(frames, 10, lambda frame: made.append(frame) or len(made)))
    assert pictures == [1] * 20 + [2]
