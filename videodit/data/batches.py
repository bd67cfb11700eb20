"""Micro batches: what one is, and how worker processes read them.

    GlobalOrder -> StepPlan -> deal -> Request --(worker process)--> Rows -> Batch

One Request is one micro batch and one task of a worker. Results come back in order, so the number of workers changes
nothing but time.
"""

import atexit
import ctypes
import logging
import multiprocessing
import os
import signal
import sys
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from videodit.data import yuv
from videodit.data.buckets import Bucket
from videodit.data.captions import Captions
from videodit.data.order import PADDING
from videodit.data.randomness import sample_noise, sample_unit
from videodit.data.transforms import ClipCut, to_model_range
from videodit.errors import UserError

MAX_CONSECUTIVE_FAILURES = 100
"""This many samples in a row that cannot be read are no accident: the data or the disk is broken."""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Batch:
    """One micro batch; its rows are padded to micro_batch_size."""

    bucket: Bucket
    """Shape of the clips in pixels."""
    captions: list[str]
    """One per row; "" for padding and for dropped captions."""
    ids: list[int]
    """Clip index in the data set per row; -1 is padding."""
    keys: list[str]
    """Sample key per row; "" for padding."""
    weight: Tensor
    """(b,) float32: 1 for a sample, 0 for padding and for samples that could not be read."""
    epochs: list[int]
    """How often each row's clip was read before: with the key, what randomness of the sample hangs on."""
    wait_s: float = 0.0
    """Seconds that the consumer waited for this micro batch."""

    @property
    def num_failed(self) -> int:
        """Samples that could not be read."""
        return sum(clip != PADDING and not weight for clip, weight in zip(self.ids, self.weight.tolist()))


@dataclass(kw_only=True)
class ClipBatch(Batch):
    """A micro batch of pixels or fields."""

    frames: Tensor
    """(b, t, 3h/2, w) uint8, packed as in `yuv`; (b, t, h, w, 3) uint8 RGB; or of fields (b, t, h, w, c) standardised
    float32. Rows of weight 0 are black, or zeros."""
    cuts: dict[int, ClipCut] = field(default_factory=dict)
    """Row -> how its clip was cut; rows of weight 0 are missing."""

    def clip(self, device: torch.device | str = "cpu") -> Tensor:
        """(b, c, t, h, w) float32 in [-1, 1], or standardised, as models see it; the device does the conversion."""
        frames = self.frames.to(device)
        return yuv.to_model_range(frames) if frames.ndim == 4 else to_model_range(frames)

    def pixels(self) -> Tensor:
        """(b, t, h, w, 3) uint8 RGB as viewers see it, of videos and pictures."""
        return clip_pixels(self.frames)


def clip_pixels(frames: Tensor) -> Tensor:
    """`ClipBatch.frames` of videos and pictures as (b, t, h, w, 3) uint8 RGB; fields as they are."""
    return yuv.to_pixels(frames) if frames.ndim == 4 else frames


@dataclass(kw_only=True)
class LatentBatch(Batch):
    """A micro batch of posteriors; rows of weight 0 are zeros, with the text of the empty caption."""

    mean: Tensor
    """(b, c, t, h, w) float32, normalised."""
    logvar: Tensor | None = None
    """(b, c, t, h, w) float32 log-variance in the same units; None where only the mean is read."""
    text: Tensor | None = None
    """(b, l, d) float16 embeddings of `captions`, zero at padding; None if the latents have none."""
    text_mask: Tensor | None = None
    """(b, l) bool, true where there is text; None if the latents have no embeddings."""
    origin: Tensor | None = None
    """(b, 2) first row and column of each clip's window in its latents; None if these are whole."""
    micro_conditions: Tensor | None = None
    """(b, 5) float32 of `MICRO_CONDITIONS`, a window's place counted to the crop; zeros in rows of weight 0."""

    def draw(self, seed: int) -> Tensor:
        """(b, c, t, h, w): a sample of each posterior, a function of (seed, epoch, key); needs `logvar`."""
        assert self.logvar is not None
        b, c, t, h, w = self.mean.shape
        noise = sample_noise(seed, self.epochs, self.keys, (c, t, h, w), "posterior")
        return self.mean + torch.exp(0.5 * self.logvar) * noise


@dataclass(frozen=True)
class Request:
    """One micro batch to read."""

    bucket: Bucket
    epochs: tuple[int, ...]
    """Of each row."""
    ids: tuple[int, ...]
    windowed: bool = False
    """Windows of latents instead of whole ones."""
    ahead: tuple[int, ...] = ()
    """Clips that will be read in a while: time to fetch their shards, should these be far away."""


@dataclass
class Rows:
    """What a worker made of a Request."""

    request: Request
    tensors: dict[str, Tensor]
    """Tensors with one row per id; rows without a sample are zeros, or the embedding of the empty caption."""
    captions: list[str]
    failures: dict[int, str] = field(default_factory=dict)
    """Row -> why its sample could not be read."""
    cuts: dict[int, ClipCut] = field(default_factory=dict)
    """Row -> how its clip was cut, where rows are clips."""
    fatal: str = ""
    """Why no more is to be read; empty if nothing is wrong."""


class RowReader(Protocol):
    """Reads micro batches; it is copied into worker processes by fork."""

    def __getitem__(self, request: Request) -> Rows: ...


class FailureGuard:
    """Counts and logs samples that cannot be read, and ends the run when they come in a row.

    Args:
        keys: sample key by clip index.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self.failures = 0
        self._keys = keys
        self._consecutive = 0

    def check(self, rows: Rows) -> None:
        """Looks at one micro batch, in the order of training.

        Raises:
            UserError: at the 100th failure in a row, or where no more is to be read.
        """
        if rows.fatal:  # as words: what a worker raises comes with its traceback
            raise UserError(rows.fatal)
        for row, clip in enumerate(rows.request.ids):
            if clip == PADDING:
                continue
            if row not in rows.failures:
                self._consecutive = 0
                continue
            self.failures += 1
            self._consecutive += 1
            log.warning("sample %s is left out: %s", self._keys[clip], rows.failures[row])
            if self._consecutive >= MAX_CONSECUTIVE_FAILURES:
                raise UserError(
                    f"{self._consecutive} samples in a row could not be read, the last is {self._keys[clip]} "
                    f"({rows.failures[row]}): check the disk, or make the shards again"
                )


def read_all(reader: RowReader, requests: Iterable[Request], num_workers: int, prefetch: int) -> Iterator[Rows]:
    """Reads requests in order, in worker processes or, with none, in this one when asked.

    Args:
        reader: reads one micro batch.
        requests: may be endless; taken as far ahead as the workers prefetch.
        num_workers: processes; 0 reads in this process.
        prefetch: micro batches that each worker prepares ahead.
    """
    if num_workers == 0:
        yield from map(reader.__getitem__, requests)
        return
    loader: Any = DataLoader(
        reader,  # type: ignore[arg-type]  # a map from requests: torch asks for no more than __getitem__
        sampler=requests,
        batch_size=None,
        num_workers=num_workers,
        prefetch_factor=prefetch,
        collate_fn=_as_it_is,
        worker_init_fn=_follow_parent,
        # Fork, so that workers share the cache and the index without copies; they touch neither the GPU nor threads.
        multiprocessing_context="fork",
        generator=torch.Generator(),  # else torch would draw from the global generator of the run
    )
    rows = iter(loader)
    atexit.unregister(_end_workers)
    atexit.register(_end_workers)  # exit handlers run from the last to the first: before those of torch
    yield from rows


def _end_workers() -> None:
    """At the end of a process that failed: its traceback still holds the loader, and Python would ask the workers to
    end, by a signal that they ignore, and wait for them for ever.
    """
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _as_it_is(rows: Any) -> Any:
    return rows


def _follow_parent(worker: int) -> None:
    """A worker ends when the main process does, and not before."""
    # Launchers and Ctrl-C signal the whole process tree: the main process decides, and then ends its workers itself.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        # One that waits for a disk would outlive a main process that was killed, and hold the lock of its run folder.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        parent = multiprocessing.parent_process()
        if parent is not None and os.getppid() != parent.pid:
            os._exit(1)  # it was gone before


def batch_fields(rows: Rows, keys: Sequence[str]) -> dict[str, Any]:
    """The fields of Batch that follow from what was read."""
    ids = list(rows.request.ids)
    weight = [float(clip != PADDING and row not in rows.failures) for row, clip in enumerate(ids)]
    return {
        "bucket": rows.request.bucket,
        "captions": rows.captions,
        "ids": ids,
        "keys": [keys[clip] if clip != PADDING else "" for clip in ids],
        "weight": torch.tensor(weight, dtype=torch.float32),
        "epochs": list(rows.request.epochs),
    }


def choose_caption(captions: Captions, seed: int, epoch: int, key: str, drop: float = 0.0) -> int | None:
    """Which of a sample's captions is read, as often as its weight says; None, for "", in a share of the epochs.

    Args:
        captions: at least one.
        seed, epoch, key: what the choice is a function of.
        drop: probability of "".
    """
    if drop > 0 and sample_unit(seed, epoch, key, "caption_drop") < drop:
        return None
    if len(captions.texts) == 1:
        return 0
    unit = sample_unit(seed, epoch, key, "caption")
    if len(set(captions.weights)) < 2:
        return int(unit * len(captions.texts))
    edges = list(accumulate(captions.weights))
    return min(bisect(edges, unit * edges[-1]), len(edges) - 1)


def check_workers(num_workers: int, prefetch: int) -> None:
    """Raises ValueError if the two cannot be (see `read_all`)."""
    if num_workers < 0:
        raise ValueError(f"data.num_workers {num_workers} must be 0 or more")
    if prefetch < 1:
        raise ValueError(f"data.prefetch {prefetch} must be at least 1")
