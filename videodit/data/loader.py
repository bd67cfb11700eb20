"""What training iterates over: clips in pixels for the VAE, latents for the DiT, clips in order for encoding."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from videodit.data.batch_sizes import BatchBy
from videodit.data.batches import ClipBatch, FailureGuard, LatentBatch, Request, Rows, batch_fields, read_all
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.clip_reader import ClipReader, DataConfig
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig, LatentReader
from videodit.data.mixture import open_shards
from videodit.data.order import PADDING
from videodit.data.shards import ShardSet
from videodit.data.step_loader import StepLoader


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
        self.shards = open_shards(config)
        reader = ClipReader(self.shards, config, seed, config.random_crop, statistics)
        grouping = reader.group(multiple)
        self.num_dropped = len(grouping.dropped)
        super().__init__(
            reader,
            _clip_batch,
            grouping.members,
            self.shards,
            config,
            tokens={bucket: bucket.latent_frames * bucket.height * bucket.width for bucket in grouping.members},
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            batch_by=batch_by,
            rank=rank,
            world=world,
            num_workers=config.num_workers,
        )


class LatentLoader(StepLoader[LatentBatch]):
    """Latents for DiT training.

    Args:
        config: where the latents are, and how often captions are dropped.
        seed, global_batch_size, micro_batch_size, batch_by, rank, world: as in StepLoader.
        crop: windows that the first crop_steps steps read; the others read whole latents.
        patch: rows and columns of the DiT's patch: windows start on its grid.
        posterior: whether batches have the posteriors' log-variances beside their means.
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
        posterior: bool = True,
    ) -> None:
        self.shards = open_shards(config)
        reader = LatentReader(self.shards, config, seed, crop or LatentCropConfig(), patch, posterior=posterior)
        self.latent_shapes = reader.latent_shapes
        super().__init__(
            reader,
            _latent_batch,
            reader.members,
            self.shards,
            config,
            tokens={bucket: t * h * w for bucket, (_, t, h, w) in reader.latent_shapes.items()},
            seed=seed,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            batch_by=batch_by,
            rank=rank,
            world=world,
            num_workers=0 if reader.in_memory else config.num_workers,
            windowed_steps=crop_steps,
        )


def read_latents(reader: LatentReader, requests: Iterable[Request]) -> Iterator[LatentBatch]:
    """Latents of these requests in this process, for measuring.

    Raises:
        UserError: after 100 samples in a row that could not be read.
    """
    keys = reader.shards.columns.keys
    guard = FailureGuard(keys)
    for rows in map(reader.__getitem__, requests):
        guard.check(rows)
        yield _latent_batch(rows, batch_fields(rows, keys))


def _latent_batch(rows: Rows, fields: dict[str, Any]) -> LatentBatch:
    tensors, names = rows.tensors, ("logvar", "text", "text_mask", "origin", "micro_conditions")
    optional: dict[str, Any] = {name: tensors.get(name) for name in names}
    return LatentBatch(mean=tensors["mean"], **optional, **fields)


def _clip_batch(rows: Rows, fields: dict[str, Any]) -> ClipBatch:
    return ClipBatch(frames=rows.tensors["clip"], cuts=rows.cuts, **fields)


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

    Of several data sets each comes as far as the others at any moment, so that the first few clips are of all.

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
    requests = []
    progress = np.concatenate([np.arange(len(part)) / len(part) for part in shards.sets])
    for bucket, members in reader.group(multiple).members.items():
        clips = sorted(members, key=progress.__getitem__)
        for start in range(rank * micro_batch_size, len(clips), world * micro_batch_size):
            ids = clips[start : start + micro_batch_size]
            ids = ids + [PADDING] * (micro_batch_size - len(ids))
            requests.append(Request(bucket, (0,) * micro_batch_size, tuple(ids)))
    yield from read_clips(reader, requests)


def read_clips(reader: ClipReader, requests: Iterable[Request]) -> Iterator[ClipBatch]:
    """Clips of these requests, read ahead by as many processes as the reader's config says.

    Raises:
        UserError: after 100 samples in a row that could not be read.
    """
    keys = reader.shards.columns.keys
    guard = FailureGuard(keys)
    for rows in read_all(reader, requests, reader.config.num_workers, reader.config.prefetch):
        guard.check(rows)
        yield _clip_batch(rows, batch_fields(rows, keys))
