"""Streams: each bucket's clips, cut in the order of their shards, so that what is read at one time lies in few shards.

    clips in shard order --cut--> streams --shuffled in each, every epoch--> visits --a clip of each in turn--> order

A stream keeps its clips for good, so that the shards that a rank has fetched serve every epoch. Which stream is next is
drawn for every round over them, and always so that any `world` rows in line hold `stream % world` once each, for every
`world` that divides the number of streams.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from videodit.data.randomness import stable_hash

SHUFFLED_SHARDS = 2
"""Shards of a stream that are shuffled together, and so lie in a cache together. Streams are mixed beyond that."""

MIN_CLIPS = 32
"""A bucket has fewer streams where they would be shorter than this: what stands in line would not be random enough."""

_BLOCK_BITS = 40  # of a sort key's 64 those that are drawn; the upper ones say what is shuffled together


def fitting_streams(num_clips: int, num_streams: int) -> int:
    """How many streams a bucket of so many clips has: the most that divide num_streams and are long enough."""
    divisors = (n for n in range(1, num_streams + 1) if num_streams % n == 0)
    return max(n for n in divisors if n == 1 or n * MIN_CLIPS <= num_clips)


class Visits(NamedTuple):
    """Clips that an epoch reads; all three (n,) int64."""

    clips: np.ndarray
    """Their indices."""
    epochs: np.ndarray
    """How often each was read before: the epoch of its data set."""
    streams: np.ndarray
    """The stream that each belongs to."""

    def take(self, places: np.ndarray) -> "Visits":
        """Some of them, or all in another order."""
        return Visits(*(values[places] for values in self))


class ClipStreams:
    """One bucket's clips of one data set.

    With weight 1 each of its epochs is one of the run's. With others its epochs follow each other without a gap, and an
    epoch of the run takes the next `per_epoch` visits: 0.5 sees each clip once in two epochs, 1.5 three times.

    Args:
        clips: (n,) their indices, at least one.
        shards: (n,) the number of each one's shard.
        num_streams: how many the bucket has.
        weight: how often an epoch of the run reads each, on average.
        seed: the run's seed.
        name: of the bucket and data set: what the shuffling is a function of, beside seed and epoch.
    """

    def __init__(
        self, clips: np.ndarray, shards: np.ndarray, num_streams: int, weight: float, seed: int, name: str
    ) -> None:
        by_shard = np.argsort(shards, kind="stable")
        self._clips, shards = clips[by_shard], shards[by_shard]
        count = len(clips)
        self.per_epoch = max(1, round(weight * count))
        self._seed, self._name = seed, name
        edges = count * np.arange(num_streams + 1) // num_streams
        self._streams = np.repeat(np.arange(num_streams), np.diff(edges))
        begins = np.diff(shards, prepend=-1).astype(bool) | np.diff(self._streams, prepend=-1).astype(bool)
        self._part = np.cumsum(begins) - 1  # number of each clip's (stream, shard)
        self._part_stream, self._part_shard = self._streams[begins], shards[begins]
        self._turn: np.ndarray | None = None  # of each clip's place in an epoch of the set that the run's cut in pieces
        if self.per_epoch % count:
            sizes = np.diff(edges)[self._streams]
            self._turn = _ranks(np.argsort((np.arange(count) - edges[self._streams] + 0.5) / sizes, kind="stable"))

    def visits(self, epoch: int) -> Visits:
        """What an epoch of the run reads, stream by stream, each in its order."""
        count, first, last = len(self._clips), epoch * self.per_epoch, (epoch + 1) * self.per_epoch
        parts = []
        for own_epoch in range(first // count, (last - 1) // count + 1):
            order = self._shuffled(own_epoch)
            part = Visits(self._clips[order], np.full(count, own_epoch), self._streams)
            if self._turn is not None:
                turn = own_epoch * count + self._turn
                part = part.take(np.flatnonzero((turn >= first) & (turn < last)))
            parts.append(part)
        return parts[0] if len(parts) == 1 else _by_stream(parts)

    def _shuffled(self, epoch: int) -> np.ndarray:
        """(n,) places in `clips`, each stream's own: its shards in a new order, a few of them shuffled together."""
        # All buckets draw the same order of shards, so that they come to each shard at about the same time.
        drawn = _bits(self._seed, epoch, "order/shards", int(self._part_shard.max()) + 1)[self._part_shard]
        starts = np.searchsorted(self._part_stream, self._part_stream)  # each part's first neighbour in its stream
        turn = _ranks(np.lexsort((drawn, self._part_stream))) - starts
        together = starts + turn // SHUFFLED_SHARDS
        drawn = _bits(self._seed, epoch, f"order/clips/{self._name}", len(self._clips)) >> (64 - _BLOCK_BITS)
        return np.argsort((together[self._part].astype(np.uint64) << _BLOCK_BITS) | drawn, kind="stable")


def merge(parts: Sequence[Visits], seed: int, epoch: int, name: str) -> Visits:
    """The visits of several data sets: in each stream mixed at random, with each set's own in their order.

    Args:
        parts: of each set, stream by stream.
        seed, epoch, name: what the mixing is a function of; the name is the bucket's.
    """
    if len(parts) == 1:
        return parts[0]
    visits = Visits(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    sets = np.repeat(np.arange(len(parts)), [len(part.clips) for part in parts])
    drawn = np.lexsort((_bits(seed, epoch, f"order/mix/{name}", len(sets)), visits.streams))
    # The k-th place that a set was drawn for in a stream takes the k-th visit that it has there.
    places = np.lexsort((sets[drawn], visits.streams[drawn]))
    order = np.empty_like(places)
    order[places] = np.lexsort((sets, visits.streams))
    return visits.take(order)


def interleave(visits: Visits, num_streams: int, seed: int, epoch: int, name: str) -> Visits:
    """A clip of each stream in turn, the streams in another order every round; exhausted ones are left out.

    Args:
        visits: stream by stream.
        num_streams: how many there are.
        seed, epoch, name: what the orders are a function of; the name is the bucket's.
    """
    streams = visits.streams
    rounds = np.arange(len(streams)) - np.searchsorted(streams, streams)
    count = int(rounds.max()) + 1
    drawn = _bits(seed, epoch, f"order/rounds/{name}", 2 * count)
    # Where a stream stands in a round is linear in its number with a factor prime to how many there are, so that what
    # stands in line has different remainders by every divisor.
    factors = np.array([a for a in range(1, num_streams + 1) if math.gcd(a, num_streams) == 1])
    factor = factors[(drawn[:count] % len(factors)).astype(np.int64)]
    shift = (drawn[count:] % num_streams).astype(np.int64)
    stand = (factor[rounds] * streams + shift[rounds]) % num_streams
    return visits.take(np.argsort(rounds * num_streams + stand, kind="stable"))


def _by_stream(parts: Sequence[Visits]) -> Visits:
    """One after the other, in each stream."""
    visits = Visits(*(np.concatenate(values) for values in zip(*parts, strict=True)))
    return visits.take(np.argsort(visits.streams, kind="stable"))


def _ranks(order: np.ndarray) -> np.ndarray:
    """The place of each element in an order."""
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks


def _bits(seed: int, epoch: int, name: str, count: int) -> np.ndarray:
    """Philox's raw 64-bit numbers: that stream numpy keeps stable over versions."""
    return np.random.Philox(key=stable_hash(seed, epoch, "", name)).random_raw(count)
