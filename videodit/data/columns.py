"""Samples of a set by column: what the order of a million clips needs, without an object for each of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from videodit.data.buckets import is_image

if TYPE_CHECKING:
    from videodit.data.shards import Entry

FACTS = ("num_frames", "height", "width", "fps", "channels")

NONE = -1
"""What stands for a member that a sample hasn't, or the bucket of one that says none."""


class Keys(Sequence[str]):
    """Keys as one array of bytes.

    Args:
        text: (n,) uint8, keys one after the other, UTF-8.
        starts, ends: (n,) where each begins and ends.
    """

    def __init__(self, text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
        self.text, self.starts, self.ends = text, starts, ends
        self._bytes = text.data

    @classmethod
    def of(cls, keys: Sequence[str]) -> "Keys":
        """The same keys."""
        coded = [key.encode() for key in keys]
        ends = np.cumsum([len(key) for key in coded], dtype=np.int64)
        return cls(np.frombuffer(b"".join(coded), dtype=np.uint8), np.concatenate([[0], ends[:-1]]), ends)

    def __len__(self) -> int:
        return len(self.starts)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        return str(self._bytes[self.starts[i] : self.ends[i]], "utf-8")


@dataclass
class Columns:
    """Facts of n samples."""

    keys: Sequence[str]
    """Their names."""
    shards: np.ndarray
    """(n,) int32 places in `shard_names`."""
    shard_names: list[str]
    """In the order in which samples name them first."""
    buckets: np.ndarray
    """(n,) int32 places in `bucket_names`; -1 for none."""
    bucket_names: list[str]
    """Likewise."""
    sizes: dict[str, np.ndarray]
    """Extension -> (n,) int64 bytes of each sample's member; -1 for none."""
    facts: dict[str, np.ndarray]
    """Each of `FACTS` -> (n,) float64 what the samples' jsons say; 0 for nothing."""

    @classmethod
    def of(cls, entries: "Iterable[Entry]") -> "Columns":
        """The columns of samples."""
        keys: list[str] = []
        shards, buckets, sizes = _Numbers(), _Numbers(), _Sizes()
        facts: dict[str, list[float]] = {name: [] for name in FACTS}
        for entry in entries:
            keys.append(entry.key)
            shards.add(entry.shard)
            buckets.add(entry.meta.get("bucket"))
            sizes.add(entry.members)
            for name, column in facts.items():
                column.append(_number(entry.meta.get(name)))
        numbers = {name: np.array(column, dtype=np.float64) for name, column in facts.items()}
        return cls(keys, *shards.column(), *buckets.column(), sizes.columns(), numbers)

    def usual_fps(self) -> float:
        """The median rate of the clips that are no pictures, in frames a second; 0 if none of them says its rate."""
        images = [number for number, name in enumerate(self.bucket_names) if is_image(name)]
        moving = (self.facts["num_frames"] != 1) & ~np.isin(self.buckets, images) & (self.facts["fps"] > 0)
        return float(np.median(self.facts["fps"][moving])) if moving.any() else 0.0

    def take(self, rows: np.ndarray) -> "Columns":
        """Some of the samples, as if there were no others.

        Args:
            rows: (m,) their places, in order.
        """
        if isinstance(self.keys, Keys):
            keys: Sequence[str] = Keys(self.keys.text, self.keys.starts[rows], self.keys.ends[rows])
        else:
            keys = [self.keys[row] for row in rows]
        shards, buckets = (
            _renumbered(self.shards[rows], self.shard_names),
            _renumbered(self.buckets[rows], self.bucket_names),
        )
        sizes = {name: values[rows] for name, values in self.sizes.items()}
        facts = {name: values[rows] for name, values in self.facts.items()}
        return Columns(keys, *shards, *buckets, sizes, facts)


def _number(value: Any) -> float:
    """0 for what is none: what other tools wrote may be anything."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return 0.0
    return number if math.isfinite(number) else 0.0


class _Numbers:
    """Names as numbers, in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._column: list[int] = []

    def add(self, name: Any) -> None:
        known = isinstance(name, str)
        self._column.append(self._numbers.setdefault(name, len(self._numbers)) if known else NONE)

    def column(self) -> tuple[np.ndarray, list[str]]:
        return np.array(self._column, dtype=np.int32), list(self._numbers)


class _Sizes:
    """Sizes of members by extension."""

    def __init__(self) -> None:
        self._columns: dict[str, list[int]] = {}
        self._count = 0

    def add(self, members: Mapping[str, tuple[int, int]]) -> None:
        for extension, (_, size) in members.items():
            column = self._columns.setdefault(extension, [])
            column.extend([NONE] * (self._count - len(column)))
            column.append(size)
        self._count += 1

    def columns(self) -> dict[str, np.ndarray]:
        filled = {name: column + [NONE] * (self._count - len(column)) for name, column in self._columns.items()}
        return {name: np.array(column, dtype=np.int64) for name, column in filled.items()}


def _renumbered(numbers: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """The names that are left, numbered in the order in which they come."""
    left, first = np.unique(numbers[numbers != NONE], return_index=True)
    left = left[np.argsort(first)]
    new = np.full(len(names) + 1, NONE, dtype=np.int32)  # the last one is that of -1
    new[left] = np.arange(len(left))
    return new[numbers], [names[number] for number in left]
