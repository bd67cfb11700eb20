"""Reading clips, videos or fields: which bucket, which frames, which crop, which caption."""

import logging
from dataclasses import dataclass, field
from functools import cache, partial

import numpy as np
import torch

from videodit.data import yuv
from videodit.data.batches import Request, Rows, choose_caption
from videodit.data.buckets import Bucket, Grouping, group, parse_bucket
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.columns import NONE
from videodit.data.decoded_cache import DecodedCache, decoded_bytes
from videodit.data.field import read_window
from videodit.data.frame_reader import READERS, FrameReader, frame_reader
from videodit.data.ingest_record import read_statistics
from videodit.data.mixture import ShardsConfig
from videodit.data.order import PADDING
from videodit.data.randomness import sample_rng
from videodit.data.shards import ReplacedShard, ShardSet
from videodit.data.transforms import (
    ClipCut,
    crop,
    frame_stride,
    frames_after_stride,
    resize_to_cover,
    temporal_window,
)
from videodit.data.video_io import VideoError, read_frames, read_yuv
from videodit.errors import UserError

CLIP_EXTENSIONS = ("mp4", "jpg", "jpeg", "png", "webp")
"""Members that hold a clip's pixels, in order of preference; a picture is a clip of one frame."""

FIELD_EXTENSION = "npy"

PIXELS = ("yuv", "rgb")

log = logging.getLogger(__name__)


@cache  # several loaders of a run may find the same
def _warn_once(text: str) -> None:
    log.warning("%s", text)


@dataclass(frozen=True)
class DataConfig(ShardsConfig):
    """Clips in pixels, as VAE training and encoding read them."""

    shards: str | list[str] = ""
    """Folder of shards, as `videodit ingest` writes them, of videos or of fields; any webdataset of mp4 + json. To
    train on several, a list."""
    buckets: list[str] = field(default_factory=lambda: ["17x64x64"])
    """Clip shapes, FRAMESxHEIGHTxWIDTH, frames 4k+1. A clip goes to the nearest in aspect ratio, not longer than it."""
    fps: float | None = None
    """Frames per second: every n-th frame is taken, with the n that comes nearest. None keeps every clip's own rate."""
    random_crop: bool = True
    """Draw the window in time and the crop anew each epoch; otherwise the middle, always. Encoding takes the middle."""
    reader: str = "av"
    """What decodes videos: av, or decord, which gives the same frames of clips that ingest wrote."""
    pixels: str = "yuv"
    """How clips go to the device: yuv, as they are stored, half the bytes and no work on the CPU, or rgb. Clips of one
    frame, of which pictures have all their colour, and what decord reads are rgb anyway."""
    num_workers: int = 0
    """Processes that decode ahead, per rank; 0 decodes in the training process."""
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
        if self.reader not in READERS:
            raise ValueError(f"data.reader {self.reader!r} is not one of {', '.join(READERS)}")
        if self.pixels not in PIXELS:
            raise ValueError(f"data.pixels {self.pixels!r} is not one of {', '.join(PIXELS)}")
        super().__post_init__()

    @property
    def in_yuv(self) -> bool:
        """Whether videos are read without a conversion to RGB."""
        return self.pixels == "yuv" and self.reader == "av"


def field_channels(shards: ShardSet) -> int | None:
    """How many channels a set's fields have; None for a set of videos and pictures.

    Raises:
        UserError: if clips differ in that: one model is trained on one kind of clip.
    """
    columns = shards.columns
    is_video = np.any([sizes != NONE for ext, sizes in columns.sizes.items() if ext in CLIP_EXTENSIONS], axis=0)
    # Of a video or picture none, also if it has an array beside it (an embedding, say).
    is_field = (columns.sizes.get(FIELD_EXTENSION, NONE) != NONE) & ~is_video
    kind_of_clip = np.where(is_field, columns.facts["channels"], -1)
    found = sorted(zip(*np.unique(kind_of_clip, return_index=True)), key=lambda kind: kind[1])
    examples = {None if kind < 0 else int(kind): columns.keys[first] for kind, first in found}
    if len(examples) > 1:
        named = [f"{key} ({'a video' if c is None else f'{c} channels'})" for c, key in examples.items()]
        raise UserError(
            f"{shards.name} holds {' and '.join(named)}: all clips that one model trains on are videos, or fields of "
            "one number of channels; ingest them into separate folders"
        )
    return next(iter(examples))


def measured_statistics(shards: ShardSet) -> ChannelStatistics | None:
    """What ingest measured of a set's fields; None for a set of videos and pictures.

    Raises:
        UserError: if clips are of several kinds, or they are fields that ingest did not make.
    """
    if field_channels(shards) is None:
        return None
    measured = {part.name: read_statistics(part.root) for part in shards.sets}
    missing = next((name for name, statistics in measured.items() if statistics is None), None)
    if missing is not None:
        raise UserError(f"{missing} has no statistics of its channels: make it with 'videodit ingest SRC'")
    first, *others = measured.values()
    if any(statistics != first for statistics in others):
        raise UserError(
            f"{shards.name} are fields whose channels have other statistics: ingest them into one folder, which then "
            "has those of all"
        )
    return first


class ClipReader:
    """Reads micro batches of pixels or fields: a function of (seed, epoch, sample) alone.

    Args:
        shards: the clips.
        config: how they are cut.
        seed: the run's seed.
        random_crop: draw window and crop; otherwise the middle.
        statistics: of fields, those that the model knows; None for videos.
    Raises:
        UserError: if the clips are of another kind.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: DataConfig,
        seed: int,
        random_crop: bool,
        statistics: ChannelStatistics | None = None,
    ) -> None:
        self.shards, self.config, self.seed, self.random_crop = shards, config, seed, random_crop
        self.statistics = statistics
        if "safetensors" in shards.columns.sizes:
            raise UserError(f"{shards.name} holds latents, no clips: give the shards that they were made of")
        channels, known = field_channels(shards), len(statistics.mean) if statistics else None
        if channels != known:
            here, there = ("videos" if n is None else f"fields of {n} channels" for n in (channels, known))
            raise UserError(f"{shards.name} holds {here}, the model reads {there}: give it the clips that it is for")
        self._channels = channels or 3
        self._video_reader = frame_reader(config.reader)
        facts, videos = shards.columns.facts, shards.columns.sizes.get("mp4")
        sizes = zip(*(facts[name].astype(int).tolist() for name in ("num_frames", "height", "width")))
        self._shapes = [(*size, self._channels) for size in sizes]
        self._strides = [frame_stride(fps, config.fps) for fps in facts["fps"].tolist()]
        self._in_yuv = config.in_yuv and not statistics
        # Clips that are decoded to YUV.
        self._packed = np.zeros(len(shards), bool) if videos is None or not self._in_yuv else videos != NONE
        self._cache: DecodedCache | None = None
        # A field is not decoded: what the system keeps of the shards in memory is its cache.
        if config.cache_decoded and not statistics:
            stored = [
                yuv.packed_shape(*shape[:3]) if packed else shape for shape, packed in zip(self._shapes, self._packed)
            ]
            if decoded_bytes(stored) <= config.cache_gib * 2**30:
                self._cache = DecodedCache(stored)

    def group(self, multiple: int) -> Grouping:
        """Assigns the clips to the configured buckets; says in the log how many fit none.

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
        grouping = group(sizes, buckets, enlarge=self.statistics is None)
        if len(grouping.dropped) == len(sizes):
            frames, height, width = max(sizes)
            if frames >= min(bucket.frames for bucket in buckets):
                raise UserError(
                    f"{self.shards.name}: a field of {height}x{width} is smaller than data.buckets "
                    f"{', '.join(self.config.buckets)}: fields are cropped and never enlarged; add a smaller bucket"
                )
            raise UserError(
                f"{self.shards.name}: the longest clip has {frames} frames, data.buckets "
                f"{', '.join(self.config.buckets)} want more: add a shorter bucket, or ingest longer clips"
            )
        if grouping.dropped:
            small = "shorter" if self.statistics is None else "shorter or smaller"
            _warn_once(f"{len(grouping.dropped)} of {len(sizes)} clips are {small} than every bucket: left out")
        return grouping

    def __getitem__(self, request: Request) -> Rows:
        bucket = request.bucket
        shape: tuple[int, ...] = (*bucket, self._channels)
        dtype = torch.float32 if self.statistics else torch.uint8
        if self._gives_packed(bucket):
            shape = yuv.packed_shape(*bucket)
        clips = torch.empty(len(request.ids), *shape, dtype=dtype)
        rows = Rows(request, {"clip": clips}, [""] * len(request.ids))
        pixels = clips.numpy()
        for row, index in enumerate(request.ids):
            if index == PADDING:
                self._blank(pixels[row], bucket)
                continue
            try:
                rows.cuts[row] = self._clip(index, bucket, request.epochs[row], pixels[row])
                key = self.shards.entries[index].key
                captions = self.shards.weighted_captions(index)
                number = choose_caption(captions, self.seed, request.epochs[row], key)
                rows.captions[row] = "" if number is None else captions.texts[number]
            except (VideoError, UserError, OSError, ValueError) as error:
                rows.failures[row] = str(error)
                rows.fatal = str(error) if isinstance(error, ReplacedShard) else rows.fatal
                rows.cuts.pop(row, None)
                self._blank(pixels[row], bucket)
        return rows

    def _blank(self, row: np.ndarray, bucket: Bucket) -> None:
        if self._gives_packed(bucket):
            yuv.fill_black(row)
        else:
            row[...] = 0

    def _gives_packed(self, bucket: Bucket) -> bool:
        return self._in_yuv and bucket.frames > 1 and bucket.height % 2 == 0 and bucket.width % 2 == 0

    def _clip(self, index: int, bucket: Bucket, epoch: int, out: np.ndarray) -> ClipCut:
        """Fills a row of `ClipBatch.frames` and says how it was cut. No more than the window is read or decoded, unless
        all of it is to be kept.
        """
        rng = sample_rng(self.seed, epoch, self.shards.entries[index].key, "crop") if self.random_crop else None
        stride = self._strides[index]
        start, stop = temporal_window(self._shapes[index][0], bucket.frames, stride, rng)
        if self.statistics is not None:
            values = read_window(partial(self.shards.read, index, FIELD_EXTENSION), self._shapes[index], start, stop)
            part, corner = crop(values[::stride], bucket.height, bucket.width, rng)
            out[...] = self.statistics.standardise(part)
            return ClipCut(values.shape[1], values.shape[2], *corner, start, stride)
        frames = self._window(index, start, stop, stride, out)
        if self._gives_packed(bucket):
            height, width = yuv.size(frames)
            covering = yuv.resize_to_cover(frames, bucket.height, bucket.width)
            part, corner = yuv.crop(covering, bucket.height, bucket.width, rng)
        else:
            if frames.ndim == 3:
                frames = yuv.to_pixels(torch.from_numpy(frames)[None])[0].numpy()
            height, width = frames.shape[1:3]
            part, corner = crop(resize_to_cover(frames, bucket.height, bucket.width), bucket.height, bucket.width, rng)
        if part is not out:
            out[...] = part
        return ClipCut(height, width, *corner, start, stride)

    def _window(self, index: int, start: int, stop: int, stride: int, out: np.ndarray) -> np.ndarray:
        """Every stride-th frame from start to stop, RGB or packed; in `out`, if they are read into it."""
        if self._cache is None:
            frames = self._read(index, start, stop, stride, out)
        else:
            whole = self._cache.get(index)
            if whole is None:
                whole = self._read(index)
                self._cache.put(index, whole)
            frames = whole[start:stop:stride]
        if len(frames) != frames_after_stride(stop - start, stride):
            raise ValueError(f"it ends before frame {stop}, the index says {self._shapes[index][0]} frames")
        return frames

    def _read(
        self, index: int, start: int = 0, stop: int | None = None, stride: int = 1, out: np.ndarray | None = None
    ) -> np.ndarray:
        """(t, h, w, 3) uint8 RGB, or packed YUV, which may be in `out`."""
        entry = self.shards.entries[index]
        extension = next((ext for ext in CLIP_EXTENSIONS if ext in entry.members), CLIP_EXTENSIONS[0])
        data = self.shards.read(index, extension)
        if self._packed[index]:
            return read_yuv(data, start, stop, stride, out)
        read: FrameReader = self._video_reader if extension == "mp4" else read_frames
        return read(data, start, stop)[::stride]
