"""Decoded clips in memory that worker processes share: small sets are decoded once and not every epoch."""

import math
import mmap
from collections.abc import Sequence

import numpy as np


class DecodedCache:
    """uint8 arrays by index in one anonymous shared mapping.

    Forked workers see each other's clips. An anonymous mapping takes pages as they are written and is not bounded by
    the size of /dev/shm, which is 64 MiB in many containers.

    Args:
        shapes: by index: what a clip must have to be kept.
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        self._shapes = list(shapes)
        sizes = np.array([decoded_bytes([shape]) for shape in shapes], dtype=np.int64)
        self._offsets = np.concatenate([[0], np.cumsum(sizes)])
        # One byte a clip in front: 1 when its pixels are all there. It is set last.
        self._memory = np.frombuffer(mmap.mmap(-1, max(1, len(sizes) + int(self._offsets[-1]))), dtype=np.uint8)
        self._ready = self._memory[: len(sizes)]
        self._pixels = self._memory[len(sizes) :]

    def get(self, index: int) -> np.ndarray | None:
        """The clip, uint8, not to be written to; None if it was not put there yet."""
        if not self._ready[index]:
            return None
        return self._pixels[self._offsets[index] : self._offsets[index + 1]].reshape(self._shapes[index])

    def put(self, index: int, frames: np.ndarray) -> None:
        """Keeps a clip; one whose shape is not what the index of its shard said is not kept."""
        if frames.shape == self._shapes[index]:
            self._pixels[self._offsets[index] : self._offsets[index + 1]] = frames.reshape(-1)
            self._ready[index] = 1


def decoded_bytes(shapes: Sequence[tuple[int, ...]]) -> int:
    """Bytes that clips of these shapes take as uint8."""
    return sum(map(math.prod, shapes))
