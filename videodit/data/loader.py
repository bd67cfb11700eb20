"""What training iterates over: clips in pixels for the VAE, latents for the DiT, clips in order for encoding.

    GlobalOrder -> StepPlan -> deal -> Request --(ClipReader or LatentReader, in workers)--> Rows -> Batch

One Request is one micro batch and one task of a worker. Results come back in order, so the number of workers changes
nothing but time; the order and the samples are the same for any number of ranks.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Generic, TypeVar

from videodit.data.batch_sizes import BatchBy, batch_sizes
from videodit.data.batches import (
    Batch,
    ClipBatch,
    FailureGuard,
    LatentBatch,
    Request,
    RowReader,
    Rows,
    batch_fields,
    read_all,
)
from videodit.data.buckets import Bucket
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.clip_reader import ClipReader, DataConfig
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig, LatentReader
from videodit.data.order import PADDING, GlobalOrder, StepPlan, deal, num_micro_batches
from videodit.data.shards import ShardSet
from videodit.data.transforms import to_model_range
from videodit.errors import UserError

BatchT = TypeVar("BatchT", bound=Batch)


class StepLoader(Generic[BatchT]):
    """Micro batches of this rank, step by step, from any step on.

    Args:
        reader: reads one micro batch.
        to_batch: finishes what was read; `fields` are those of Batch.
        members: clip indices by bucket.
        keys: sample key by clip index.
        source: the folder, for messages.
        seed: the run's seed.
        tokens: of one clip of each bucket, or anything proportional.
        global_batch_size, micro_batch_size, batch_by: see `batch_sizes`.
        rank, world: this data-parallel rank of how many.
        num_workers, prefetch: as in `read_all`.
        windowed_steps: this many steps, the first ones, ask for windows.
    Raises:
        UserError: if there are fewer clips than one global batch takes.
    """

    def __init__(
        self,
        reader: RowReader,
        to_batch: Callable[[Rows, dict[str, Any]], BatchT],
        members: Mapping[Bucket, Sequence[int]],
        keys: Sequence[str],
        source: str,
        *,
        tokens: Mapping[Bucket, int],
        seed: int,
        global_batch_size: int | Mapping[str, int],
        micro_batch_size: int,
        batch_by: BatchBy,
        rank: int,
        world: int,
        num_workers: int,
        prefetch: int,
        windowed_steps: int = 0,
    ) -> None:
        self._reader = reader
        self._windowed_steps = windowed_steps
        self._to_batch = to_batch
        self._buckets = {bucket.name: bucket for bucket in members}
        self._keys = keys
        self._rank, self._world = rank, world
        self._num_workers, self._prefetch = num_workers, prefetch
        self._guard = FailureGuard(keys)
        self.num_clips = sum(len(clips) for clips in members.values())
        counts = {bucket.name: tokens[bucket] for bucket, clips in members.items() if clips}
        try:
            self.batch_sizes = batch_sizes(counts, global_batch_size, micro_batch_size, batch_by)
            totals = {name: size.total for name, size in self.batch_sizes.items()}
            self.order = GlobalOrder({bucket.name: members[bucket] for bucket in members}, totals, seed)
        except ValueError as error:
            raise UserError(str(error)) from error
        if self.num_clips < min(totals.values()):
            raise UserError(
                f"{source} has {self.num_clips} clips for training, fewer than global_batch_size "
                f"{min(totals.values())}: lower global_batch_size to {self.num_clips} or less, or add clips"
            )

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

    def iterate(self, start_step: int = 1) -> Iterator[tuple[StepPlan, list[BatchT]]]:
        """Steps without end; whoever iterates decides when to stop.

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
            for ids in deal(plan.ids, self._rank, self._world, self.batch_sizes[plan.bucket].micro):
                yield Request(self._buckets[plan.bucket], plan.epoch, tuple(ids), windowed=step <= self._windowed_steps)
            step += 1

    def _next(self, stream: Iterator[Rows]) -> BatchT:
        asked = time.perf_counter()
        rows = next(stream)
        self._guard.check(rows)
        batch = self._to_batch(rows, batch_fields(rows, self._keys))
        batch.wait_s = time.perf_counter() - asked
        return batch


class ClipLoader(StepLoader[ClipBatch]):
    """Clips in pixels for training.

    Args:
        config: where the clips are, and how they are cut.
        seed, global_batch_size, micro_batch_size, batch_by, rank, world: as in StepLoader.
        multiple: what a bucket's height and width must be divisible by.
        statistics: as in ClipReader.
    Raises:
        UserError: if there are no shards, no clip fits, or there are fewer clips than a global batch.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int | Mapping[str, int],
        micro_batch_size: int,
        batch_by: BatchBy = "clips",
        rank: int = 0,
        world: int = 1,
        multiple: int = 16,
        statistics: ChannelStatistics | None = None,
    ) -> None:
        self.shards = ShardSet.open(config.shards)
        reader = ClipReader(self.shards, config, seed, config.random_crop, statistics)
        grouping = reader.group(multiple)
        self.num_dropped = len(grouping.dropped)
        super().__init__(
            reader,
            _clip_batch,
            grouping.members,
            [entry.key for entry in self.shards.entries],
            config.shards,
            tokens={bucket: bucket.latent_frames * bucket.height * bucket.width for bucket in grouping.members},
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            batch_by=batch_by,
            rank=rank,
            world=world,
            num_workers=config.num_workers,
            prefetch=config.prefetch,
        )


class LatentLoader(StepLoader[LatentBatch]):
    """Latents for DiT training.

    Args:
        config: where the latents are, and how often captions are dropped.
        seed, global_batch_size, micro_batch_size, batch_by, rank, world: as in StepLoader.
        crop: windows that the first crop_steps steps read; the others read whole latents.
        patch: rows and columns of the DiT's patch: windows start on its grid.
    Raises:
        UserError: if there are no latents, or fewer than a global batch.
    """

    def __init__(
        self,
        config: LatentDataConfig,
        *,
        seed: int,
        global_batch_size: int | Mapping[str, int],
        micro_batch_size: int,
        batch_by: BatchBy = "clips",
        rank: int = 0,
        world: int = 1,
        crop: LatentCropConfig | None = None,
        crop_steps: int = 0,
        patch: tuple[int, int] = (1, 1),
    ) -> None:
        self.shards = ShardSet.open(config.shards)
        reader = LatentReader(self.shards, config, seed, crop or LatentCropConfig(), patch)
        self.latent_shapes = reader.latent_shapes
        super().__init__(
            reader,
            _latent_batch,
            reader.members,
            [entry.key for entry in self.shards.entries],
            config.shards,
            tokens={bucket: t * h * w for bucket, (_, t, h, w) in reader.latent_shapes.items()},
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            batch_by=batch_by,
            rank=rank,
            world=world,
            num_workers=0 if reader.in_memory else config.num_workers,
            prefetch=config.prefetch,
            windowed_steps=crop_steps,
        )


def _latent_batch(rows: Rows, fields: dict[str, Any]) -> LatentBatch:
    tensors = rows.tensors
    optional: dict[str, Any] = {name: tensors.get(name) for name in ("text", "text_mask", "origin")}
    return LatentBatch(mean=tensors["mean"], logvar=tensors["logvar"], **optional, **fields)


def _clip_batch(rows: Rows, fields: dict[str, Any]) -> ClipBatch:
    return ClipBatch(clip=to_model_range(rows.tensors["clip"]), **fields)


def clips_in_order(
    config: DataConfig,
    shards: ShardSet,
    micro_batch_size: int,
    *,
    rank: int = 0,
    world: int = 1,
    multiple: int = 16,
    statistics: ChannelStatistics | None = None,
) -> Iterator[ClipBatch]:
    """Every clip once, cut from the middle, bucket by bucket, in the shards' order: for encoding and measuring.

    Args:
        config: as in ClipLoader; `random_crop` and the cache are not used.
        shards: the clips; ids in the batches are its indices.
        micro_batch_size: rows; a bucket's last batch is padded.
        rank, world: this rank takes every world-th batch of a bucket.
        multiple: what a bucket's height and width must be divisible by.
        statistics: as in ClipReader.
    Yields:
        Micro batches; captions are the first epoch's choice: read `shards.captions(id)` for all of them.
    Raises:
        UserError: if no clip fits, or after 100 samples in a row that could not be read.
    """
    reader = ClipReader(shards, replace(config, cache_decoded=False), seed=0, random_crop=False, statistics=statistics)
    keys = [entry.key for entry in shards.entries]
    guard = FailureGuard(keys)
    requests = []
    for bucket, clips in reader.group(multiple).members.items():
        batches = deal(clips, 0, 1, micro_batch_size)
        requests += [Request(bucket, 0, tuple(ids)) for ids in batches[rank::world]]
    for rows in read_all(reader, requests, config.num_workers, config.prefetch):
        guard.check(rows)
        yield _clip_batch(rows, batch_fields(rows, keys))
