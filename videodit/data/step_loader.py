"""Micro batches of one rank, step by step: the order, dealt to ranks, read ahead by workers.

    GlobalOrder -> StepPlan -> deal -> Request --(ClipReader or LatentReader, in workers)--> Rows -> Batch

One Request is one micro batch and one task of a worker. Results come back in order, so the number of workers changes
nothing but time; the order and the samples are the same for any number of ranks.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from videodit.data.batch_sizes import BatchBy, batch_sizes
from videodit.data.batches import Batch, FailureGuard, Request, RowReader, Rows, batch_fields, read_all
from videodit.data.buckets import Bucket
from videodit.data.deal import deal, num_micro_batches
from videodit.data.mixture import ShardsConfig, clip_places, fetch_ahead
from videodit.data.order import PADDING, GlobalOrder, StepPlan
from videodit.data.shards import ShardSet
from videodit.errors import UserError

BatchT = TypeVar("BatchT", bound=Batch)


FETCH_AHEAD_STEPS = 32
"""So many steps before they are read shards that are not on the disk begin to be fetched."""


class _FetchingAhead:
    """A reader that first begins to fetch what will be read in a while."""

    def __init__(self, reader: RowReader, shards: ShardSet) -> None:
        self._reader, self._shards = reader, shards

    def __getitem__(self, request: Request) -> Rows:
        fetch_ahead(self._shards, request.ahead)
        return self._reader[request]


class StepLoader(Generic[BatchT]):
    """Micro batches of this rank, step by step, from any step on.

    Attributes:
        clip_counts: how many clips there are, by bucket.
        order_settings: by name, those that a run must keep for its order to go on.
        batch_sizes: of each bucket that has clips.
        needs_seconds: whether they are by time and wait for `use_seconds`; until then tokens stand for time.

    Args:
        reader: reads one micro batch.
        to_batch: finishes what was read; `fields` are those of Batch.
        members: clip indices by bucket.
        shards: the clips.
        config: which data sets they are, by what weights, in how many streams.
        seed: the run's seed.
        tokens: of one clip of each bucket, or anything proportional.
        global_batch_size, micro_batch_size, batch_by: see `batch_sizes`.
        rank, world: this data-parallel rank of how many.
        num_workers: as in `read_all`.
        windowed_steps: this many steps, the first ones, ask for windows.
    Raises:
        UserError: if there are fewer clips than one global batch takes.
    """

    def __init__(
        self,
        reader: RowReader,
        to_batch: Callable[[Rows, dict[str, Any]], BatchT],
        members: Mapping[Bucket, Sequence[int] | np.ndarray],
        shards: ShardSet,
        config: ShardsConfig,
        *,
        tokens: Mapping[Bucket, int],
        seed: int,
        global_batch_size: int | Mapping[str, int],
        micro_batch_size: int,
        batch_by: BatchBy,
        rank: int,
        world: int,
        num_workers: int,
        windowed_steps: int = 0,
    ) -> None:
        self._is_remote = any(part.cache is not None for part in shards.sets)
        self._reader: RowReader = _FetchingAhead(reader, shards) if self._is_remote else reader
        self._windowed_steps = windowed_steps
        self._to_batch = to_batch
        self._buckets = {bucket.name: bucket for bucket in members}
        self._clips = {bucket.name: clips for bucket, clips in members.items()}
        self._keys = keys = shards.columns.keys
        self._rank, self._world = rank, world
        places = clip_places(shards, config)
        self.order_settings = {"data.streams": config.streams, "data.weights": list(places.weights)}
        self._num_workers, self._prefetch = num_workers, config.prefetch
        self._guard = FailureGuard(keys)
        self.clip_counts = {name: len(clips) for name, clips in self._clips.items()}
        self.num_clips = sum(self.clip_counts.values())
        counts = {bucket.name: tokens[bucket] for bucket, clips in members.items() if len(clips)}
        self.needs_seconds = batch_by == "time" and len(counts) > 1
        self._size_batches = partial(batch_sizes, counts, global_batch_size, micro_batch_size, batch_by, world=world)
        self._make_order = partial(GlobalOrder, self._clips, seed=seed, num_streams=config.streams, places=places)
        self._name = shards.name
        self._set_batches(None)

    def use_seconds(self, seconds: Mapping[str, float]) -> None:
        """Makes the batches of `batch_by: time`; before the first step.

        Args:
            seconds: of one clip of each bucket, the same on every rank.
        Raises:
            UserError: if there are fewer clips than one global batch takes.
        """
        self.needs_seconds = False
        self._set_batches(seconds)

    def _set_batches(self, seconds: Mapping[str, float] | None) -> None:
        try:
            self.batch_sizes = self._size_batches(seconds=seconds)
            totals = {name: size.total for name, size in self.batch_sizes.items()}
            self.order = self._make_order(global_batch_size=totals)
            # Of its own, since an order keeps one epoch at hand and the one that is ahead may be in the next.
            self._order_ahead = self._make_order(global_batch_size=totals) if self._is_remote else None
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.num_clips < min(totals.values()):
            raise UserError(
                f"{self._name} has {self.num_clips} clips for training, fewer than global_batch_size "
                f"{min(totals.values())}: lower global_batch_size to {self.num_clips} or less, or add clips"
            )

    def first_clips(self, bucket: str) -> BatchT:
        """A micro batch of the first clips of a bucket, the same on every rank, for measuring."""
        size = self.batch_sizes[bucket].micro
        ids = [*map(int, self._clips[bucket][:size]), *[PADDING] * size][:size]
        rows = self._reader[Request(self._buckets[bucket], (0,) * size, tuple(ids))]
        return self._to_batch(rows, batch_fields(rows, self._keys))

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, the same on every rank."""
        return self.order.steps_per_epoch

    @property
    def failures(self) -> int:
        """Samples of this rank that could not be read so far."""
        return self._guard.failures

    def keys(self, plan: StepPlan) -> list[str]:
        """The step's samples in global order, without padding; the same on every rank."""
        return [self._keys[clip] for clip in plan.ids if clip != PADDING]

    def iterate(self, start_step: int = 1) -> Generator[tuple[StepPlan, list[BatchT]], None, None]:
        """Steps without end; whoever iterates decides when to stop, and may close it to end the workers.

        Args:
            start_step: first optimizer step, from 1; a resumed run gives its checkpoint's step + 1.
        Yields:
            (plan of the step, this rank's micro batches): every rank gets the same number of them.
        Raises:
            UserError: after 100 samples in a row that could not be read.
        """
        pending: deque[StepPlan] = deque()  # plans whose requests were handed out
        stream = read_all(self._reader, self._requests(start_step, pending), self._num_workers, self._prefetch)
        while True:
            batches = [self._next(stream)]  # makes its plan appear in `pending`
            plan = pending.popleft()
            count = num_micro_batches(len(plan.ids), self._world, self.batch_sizes[plan.bucket].micro)
            batches += [self._next(stream) for _ in range(count - 1)]
            yield plan, batches

    def _requests(self, step: int, pending: deque[StepPlan]) -> Iterator[Request]:
        while True:
            plan = self.order.batch(step)
            pending.append(plan)
            ahead: tuple[int, ...] = ()
            if self._order_ahead is not None:
                later = self._order_ahead.batch(step + FETCH_AHEAD_STEPS)
                ahead = tuple(later.ids[row] for rows in self._dealt(later) for row in rows if row != PADDING)
            for rows in self._dealt(plan):
                ids = tuple(plan.ids[row] if row != PADDING else PADDING for row in rows)
                epochs = tuple(plan.epochs[row] if row != PADDING else plan.epoch for row in rows)
                windowed = step <= self._windowed_steps
                yield Request(self._buckets[plan.bucket], epochs, ids, windowed, ahead)
            step += 1

    def _dealt(self, plan: StepPlan) -> list[list[int]]:
        """Row numbers of this rank's micro batches."""
        micro = self.batch_sizes[plan.bucket].micro
        return deal(plan.streams, plan.num_streams, self._world, micro)[self._rank].tolist()

    def _next(self, stream: Iterator[Rows]) -> BatchT:
        asked = time.perf_counter()
        rows = next(stream)
        self._guard.check(rows)
        batch = self._to_batch(rows, batch_fields(rows, self._keys))
        batch.wait_s = time.perf_counter() - asked
        return batch
