from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.order import PADDING, ClipPlaces, GlobalOrder

BUCKETS = st.dictionaries(
    st.sampled_from(["1x64x64", "17x64x64", "17x48x80"]), st.integers(1, 40), min_size=1, max_size=3
)
STREAMS = st.sampled_from([1, 2, 6, 8, 64])


def make_order(sizes: dict[str, int], global_batch_size: int, seed: int = 0, **options) -> GlobalOrder:
    buckets, first = {}, 0
    for name, size in sizes.items():
        buckets[name] = range(first, first + size)
        first += size
    return GlobalOrder(buckets, global_batch_size, seed, **options)


def epoch_of(order: GlobalOrder, epoch: int) -> list:
    return [order.batch(epoch * order.steps_per_epoch + number + 1) for number in range(order.steps_per_epoch)]


@settings(max_examples=60, deadline=None)
@given(BUCKETS, st.integers(1, 16), STREAMS, st.integers(1, 9), st.integers(0, 3))
def test_every_clip_once_an_epoch(sizes, global_batch_size, num_streams, clips_per_shard, epoch):
    shards = np.arange(sum(sizes.values())) // clips_per_shard
    places = ClipPlaces(shards, np.zeros_like(shards))
    order = make_order(sizes, global_batch_size, num_streams=num_streams, places=places)
    seen = Counter()
    for plan in epoch_of(order, epoch):
        assert plan.epoch == epoch and len(plan.ids) == len(plan.streams) == global_batch_size
        assert plan.epochs == (epoch,) * global_batch_size
        assert [stream == PADDING for stream in plan.streams] == [clip == PADDING for clip in plan.ids]
        seen.update(clip for clip in plan.ids if clip != PADDING)
    assert seen == Counter(range(sum(sizes.values())))


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
        assert len(real) == 4 or plan.bucket not in [later.bucket for later in plans[plan.step :]]


def test_epochs_and_seeds_differ_and_buckets_mix():
    order = make_order({"1x64x64": 40, "17x64x64": 40}, 4)
    epochs = [[order.batch(20 * epoch + position) for position in range(1, 21)] for epoch in range(2)]
    assert [plan.ids for plan in epochs[0]] != [plan.ids for plan in epochs[1]]
    assert [plan.bucket for plan in epochs[0]] != sorted(plan.bucket for plan in epochs[0])
    assert make_order({"1x64x64": 40, "17x64x64": 40}, 4, seed=1).batch(1).ids != epochs[0][0].ids


def test_the_order_is_pinned():
    # Another machine, process or numpy must continue the same run: these numbers may never change.
    order = GlobalOrder({"17x64x64": range(7)}, 3, seed=5)
    assert [order.batch(step).ids for step in (1, 2, 3, 4)] == [(6, 4, 3), (2, 5, 0), (1, -1, -1), (6, 0, 4)]


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
    with pytest.raises(ValueError, match="streams 0"):
        GlobalOrder({"17x64x64": [0]}, 1, 0, num_streams=0)
