"""Batch sizes by tokens: as much work in a step of any bucket, and no forward pass larger than the largest bucket's."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videodit.data.batch_sizes import batch_sizes


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


@pytest.mark.parametrize(
    ("total", "micro", "words"), [(0, 1, "global_batch_size 0 of bucket a"), (1, 0, "micro_batch")]
)
def test_impossible_sizes(total: int, micro: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        batch_sizes({"a": 1}, total, micro, "tokens")
