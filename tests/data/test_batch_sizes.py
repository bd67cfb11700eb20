"""Batch sizes by tokens and by time: a step of any bucket is as much, no forward pass larger than the largest one's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videodit.data.batch_sizes import batch_sizes
from videodit.data.deal import num_micro_batches


@given(
    st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**6), min_size=1, max_size=6),
    st.integers(1, 512),
    st.integers(1, 64),
)
def test_by_tokens(tokens: dict[str, int], total: int, micro: int) -> None:
    sizes = batch_sizes(tokens, total, micro, "tokens")
    most = max(tokens.values())
    for name, count in tokens.items():
        assert sizes[name].micro * count <= micro * most < (sizes[name].micro + 1) * count
        assert abs(sizes[name].total * count - total * most) <= count / 2
        if count == most:
            assert sizes[name] == (total, micro)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.integers(1, 10**6), max_size=6))
def test_by_clips(tokens: dict[str, int]) -> None:
    assert batch_sizes(tokens, 32, 8, "clips") == dict.fromkeys(tokens, (32, 8))
    totals = {name: 1 + number for number, name in enumerate(tokens)}
    assert {name: size.total for name, size in batch_sizes(tokens, totals, 8, "clips").items()} == totals


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3),
        st.tuples(st.integers(1, 10**4), st.floats(1e-3, 10)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 512),
    st.integers(1, 64),
    st.integers(1, 8),
)
def test_by_time(clips: dict[str, tuple[int, float]], total: int, micro: int, world: int) -> None:
    """A step takes what one of the largest bucket does, to half a clip, and padding is less than a row a pass."""
    tokens = {name: count for name, (count, _) in clips.items()}
    seconds = {name: time for name, (_, time) in clips.items()}
    sizes = batch_sizes(tokens, total, micro, "time", seconds=seconds, world=world)
    largest = max(tokens, key=lambda name: (tokens[name], seconds[name]))
    assert sizes[largest].total == total
    for name, (clips_a_step, rows) in sizes.items():
        off = abs(clips_a_step * seconds[name] - total * seconds[largest])
        assert off <= seconds[name] * (0.5 + 1e-9) or (clips_a_step == 1 and total * seconds[largest] < seconds[name])
        assert rows * tokens[name] <= micro * tokens[largest]
        passes = num_micro_batches(clips_a_step, world, rows)
        assert passes * world * (rows - 1) < clips_a_step <= passes * world * rows
        assert passes == num_micro_batches(clips_a_step, world, micro * tokens[largest] // tokens[name])
    slower = {name: 4 * time for name, time in seconds.items()}  # a machine that is slower at everything
    assert batch_sizes(tokens, total, micro, "time", seconds=slower, world=world) == sizes


def test_what_costs_as_its_tokens_has_as_many_clips_as_by_tokens() -> None:
    tokens = {"a": 240, "b": 60, "c": 15}
    by_tokens = batch_sizes(tokens, 32, 8, "tokens")
    for seconds in (None, {name: count / 1000 for name, count in tokens.items()}):
        assert batch_sizes(tokens, 32, 8, "time", seconds=seconds) == by_tokens
    twice = {"a": 0.5, "b": 0.0625, "c": 0.5}  # b at half the cost of a token of a, c at 16 times
    assert batch_sizes(tokens, 32, 8, "time", seconds=twice) == {"a": (32, 8), "b": (256, 32), "c": (32, 32)}


@pytest.mark.parametrize("seconds", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf")}])
def test_impossible_times(seconds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="of a clip of bucket a must be a positive number"):
        batch_sizes({"a": 1}, 1, 1, "time", seconds=seconds)


@pytest.mark.parametrize(
    ("total", "micro", "words"), [(0, 1, "global_batch_size 0 of bucket a"), (1, 0, "micro_batch")]
)
def test_impossible_sizes(total: int, micro: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch_sizes({"a": 1}, total, micro, "tokens")
