"""Data sets by weight: several folders of shards as one."""

import dataclasses
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from videodit.data.batches import check_workers
from videodit.data.index_file import open_folder
from videodit.data.order import ClipPlaces
from videodit.data.remote import RemoteFolder, is_address, open_remote
from videodit.data.shards import Entry, ShardSet
from videodit.errors import UserError


@dataclass(frozen=True)
class ShardsConfig:
    """Which shards are read, in what order, by how many processes: what clips and latents have in common."""

    shards: str | list[str] = ""
    """Folder of shards, or a list of folders."""
    weights: list[float] = field(default_factory=list)
    """How often an epoch reads each of the folders: 2 twice, 0.5 a half of its clips, another each time. Default: 1."""
    streams: int = 64
    """Streams over disjoint shards that the order takes clips from in turn. A number of ranks that divides it has each
    rank read its own shards only; a run keeps it."""
    disk_cache: str = ""
    """Folder on each node's disk, for shards that are fetched from an address such as s3://bucket/shards."""
    disk_cache_gib: float = 100.0
    """Room in it, GiB, for all data sets and ranks of a node; what was not used for longest goes."""
    num_workers: int = 0
    """Processes that read ahead, per rank; 0 reads in the training process."""
    prefetch: int = 2
    """Micro batches that each worker prepares ahead."""

    def __post_init__(self) -> None:
        if self.streams < 1:
            raise ValueError(f"data.streams {self.streams} must be at least 1")
        twice = next((folder for folder in self.folders if self.folders.count(folder) > 1), None)
        if twice is not None:
            raise ValueError(f"data.shards has {twice} twice: name it once, and give it a weight of 2 in data.weights")
        if self.weights and len(self.weights) != len(self.folders):
            raise ValueError(f"data.weights has {len(self.weights)} numbers for {len(self.folders)} of data.shards")
        for weight in self.weights:
            if not 0 < weight <= 1000:
                raise ValueError(f"data.weights {weight} must be above 0 and at most 1000: leave out an unused folder")
        remote = next((folder for folder in self.folders if is_address(folder)), None)
        if remote is not None and not self.disk_cache:
            raise ValueError(f"data.shards {remote} is not on a disk: give --data.disk_cache DIR, a folder on one")
        if self.disk_cache_gib <= 0:
            raise ValueError(f"data.disk_cache_gib {self.disk_cache_gib} must be above 0")
        check_workers(self.num_workers, self.prefetch)

    @property
    def folders(self) -> list[str]:
        """data.shards, as a list."""
        return [self.shards] if isinstance(self.shards, str) else self.shards

    @property
    def name(self) -> str:
        """data.shards, in messages."""
        return ", ".join(self.folders)


class ShardMixture(ShardSet):
    """The samples of several sets, one set after the other.

    Keys are unique, since randomness and digests hang on them: of samples that have the same in two sets, the later
    one's is "1/KEY", by the number of its set.

    Args:
        sets: at least one.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self._members = list(sets)
        self._first = np.cumsum([0, *(len(part) for part in sets)]).tolist()
        entries: list[Entry] = []
        seen: set[str] = set()
        for number, part in enumerate(sets):
            renamed = [
                dataclasses.replace(entry, key=f"{number}/{entry.key}") if entry.key in seen else entry
                for entry in part.entries
            ]
            seen.update(entry.key for entry in part.entries)
            entries += renamed
        super().__init__(sets[0].root, entries, ", ".join(part.name for part in sets))

    @property
    def sets(self) -> list[ShardSet]:
        return self._members

    def read(self, i: int, ext: str, start: int = 0, size: int | None = None) -> bytes:
        """As that of the set that the sample belongs to."""
        number = bisect_right(self._first, i) - 1
        return self._members[number].read(i - self._first[number], ext, start, size)


def local_folders(config: ShardsConfig) -> dict[str, Path]:
    """Name of each set -> the folder that it, or what lies beside its shards, is in here.

    Raises:
        UserError: if an address cannot be read.
    """
    return {
        folder: RemoteFolder(folder, config.disk_cache).local if is_address(folder) else Path(folder)
        for folder in config.folders
    }


def fetch_ahead(shards: ShardSet, indices: Sequence[int]) -> None:
    """Begins to fetch the shards of samples that will be read soon, if they are not on the disk."""
    bounds = np.cumsum([0, *(len(part) for part in shards.sets)])
    for part, first, end in zip(shards.sets, bounds[:-1], bounds[1:]):
        if part.cache is not None:
            part.cache.fetch_ahead([part.entries[i - first].shard for i in indices if first <= i < end])


def open_shards(config: ShardsConfig) -> ShardSet:
    """What a config names: one set, or several as one.

    Raises:
        UserError: if one is not there or not whole.
    """
    sets = [
        open_remote(RemoteFolder(folder, config.disk_cache), config.disk_cache_gib * 2**30)
        if is_address(folder)
        else open_folder(folder)
        for folder in config.folders
    ]
    return sets[0] if len(sets) == 1 else ShardMixture(sets)


def only_folder(config: ShardsConfig, verb: str) -> str:
    """The one folder that a verb takes.

    Raises:
        UserError: if there are several.
    """
    if len(config.folders) > 1:
        raise UserError(f"data.shards {config.name}: {verb} takes one folder at a time, run it for each")
    return config.folders[0]


def clip_places(shards: ShardSet, config: ShardsConfig) -> ClipPlaces:
    """Where each clip lies, for the order."""
    sets = np.repeat(np.arange(len(shards.sets)), [len(part) for part in shards.sets])
    before = np.cumsum([0, *(len(part.columns.shard_names) for part in shards.sets)])
    of_clip = [part.columns.shards.astype(np.int64) + first for part, first in zip(shards.sets, before)]
    weights = tuple(config.weights) or (1.0,) * len(shards.sets)
    return ClipPlaces(np.concatenate(of_clip), sets, weights)
