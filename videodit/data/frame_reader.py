"""Who decodes clips of shards: PyAV or decord. Of clips that ingest wrote both give the same frames, bit for bit."""

import io
from typing import Protocol

import numpy as np

from videodit.data.video_io import VideoError, read_frames
from videodit.errors import MissingExtra

READERS = ("av", "decord")


class FrameReader(Protocol):
    """Decodes a range of frames."""

    def __call__(self, source: bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
        """As `read_frames`, of a clip in a shard."""


def frame_reader(name: str) -> FrameReader:
    """The reader of a name in `READERS`.

    Raises:
        MissingExtra: if it is decord, and that is not installed.
    """
    if name == "av":
        return read_frames
    try:
        import decord  # noqa: F401
    except ImportError:
        raise MissingExtra("decord", "decord") from None
    return read_with_decord


def read_with_decord(source: bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
    """As `read_frames`; only for what ingest wrote: decord applies no rotation and knows no colour tags.

    Raises:
        VideoError: if it does not decode, or ends before `start` or `stop`.
    """
    import decord

    try:
        reader = decord.VideoReader(io.BytesIO(source), num_threads=1)
        count = len(reader)
        if start >= count or (stop is not None and stop > count):
            raise VideoError(f"ends after {count} frames, {stop or start + 1} were asked for")
        frames: np.ndarray = reader.get_batch(range(start, count if stop is None else stop)).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(f"decord does not read it: {str(error).strip().splitlines()[-1]}") from error
    return frames
