import hashlib
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.deal import deal
from videodit.data.order import PADDING, ClipPlaces, GlobalOrder
from videodit.data.streams import MIN_CLIPS, SHUFFLED_SHARDS, ClipStreams, fitting_streams, interleave


def in_shards(num_clips: int, clips_per_shard: int) -> ClipPlaces:
    shards = np.arange(num_clips) // clips_per_shard
    return ClipPlaces(shards, np.zeros_like(shards))


def rows_of(order: GlobalOrder, epoch: int) -> list[tuple[int, int, int]]:
    """(clip, its set's epoch, stream) in order."""
    plans = [order.batch(epoch * order.steps_per_epoch + number + 1) for number in range(order.steps_per_epoch)]
    return [row for plan in plans for row in zip(plan.ids, plan.epochs, plan.streams, strict=True) if row[0] != PADDING]


SETS = st.tuples(st.integers(1, 1500), st.integers(1, 50), st.sampled_from([1, 2, 6, 8, 64]))


@settings(max_examples=60, deadline=None)
@given(SETS, st.integers(0, 3), st.booleans())
def test_streams_are_alike_long_fixed_and_of_neighbouring_shards(shape, epoch, two_buckets):
    num_clips, clips_per_shard, num_streams = shape
    buckets = {"a": range(0, num_clips, 2), "b": range(1, num_clips, 2)} if two_buckets else {"a": range(num_clips)}
    places = in_shards(num_clips, clips_per_shard)
    order = GlobalOrder(buckets, 8, 0, num_streams, places)
    rows = rows_of(order, epoch)
    assert {(clip, stream) for clip, _, stream in rows} == {(clip, stream) for clip, _, stream in rows_of(order, 7)}
    for clips in buckets.values():
        of_bucket = [(clip, stream) for clip, _, stream in rows if clip in clips]
        lengths = Counter(stream for _, stream in of_bucket)
        sizes = [lengths[stream] for stream in range(fitting_streams(len(clips), num_streams))]
        assert max(sizes) - min(sizes) <= 1
        assert [stream for _, stream in sorted(of_bucket)] == sorted(stream for _, stream in of_bucket)


@settings(max_examples=60, deadline=None)
@given(SETS, st.integers(0, 3))
def test_a_stream_has_no_more_than_two_shards_open(shape, epoch):
    """What has been read of but not to the end: it is what a cache has to hold of a stream."""
    num_clips, clips_per_shard, num_streams = shape
    places = in_shards(num_clips, clips_per_shard)
    rows = rows_of(GlobalOrder({"a": range(num_clips)}, 8, 0, num_streams, places), epoch)
    for stream in range(num_streams):
        shards = [int(places.shards[clip]) for clip, _, of in rows if of == stream]
        open_now = [
            len(set(shards[: number + 1]) & set(shards[number:])) for number in range(len(shards))
        ]  # begun, and not finished
        assert max(open_now, default=0) <= SHUFFLED_SHARDS


@settings(max_examples=30, deadline=None)
@given(st.integers(256, 800), st.integers(1, 50), st.sampled_from([1, 2, 4, 8]), st.integers(1, 4))
def test_a_rank_reads_its_own_shards(num_clips, clips_per_shard, world, micro_batch_size):
    """As many as its streams' clips fill, and two more for each stream, whose ends lie within shards."""
    num_streams, batch = 8, 8 * micro_batch_size
    places = in_shards(num_clips, clips_per_shard)
    order = GlobalOrder({"a": range(num_clips)}, batch, 0, num_streams, places)
    read: dict[int, set[int]] = {rank: set() for rank in range(world)}
    for step in range(1, 2 * order.steps_per_epoch + 1):
        plan = order.batch(step)
        if PADDING in plan.ids:
            continue  # the ragged end, where rows may be dealt to ranks with room
        for rank, rows in enumerate(deal(plan.streams, plan.num_streams, world, micro_batch_size)):
            read[rank] |= {int(places.shards[plan.ids[row]]) for row in rows.ravel()}
    for shards in read.values():
        assert len(shards) <= num_streams / world * ((num_clips / num_streams + 1) / clips_per_shard + 2)


@pytest.mark.parametrize("num_streams", [8, 12, 64])
def test_rows_in_line_are_of_different_ranks_for_every_world_that_divides(num_streams):
    clips = np.arange(40 * num_streams)
    visits = ClipStreams(clips, clips // 7, num_streams, 1.0, 0, "a").visits(0)
    streams = interleave(visits, num_streams, 0, 0, "a").streams
    for world in range(1, num_streams + 1):
        if num_streams % world == 0:
            lines = np.sort(streams.reshape(-1, world) % world, axis=1)
            assert np.array_equal(lines, np.broadcast_to(np.arange(world), lines.shape))


def test_clips_of_different_streams_meet_as_often_as_chance_has_it():
    """4,000 clips, 64 a step, as the demo: two clips of different streams meet in one epoch of about 62.5."""
    order = GlobalOrder({"a": range(4000)}, 64, 0, 64, in_shards(4000, 1000))
    epochs, of = 200, np.zeros((200, 4000), dtype=np.int64)
    for epoch in range(epochs):
        for number in range(order.steps_per_epoch):
            plan = order.batch(epoch * order.steps_per_epoch + number + 1)
            of[epoch, [clip for clip in plan.ids if clip != PADDING]] = number
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 4000, (20_000, 2))
    apart = abs(pairs[:, 0] - pairs[:, 1]) > 63
    met = (of[:, pairs[apart, 0]] == of[:, pairs[apart, 1]]).sum(axis=0)
    chance = 1 / 62.5
    assert abs(met.mean() / (epochs * chance) - 1) < 0.02
    # And evenly: the spread over pairs is that of as many throws of a coin.
    assert abs(met.var() / (epochs * chance * (1 - chance)) - 1) < 0.05
    # Clips of one stream do not meet, but in the last step.
    near = np.flatnonzero(of[:, 100] == of[:, 101])
    assert (of[near, 100] == order.steps_per_epoch - 1).all()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 60), st.sampled_from([0.2, 0.5, 1.0, 1.5, 2.0, 3.7])), min_size=1, max_size=3),
    st.sampled_from([1, 6, 64]),
    st.integers(1, 9),
)
def test_each_set_is_seen_by_its_weight(sets, num_streams, batch):
    """Every epoch has weight x clips of a set, and each clip comes once before any comes again; never twice alike."""
    sizes, weights = [size for size, _ in sets], tuple(weight for _, weight in sets)
    owner = np.repeat(np.arange(len(sets)), sizes)
    places = ClipPlaces(np.arange(len(owner)) // 5, owner, weights)
    order = GlobalOrder({"a": range(len(owner))}, batch, 0, num_streams, places)
    total: list[tuple[int, int]] = []
    for epoch in range(6):
        rows = rows_of(order, epoch)
        count = Counter(owner[clip] for clip, _, _ in rows)
        assert [count[number] for number in range(len(sets))] == [max(1, round(w * size)) for size, w in sets]
        total += [(clip, own_epoch) for clip, own_epoch, _ in rows]
        times = Counter(clip for clip, _ in total)
        for number in range(len(sets)):
            of_set = [times[clip] for clip in np.flatnonzero(owner == number)]
            assert max(of_set) - min(of_set) <= 1
    assert len(set(total)) == len(total)
    for clip, times in Counter(clip for clip, _ in total).items():
        assert {(clip, own_epoch) for own_epoch in range(times)} <= set(total)


def test_sets_are_mixed_all_through_an_epoch():
    owner = np.repeat([0, 1], [3000, 1000])
    order = GlobalOrder({"a": range(4000)}, 50, 0, 8, ClipPlaces(np.arange(4000) // 100, owner, (1.0, 2.0)))
    second = np.array([clip >= 3000 for clip, _, _ in rows_of(order, 0)]).reshape(-1, 250)
    assert (abs(second.mean(axis=1) - 0.4) < 0.15).all()


def test_short_streams_are_fewer():
    assert [fitting_streams(n, 64) for n in (1, 63, 64, 127, 128, 2047, 2048, 10**6)] == [1, 1, 2, 2, 4, 32, 64, 64]
    assert [fitting_streams(12 * MIN_CLIPS, streams) for streams in (12, 13, 24)] == [12, 1, 12]
    # One stream is a permutation like any other: all 24 orders of four clips come, about equally often.
    orders = Counter(tuple(GlobalOrder({"a": range(4)}, 4, seed).batch(1).ids) for seed in range(2400))
    assert len(orders) == 24 and max(orders.values()) < 150 and min(orders.values()) > 60


def test_the_order_of_streams_and_sets_is_pinned():
    # Another machine, process or numpy must continue the same run: these numbers may never change.
    owner = np.repeat([0, 1], [100, 40])
    order = GlobalOrder({"a": range(140)}, 6, 3, 4, ClipPlaces(np.arange(140) // 10, owner, (1.0, 1.5)))
    assert order.steps_per_epoch == 27 and order.batch(1).num_streams == 4
    plans = [order.batch(step) for step in (1, 27, 28)]
    assert [plan.ids for plan in plans] == [
        (8, 80, 124, 46, 87, 15),
        (23, 119, 120, 93, -1, -1),
        (75, 21, 114, 62, 64, 26),
    ]
    assert [plan.epochs for plan in plans] == [(0, 0, 0, 0, 0, 0), (0, 1, 1, 0, 0, 0), (1, 1, 1, 1, 1, 1)]
    epochs = [rows_of(order, epoch) for epoch in range(3)]
    assert hashlib.sha256(repr(epochs).encode()).hexdigest()[:16] == "466d06e4a9e883f7"
