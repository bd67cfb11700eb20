"""The global order of training samples: a step number is the whole state.

Every epoch reads each bucket's clips from its streams in turn (`streams`), cuts them into global batches, pads the
ragged end with -1 and mixes the batches of all buckets. Ranks and workers do not enter: they only decide who computes
which row (`deal`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from videodit.data.randomness import stable_hash
from videodit.data.streams import ClipStreams, Visits, fitting_streams, interleave, merge

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
    epochs: tuple[int, ...]
    """How often each row's clip was read before: the epoch of its data set, which randomness hangs on."""
    streams: tuple[int, ...]
    """The stream of each row; -1 for padding."""
    num_streams: int
    """How many streams the bucket has."""


@dataclass(frozen=True)
class ClipPlaces:
    """Where clips lie, by clip index: what the order needs to know of their shards and data sets."""

    shards: np.ndarray
    """(n,) number of each clip's shard."""
    sets: np.ndarray
    """(n,) number of each clip's data set."""
    weights: tuple[float, ...] = (1.0,)
    """How often an epoch reads each data set."""


class GlobalOrder:
    """Deterministic global order of samples from (seed, epoch).

    Args:
        buckets: bucket name -> indices of its clips; empty buckets take no part.
        global_batch_size: clips in one optimizer step, for all buckets or by bucket name.
        seed: the run's seed.
        num_streams: most streams of a bucket; what the order looks like depends on it.
        places: shards and data sets; by default all clips are of one.
    Raises:
        ValueError: if there is no clip at all, or a batch size or the number of streams is below 1.
    """

    def __init__(
        self,
        buckets: Mapping[str, Sequence[int] | np.ndarray],
        global_batch_size: int | Mapping[str, int],
        seed: int,
        num_streams: int = 64,
        places: ClipPlaces | None = None,
    ) -> None:
        if num_streams < 1:
            raise ValueError(f"streams {num_streams} must be at least 1")
        clips = {name: np.asarray(buckets[name], dtype=np.int64) for name in sorted(buckets) if len(buckets[name])}
        if not clips:
            raise ValueError("no clip in any bucket: there is nothing to order")
        if places is None:
            nowhere = np.zeros(max(int(indices.max()) for indices in clips.values()) + 1, dtype=np.int64)
            places = ClipPlaces(nowhere, nowhere)
        self._seed = seed
        self._sizes = {
            name: global_batch_size if isinstance(global_batch_size, int) else global_batch_size[name] for name in clips
        }
        for name, size in self._sizes.items():
            if size < 1:
                raise ValueError(f"global_batch_size {size} of bucket {name} must be at least 1")
        self._streams = {name: fitting_streams(len(indices), num_streams) for name, indices in clips.items()}
        self._sets = {
            name: [
                ClipStreams(
                    part, places.shards[part], self._streams[name], places.weights[number], seed, f"{name}/{number}"
                )
                for number in range(len(places.weights))
                if len(part := indices[places.sets[indices] == number])
            ]
            for name, indices in clips.items()
        }
        self._names = list(clips)
        rows = [sum(part.per_epoch for part in self._sets[name]) for name in self._names]
        self._batches = [-(-count // self._sizes[name]) for name, count in zip(self._names, rows, strict=True)]
        self._epoch = -1  # the epoch that the three below belong to; they are a cache, not state
        self._batch_bucket = np.empty(0, dtype=np.int64)
        self._batch_number = np.empty(0, dtype=np.int64)
        self._rows: dict[str, Visits] = {}

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one epoch, over all buckets."""
        return sum(self._batches)

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
            self._mix_buckets(epoch)
        name = self._names[self._batch_bucket[position]]
        if name not in self._rows:
            visits = merge([part.visits(epoch) for part in self._sets[name]], self._seed, epoch, name)
            self._rows[name] = interleave(visits, self._streams[name], self._seed, epoch, name)
        size, number = self._sizes[name], self._batch_number[position]
        rows = [values[number * size : (number + 1) * size].tolist() for values in self._rows[name]]
        padding = size - len(rows[0])
        ids, epochs, streams = (
            tuple(values + [fill] * padding) for values, fill in zip(rows, (PADDING, epoch, PADDING), strict=True)
        )
        return StepPlan(step, epoch, name, ids, epochs, streams, self._streams[name])

    def _mix_buckets(self, epoch: int) -> None:
        """Which bucket each step of the epoch belongs to, at random; each bucket's batches stay in their order."""
        bits = np.random.Philox(key=stable_hash(self._seed, epoch, "", "order/batches"))
        mixed = np.argsort(bits.random_raw(self.steps_per_epoch), kind="stable")
        self._batch_bucket = np.repeat(np.arange(len(self._names)), self._batches)[mixed]
        self._batch_number = np.empty_like(self._batch_bucket)
        for bucket, count in enumerate(self._batches):
            self._batch_number[self._batch_bucket == bucket] = np.arange(count)
        self._epoch, self._rows = epoch, {}
