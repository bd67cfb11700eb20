"""Reading clips in pixels: which bucket, which frames, which crop, which caption."""

import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor

from videodit.data.batches import Request, Rows, check_workers, choose_caption
from videodit.data.buckets import Bucket, Grouping, group, parse_bucket
from videodit.data.decoded_cache import DecodedCache, decoded_bytes
from videodit.data.order import PADDING
from videodit.data.randomness import sample_rng
from videodit.data.shards import ShardSet
from videodit.data.transforms import frame_stride, frames_after_stride, resize_and_crop, temporal_window
from videodit.data.video_io import VideoError, read_frames
from videodit.errors import UserError

CLIP_EXTENSIONS = ("mp4", "jpg", "jpeg", "png", "webp")
"""Members that hold a clip's pixels, in order of preference; a picture is a clip of one frame."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class DataConfig:
    """Clips in pixels, as VAE training and encoding read them."""

    shards: str = ""
    """Folder of shards, as `videodit ingest` writes them; any webdataset of mp4 + json."""
    buckets: list[str] = field(default_factory=lambda: ["17x64x64"])
    """Clip shapes, FRAMESxHEIGHTxWIDTH, frames 4k+1. A clip goes to the nearest in aspect ratio, not longer than it."""
    fps: float | None = None
    """Frames per second: every n-th frame is taken, with the n that comes nearest. None keeps every clip's own rate."""
    random_crop: bool = True
    """Draw the window in time and the crop anew each epoch; otherwise the middle, always. Encoding takes the middle."""
    num_workers: int = 0
    """Processes that decode ahead, per rank; 0 decodes in the training process."""
    prefetch: int = 2
    """Micro batches that each worker prepares ahead."""
    cache_decoded: bool = True
    """Keep decoded clips in memory, shared by the workers, where all of them fit in `cache_gib`."""
    cache_gib: float = 4.0
    """Most memory for decoded clips, GiB per rank."""

    def __post_init__(self) -> None:
        if not self.buckets:
            raise ValueError("data.buckets is empty: give at least one shape, for example 17x64x64")
        for text in self.buckets:
            parse_bucket(text, multiple=1)
        if self.fps is not None and self.fps <= 0:
            raise ValueError(f"data.fps {self.fps} must be above 0, or null to keep every clip's own rate")
        check_workers(self.num_workers, self.prefetch)


class ClipReader:
    """Reads micro batches of pixels: a function of (seed, epoch, sample) alone."""

    def __init__(self, shards: ShardSet, config: DataConfig, seed: int, random_crop: bool) -> None:
        self.shards, self.config, self.seed, self.random_crop = shards, config, seed, random_crop
        metas = [entry.meta for entry in shards.entries]
        self._shapes = [
            (int(meta.get("num_frames", 0)), int(meta.get("height", 0)), int(meta.get("width", 0)), 3) for meta in metas
        ]
        self._strides = [frame_stride(float(meta.get("fps", 0)), config.fps) for meta in metas]
        self._cache: DecodedCache | None = None
        if config.cache_decoded and decoded_bytes(self._shapes) <= config.cache_gib * 2**30:
            self._cache = DecodedCache(self._shapes)

    def group(self, multiple: int) -> Grouping:
        """Assigns the clips to the configured buckets; says in the log how many are too short for all.

        Raises:
            UserError: if a bucket does not fit `multiple`, or no clip fits any bucket.
        """
        try:
            buckets = [parse_bucket(text, multiple) for text in self.config.buckets]
        except ValueError as error:
            raise UserError(f"data.buckets: {error}") from error
        sizes = [
            # A height or width that the json does not tell is taken for square.
            (frames_after_stride(frames, stride), height or 1, width or 1)
            for (frames, height, width, _), stride in zip(self._shapes, self._strides, strict=True)
        ]
        grouping = group(sizes, buckets)
        if len(grouping.dropped) == len(sizes):
            raise UserError(
                f"{self.shards.root}: the longest clip has {max(size[0] for size in sizes)} frames, data.buckets "
                f"{', '.join(self.config.buckets)} want more: add a shorter bucket, or ingest longer clips"
            )
        if grouping.dropped:
            log.warning("%d of %d clips are shorter than every bucket: left out", len(grouping.dropped), len(sizes))
        return grouping

    def __getitem__(self, request: Request) -> Rows:
        bucket = request.bucket
        clips = torch.zeros(len(request.ids), bucket.frames, bucket.height, bucket.width, 3, dtype=torch.uint8)
        rows = Rows(request, {"clip": clips}, [""] * len(request.ids))
        for row, index in enumerate(request.ids):
            if index == PADDING:
                continue
            try:
                clips[row] = self._clip(index, bucket, request.epoch)
                key = self.shards.entries[index].key
                rows.captions[row] = choose_caption(self.shards.captions(index), self.seed, request.epoch, key)
            except (VideoError, UserError, OSError, ValueError) as error:
                rows.failures[row] = str(error)
                clips[row] = 0
        return rows

    def _clip(self, index: int, bucket: Bucket, epoch: int) -> Tensor:
        """(t, h, w, 3) uint8: decodes no more than the window, unless all of it is to be kept."""
        rng = sample_rng(self.seed, epoch, self.shards.entries[index].key, "crop") if self.random_crop else None
        stride = self._strides[index]
        start, stop = temporal_window(self._shapes[index][0], bucket.frames, stride, rng)
        if self._cache is None:
            frames = read_frames(self._pixels(index), start, stop)
        else:
            whole = self._cache.get(index)
            if whole is None:
                whole = read_frames(self._pixels(index))
                self._cache.put(index, whole)
            frames = whole[start:stop]
        if len(frames) != stop - start:
            raise ValueError(f"it ends at frame {start + len(frames)}, the index says {self._shapes[index][0]}")
        return torch.from_numpy(resize_and_crop(frames[::stride], bucket.height, bucket.width, rng))

    def _pixels(self, index: int) -> bytes:
        members = self.shards.entries[index].members
        return self.shards.read(index, next((ext for ext in CLIP_EXTENSIONS if ext in members), CLIP_EXTENSIONS[0]))
