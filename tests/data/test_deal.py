from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.deal import deal, num_micro_batches
from videodit.data.order import PADDING, GlobalOrder


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(-1, 11), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from([12, 13, 64]),
)
def test_every_row_once_in_full_micro_batches(streams, world, micro_batch_size, num_streams):
    dealt = deal(streams, num_streams, world, micro_batch_size)
    count = num_micro_batches(len(streams), world, micro_batch_size)
    assert dealt.shape == (world, count, micro_batch_size)
    assert count * world * micro_batch_size - len(streams) < world * micro_batch_size  # no micro batch too many
    real = [row for row, stream in enumerate(streams) if stream != PADDING]
    assert sorted(dealt[dealt != PADDING].tolist()) == real


def test_32_clips_on_3_ranks():
    dealt = deal(range(32), 64, 3, 4)
    assert dealt.shape == (3, 3, 4)
    assert Counter(dealt.ravel().tolist()) == Counter(range(32)) + Counter({PADDING: 4})
    assert [int((rows != PADDING).sum()) for rows in dealt] == [11, 11, 10]


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
def test_ranks_own_streams(world):
    """Whole rounds: nobody reads another's stream. The ragged end may, but only what does not fit."""
    order = GlobalOrder({"17x64x64": range(16 * 40 + 5)}, 32, seed=1, num_streams=16)
    for step in range(1, order.steps_per_epoch + 1):
        plan = order.batch(step)
        dealt = deal(plan.streams, plan.num_streams, world, 32 // world)
        for rank in range(world):
            rows = dealt[rank][dealt[rank] != PADDING]
            foreign = sum(plan.streams[row] % world != rank for row in rows)
            assert foreign == 0 or (step == order.steps_per_epoch and foreign <= 5)
            assert step == order.steps_per_epoch or len(rows) == 32 // world


@pytest.mark.parametrize(("world", "shared"), [(32, 2), (24, 3)])
def test_ranks_that_do_not_divide_share_what_they_can(world, shared):
    """Of 8 residues by the greatest common divisor each belongs to `shared` ranks of 24; of 16 to 2 of 32."""
    order = GlobalOrder({"17x64x64": range(16 * 96)}, 96, seed=1, num_streams=16)
    owners: dict[int, set[int]] = {}
    for step in range(1, order.steps_per_epoch + 1):
        plan = order.batch(step)
        for rank, rows in enumerate(deal(plan.streams, plan.num_streams, world, 96 // world)):
            assert (rows != PADDING).all()
            for row in rows.ravel():
                owners.setdefault(plan.streams[row], set()).add(rank)
    assert all(len(ranks) == shared for ranks in owners.values())


def test_what_is_too_much_for_a_rank_goes_to_those_with_room():
    dealt = deal([0, 2, 4, 6], 8, 2, 2)  # all of them rank 0's
    assert dealt.tolist() == [[[0, 1]], [[2, 3]]]
    assert np.array_equal(deal([0, 2, -1, -1], 8, 2, 2), [[[0, 1]], [[-1, -1]]])


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="world 0"):
        deal([0], 64, 0, 1)
    with pytest.raises(ValueError, match="micro_batch_size 0"):
        deal([0], 64, 3, 0)
