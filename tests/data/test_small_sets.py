"""Few clips, many ranks, real workers: a correct epoch or a clear error, never a hang or a step of nothing."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_loader import write_clips, write_latents
from videodit.data.clip_reader import DataConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.loader import ClipLoader, LatentLoader
from videodit.data.order import PADDING
from videodit.data.step_loader import StepLoader
from videodit.errors import UserError

LIMIT_S = 120
COUNTS = (1, 2, 3, 4, 5)


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fails what takes longer, also if it waits for a worker."""

    def fail(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"it hangs: not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def check_steps(loaders: list[StepLoader], first: int, last: int) -> None:
    """In each step the ranks have what the order says, each row once, as many micro batches, and something to learn."""
    plans = [loaders[0].order.batch(step) for step in range(first, last + 1)]
    found: list[list[int]] = [[] for _ in plans]
    lengths: list[set[int]] = [set() for _ in plans]
    for loader in loaders:
        steps = loader.iterate(first)
        for number, (plan, batches) in enumerate(islice(steps, len(plans))):
            assert plan == plans[number]
            lengths[number].add(len(batches))
            for batch in batches:
                assert batch.bucket.name == plan.bucket and len(batch.ids) == loader.batch_sizes[plan.bucket].micro
                assert batch.weight.tolist() == [float(clip != PADDING) for clip in batch.ids]
                found[number] += [clip for clip in batch.ids if clip != PADDING]
        steps.close()
    for plan, ids, length in zip(plans, found, lengths, strict=True):
        wanted = [clip for clip in plan.ids if clip != PADDING]
        assert wanted and sorted(ids) == sorted(wanted) and len(length) == 1, plan


def check_epochs(loaders: list[StepLoader], num_clips: int, epochs: int = 2) -> None:
    """And every clip comes once an epoch."""
    length = loaders[0].steps_per_epoch
    check_steps(loaders, 1, epochs * length)
    for epoch in range(epochs):
        plans = [loaders[0].order.batch(epoch * length + step) for step in range(1, length + 1)]
        assert sorted(clip for plan in plans for clip in plan.ids if clip != PADDING) == list(range(num_clips))


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """By kind and number of clips: pixels of one length, latents of two buckets; all in one shard but the largest."""
    root = tmp_path_factory.mktemp("sets")
    for count in COUNTS:
        write_clips(root / f"clips-{count}", range(count))
        write_latents(root / f"latents-{count}", count)
    return root


@pytest.mark.parametrize(
    ("world", "num_workers"),
    [(1, 0), (2, 0), (8, 0), (2, 2), *(pytest.param(world, 2, marks=pytest.mark.slow) for world in (1, 8))],
)
@pytest.mark.parametrize("kind", ["clips", "latents"])
def test_fewer_clips_than_ranks_one_shard_and_an_empty_bucket(sets, kind, world, num_workers):
    def loaders(count: int, batch: int, micro: int) -> list[StepLoader]:
        folder, made = str(sets / f"{kind}-{count}"), []
        for rank in range(world):
            sizes = {"seed": 3, "global_batch_size": batch, "micro_batch_size": micro, "rank": rank, "world": world}
            if kind == "latents":
                made.append(LatentLoader(LatentDataConfig(folder, num_workers=num_workers, cache_gib=0), **sizes))
                continue
            config = DataConfig(folder, num_workers=num_workers, buckets=["5x32x32", "9x32x32"], cache_decoded=False)
            made.append(ClipLoader(config, **sizes))  # no clip has 9 frames
        return made

    for count in COUNTS:
        for batch, micro in ((1, 1), (count, 2)):
            with within(LIMIT_S):
                check_epochs(loaders(count, batch, micro), count)
        with pytest.raises(UserError, match=f"has {count} clips .* lower global_batch_size to {count} or less"):
            loaders(count, count + 1, 1)


@pytest.fixture(scope="module")
def latents_of(tmp_path_factory):
    """Latents of so many clips, a third of them in a bucket of its own, made once."""
    root = tmp_path_factory.mktemp("latents")

    def folder(count):
        if not (root / str(count)).exists():
            write_latents(root / str(count), count)
        return str(root / str(count))

    return folder


@settings(max_examples=12)
@given(st.data())
def test_any_ranks_workers_and_start_read_the_global_order(latents_of, data):
    count = data.draw(st.integers(1, 14), "clips")
    batch = data.draw(st.integers(1, count), "global batch size")
    micro, world = data.draw(st.integers(1, 4), "micro batch size"), data.draw(st.integers(1, 4), "ranks")
    workers, prefetch = data.draw(st.integers(0, 1), "workers"), data.draw(st.integers(1, 3), "prefetch")
    config = LatentDataConfig(latents_of(count), num_workers=workers, prefetch=prefetch, cache_gib=0)
    loaders = [
        LatentLoader(config, seed=count, global_batch_size=batch, micro_batch_size=micro, rank=rank, world=world)
        for rank in range(world)
    ]
    first = data.draw(st.integers(1, 3 * loaders[0].steps_per_epoch), "first step")
    with within(LIMIT_S):
        check_steps(loaders, first, first + loaders[0].steps_per_epoch)
        epoch = -(-first // loaders[0].steps_per_epoch) * loaders[0].steps_per_epoch
        plans = [loaders[0].order.batch(epoch + step) for step in range(1, loaders[0].steps_per_epoch + 1)]
    assert sorted(clip for plan in plans for clip in plan.ids if clip != PADDING) == list(range(count))
