from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.order import PADDING, GlobalOrder, deal, num_micro_batches

BUCKETS = st.dictionaries(
    st.sampled_from(["1x64x64", "17x64x64", "17x48x80"]), st.integers(1, 40), min_size=1, max_size=3
)


def make_order(sizes: dict[str, int], global_batch_size: int, seed: int = 0) -> GlobalOrder:
    buckets, first = {}, 0
    for name, size in sizes.items():
        buckets[name] = range(first, first + size)
        first += size
    return GlobalOrder(buckets, global_batch_size, seed)


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.integers(1, 16), st.integers(1, 5), st.integers(1, 5), st.integers(0, 3))
def test_every_clip_once_an_epoch_on_any_number_of_ranks(sizes, global_batch_size, world, micro_batch_size, epoch):
    order = make_order(sizes, global_batch_size)
    seen = Counter()
    for position in range(order.steps_per_epoch):
        plan = order.batch(epoch * order.steps_per_epoch + position + 1)
        assert plan.epoch == epoch and len(plan.ids) == global_batch_size
        for rank in range(world):
            for micro_batch in deal(plan.ids, rank, world, micro_batch_size):
                seen.update(clip for clip in micro_batch if clip != PADDING)
    assert seen == Counter(range(sum(sizes.values())))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 7), st.integers(1, 6))
def test_deal_gives_every_rank_the_same_full_micro_batches(rows, world, micro_batch_size):
    dealt = [deal(range(rows), rank, world, micro_batch_size) for rank in range(world)]
    count = num_micro_batches(rows, world, micro_batch_size)
    assert all([len(batch) for batch in batches] == [micro_batch_size] * count for batches in dealt)
    real = [sum(clip != PADDING for batch in batches for clip in batch) for batches in dealt]
    assert sum(real) == rows and max(real) - min(real) <= 1
    assert count * world * micro_batch_size - rows < world * micro_batch_size  # no micro batch too many


def test_32_clips_on_3_ranks():
    dealt = [deal(range(32), rank, 3, 4) for rank in range(3)]
    assert [len(batches) for batches in dealt] == [3, 3, 3]
    assert Counter(clip for batches in dealt for batch in batches for clip in batch) == Counter(range(32)) + Counter(
        {PADDING: 4}
    )


@settings(max_examples=40, deadline=None)
@given(BUCKETS, st.integers(1, 16), st.integers(1, 60))
def test_resume_at_any_step_is_the_uninterrupted_run(sizes, global_batch_size, step):
    running = make_order(sizes, global_batch_size)
    plans = [running.batch(number) for number in range(1, step + 1)]
    assert make_order(sizes, global_batch_size).batch(step) == plans[-1]
    assert [running.batch(number) for number in range(1, step + 1)] == plans  # and looking back changes nothing


def test_rows_of_a_step_are_of_one_bucket_and_padding_is_at_the_end():
    order = make_order({"1x64x64": 10, "17x64x64": 7}, 4)
    plans = [order.batch(step) for step in range(1, order.steps_per_epoch + 1)]
    assert Counter(plan.bucket for plan in plans) == {"1x64x64": 3, "17x64x64": 2}
    for plan in plans:
        real = [clip for clip in plan.ids if clip != PADDING]
        assert list(plan.ids) == real + [PADDING] * (4 - len(real))
        assert all((clip < 10) == (plan.bucket == "1x64x64") for clip in real)


def test_epochs_and_seeds_differ_and_buckets_mix():
    order = make_order({"1x64x64": 40, "17x64x64": 40}, 4)
    epochs = [[order.batch(20 * epoch + position) for position in range(1, 21)] for epoch in range(2)]
    assert [plan.ids for plan in epochs[0]] != [plan.ids for plan in epochs[1]]
    assert [plan.bucket for plan in epochs[0]] != sorted(plan.bucket for plan in epochs[0])
    assert make_order({"1x64x64": 40, "17x64x64": 40}, 4, seed=1).batch(1).ids != epochs[0][0].ids


def test_the_order_is_pinned():
    # Another machine, process or numpy must continue the same run: these numbers may never change.
    order = GlobalOrder({"17x64x64": range(7)}, 3, seed=5)
    assert [order.batch(step).ids for step in (1, 2, 3, 4)] == [(6, 2, 1), (3, -1, -1), (0, 5, 4), (6, 2, 5)]


def test_batch_sizes_by_bucket():
    order = GlobalOrder(
        {"1x64x64": range(8), "17x64x64": range(8, 16), "5x64x64": []}, {"1x64x64": 8, "17x64x64": 2}, 0
    )
    assert order.steps_per_epoch == 1 + 4
    assert sorted(len(order.batch(step).ids) for step in range(1, 6)) == [2, 2, 2, 2, 8]
    assert order.global_batch_size("1x64x64") == 8


def test_bad_arguments_name_the_value():
    with pytest.raises(ValueError, match="no clip"):
        GlobalOrder({"17x64x64": []}, 4, 0)
    with pytest.raises(ValueError, match="global_batch_size 0"):
        GlobalOrder({"17x64x64": [0]}, 0, 0)
    with pytest.raises(ValueError, match="step 0"):
        GlobalOrder({"17x64x64": [0]}, 1, 0).batch(0)
    with pytest.raises(ValueError, match="rank 3"):
        deal([0], 3, 3, 1)
    with pytest.raises(ValueError, match="micro_batch_size 0"):
        deal([0], 0, 3, 0)
