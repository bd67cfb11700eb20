"""The global order of training samples: a step number is the whole state.

Every epoch permutes each bucket's clips, cuts them into global batches, pads the ragged end with -1 and permutes the
batches of all buckets. Ranks and workers do not enter: they only decide who computes which row (`deal`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from videodit.data.randomness import stable_hash

PADDING = -1
"""The id of a row that holds no sample: its weight in the loss is 0."""


@dataclass(frozen=True)
class StepPlan:
    """What one optimizer step reads, the same on every rank."""

    step: int
    """Optimizer step, from 1."""
    epoch: int
    """Epoch of the step, from 0."""
    bucket: str
    """Name of the bucket that all rows belong to."""
    ids: tuple[int, ...]
    """Clip indices in global order, global_batch_size of them; -1 is padding (only at the end)."""


class GlobalOrder:
    """Deterministic global order of samples from (seed, epoch).

    Args:
        buckets: bucket name -> indices of its clips; empty buckets take no part.
        global_batch_size: clips in one optimizer step, for all buckets or by bucket name.
        seed: the run's seed.
    Raises:
        ValueError: if there is no clip at all, or a batch size is below 1.
    """

    def __init__(
        self, buckets: Mapping[str, Sequence[int]], global_batch_size: int | Mapping[str, int], seed: int
    ) -> None:
        self._clips = {
            name: np.asarray(buckets[name], dtype=np.int64) for name in sorted(buckets) if len(buckets[name])
        }
        if not self._clips:
            raise ValueError("no clip in any bucket: there is nothing to order")
        self._sizes = {
            name: global_batch_size if isinstance(global_batch_size, int) else global_batch_size[name]
            for name in self._clips
        }
        for name, size in self._sizes.items():
            if size < 1:
                raise ValueError(f"global_batch_size {size} of bucket {name} must be at least 1")
        self._seed = seed
        # One entry per global batch of an epoch: (bucket name, number of the batch within its bucket).
        self._chunks = [
            (name, chunk) for name, clips in self._clips.items() for chunk in range(-(-len(clips) // self._sizes[name]))
        ]
        self._epoch = -1  # the epoch that the two permutations below belong to; they are a cache, not state
        self._batch_order = np.empty(0, dtype=np.int64)
        self._permuted: dict[str, np.ndarray] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, over all buckets."""
        return len(self._chunks)

    def global_batch_size(self, bucket: str) -> int:
        """Rows (clips and padding) of one step in this bucket."""
        return self._sizes[bucket]

    def batch(self, step: int) -> StepPlan:
        """The rows of one optimizer step.

        Args:
            step: optimizer step, from 1.
        Raises:
            ValueError: if step is below 1.
        """
        if step < 1:
            raise ValueError(f"step {step} must be at least 1: steps count from 1")
        epoch, position = divmod(step - 1, self.steps_per_epoch)
        if epoch != self._epoch:
            self._batch_order = self._permutation(epoch, "batches", "", len(self._chunks))
            self._permuted = {}
            self._epoch = epoch
        bucket, chunk = self._chunks[self._batch_order[position]]
        if bucket not in self._permuted:
            clips = self._clips[bucket]
            self._permuted[bucket] = clips[self._permutation(epoch, "clips", bucket, len(clips))]
        size = self._sizes[bucket]
        ids = self._permuted[bucket][chunk * size : (chunk + 1) * size].tolist()
        return StepPlan(step, epoch, bucket, tuple(ids + [PADDING] * (size - len(ids))))

    def _permutation(self, epoch: int, stream: str, bucket: str, count: int) -> np.ndarray:
        """A permutation of range(count), from Philox's raw numbers: that stream numpy keeps stable over versions."""
        bits = np.random.Philox(key=stable_hash(self._seed, epoch, bucket, f"order/{stream}"))
        return np.argsort(bits.random_raw(count), kind="stable")


def num_micro_batches(rows: int, world: int, micro_batch_size: int) -> int:
    """Micro batches that every rank computes in a step of `rows` rows."""
    return -(-rows // (world * micro_batch_size))


def deal(ids: Sequence[int], rank: int, world: int, micro_batch_size: int) -> list[list[int]]:
    """This rank's rows of a global batch, as micro batches.

    Rows are dealt one by one, like cards, so that ranks differ by at most one real row, and padded with -1, so that
    every rank has the same number of full micro batches: 32 clips on 3 ranks work.

    Args:
        ids: rows of the global batch, -1 for padding.
        rank: this rank, in [0, world).
        world: number of data-parallel ranks.
        micro_batch_size: rows of one forward pass.
    Returns:
        `num_micro_batches` lists of micro_batch_size ids each.
    Raises:
        ValueError: if rank is not in [0, world) or micro_batch_size is below 1.
    """
    if not 0 <= rank < world:
        raise ValueError(f"rank {rank} must be in [0, {world})")
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size {micro_batch_size} must be at least 1")
    count = num_micro_batches(len(ids), world, micro_batch_size)
    rows = list(ids[rank::world])
    rows += [PADDING] * (count * micro_batch_size - len(rows))
    return [rows[start : start + micro_batch_size] for start in range(0, len(rows), micro_batch_size)]
