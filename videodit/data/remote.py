"""Shards in object storage: whole shards in a bounded folder on a local disk, which all processes of a node share.

    s3://bucket/shards --list--> CACHE/shards-1f0c…/{index.jsonl, latents.json, …} --on demand--> …/shard-000017.tar

A shard is fetched once, by whoever asks first, under a file lock; it appears whole or not at all. What was not used for
longest goes when room is needed; a reader that has it open reads on. The folder's name has a hash of what the store
lists, so that shards that were written anew are fetched anew.
"""

import fcntl
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from videodit.data.index_file import used_samples
from videodit.data.shards import INDEX, PART, ShardSet, check_sizes, read_span
from videodit.data.storage import open_system, reason, version_of
from videodit.errors import UserError

SIDE_FILES = (INDEX, "ingest.json", "latents.json", "empty_text.safetensors")
"""What lies beside the shards and is fetched when they are opened."""
TRIES = 3
"""How often a shard is asked for before its samples are given up."""
_PAUSE_S = 1.0  # before the second try; twice as long before each that follows
_ROOM = ".room"  # as large as the shard that is being fetched: others count it
_THREADS = 4  # that fetch ahead, in each process


def is_address(folder: str) -> bool:
    """Whether shards are fetched through the cache: from s3://bucket/shards, or a slow disk as file:///nfs/shards."""
    return "://" in folder


class RemoteFolder:
    """What a store holds at an address, and where it lies here.

    Args:
        address: as fsspec takes it.
        cache_dir: folder of the caches of all data sets on this node; made if missing.
    Raises:
        UserError: if the driver is missing, nothing is there, or the cache cannot be written.

    Attributes:
        local: the folder of this data set; what lies beside the shards is there, whole.
        sizes: bytes of each file by name.
    """

    def __init__(self, address: str, cache_dir: str | Path) -> None:
        self.address, self.cache_dir = address, Path(cache_dir)
        self._connected: tuple[int, Any, str] | None = None
        try:
            filesystem, path = self._connect()
            listed = filesystem.ls(path, detail=True)
            # What begins with a dot, others have put there: locks, columns of the index.
            files = [f for f in listed if f["type"] == "file" and not Path(f["name"]).name.startswith(".")]
        except UserError:
            raise
        except Exception as error:  # each store has its own
            raise UserError(f"data.shards {address} cannot be read: {reason(error)}") from error
        self.sizes = {Path(file["name"]).name: int(file["size"]) for file in files}
        versions = sorted((Path(file["name"]).name, file["size"], version_of(file)) for file in files)
        version = hashlib.sha256(json.dumps([address, versions]).encode()).hexdigest()[:16]
        self.local = self.cache_dir / f"{Path(path).name or 'shards'}-{version}"
        try:
            self.local.mkdir(parents=True, exist_ok=True)
            with _locked(self.local / ".lock"):
                for name in SIDE_FILES:
                    if name in self.sizes and not (self.local / name).exists():
                        self.get(name)
        except Exception as error:
            raise UserError(f"data.shards {address} cannot be read into {self.local}: {reason(error)}") from error

    def get(self, name: str) -> None:
        """Fetches one file; it appears when all of it is there. Call it under a lock.

        Raises:
            OSError: if it comes with another size than was listed; or what the store's driver raises.
        """
        filesystem, path = self._connect()
        part = self.local / f"{name}{PART}"
        try:
            filesystem.get_file(f"{path.rstrip('/')}/{name}", str(part))
            if part.stat().st_size != self.sizes[name]:
                raise OSError(f"{part.stat().st_size} bytes came of {self.sizes[name]}")
            os.replace(part, self.local / name)
        finally:
            part.unlink(missing_ok=True)

    def _connect(self) -> tuple[Any, str]:
        """The store, and the path in it: anew in each process, for drivers with threads don't survive a fork."""
        if self._connected is None or self._connected[0] != os.getpid():
            self._connected = os.getpid(), *open_system(self.address, anew=True)
        return self._connected[1:]


class ShardCache:
    """Shards of a remote folder on the local disk, as many as there is room for.

    Args:
        folder: where they come from and go to.
        limit_bytes: room for the shards of all data sets in its cache_dir.
    Raises:
        UserError: if the largest shard is larger than that.
    """

    def __init__(self, folder: RemoteFolder, limit_bytes: float) -> None:
        self._folder, self._limit = folder, limit_bytes
        self._ahead: _Ahead | None = None
        largest = max((size for name, size in folder.sizes.items() if name.endswith(".tar")), default=0)
        if largest > limit_bytes:
            raise UserError(
                f"data.disk_cache_gib is {limit_bytes / 2**30:.3g}, but a shard of {folder.address} has "
                f"{largest / 2**30:.3g} GiB: give room for a few of them for each stream that this node reads"
            )

    def read(self, shard: str, offset: int, size: int) -> bytes:
        """Bytes of a shard, which is fetched if it is not here.

        Raises:
            OSError: if it cannot be fetched.
        """
        while True:
            path = self.local(shard)
            with suppress(FileNotFoundError):  # it had to make room before it was opened
                return read_span(path, offset, size)

    def local(self, shard: str) -> Path:
        """Where a shard lies here, after fetching it if need be.

        Raises:
            OSError: if it cannot be fetched.
        """
        path = self._folder.local / shard
        with suppress(FileNotFoundError):
            os.utime(path)  # that it is in use: the oldest goes first
            return path
        with _locked(path.with_name(f"{shard}.lock")):
            if not path.exists():
                self._fetch(shard)
        return path

    def fetch_ahead(self, shards: Sequence[str]) -> list[Future[Path]]:
        """Begins to fetch, in threads of this process, what is not here; failures are left to those who read."""
        if self._ahead is None or self._ahead.process != os.getpid():
            self._ahead = _Ahead(self.local)
        return self._ahead.add([shard for shard in dict.fromkeys(shards) if not (self._folder.local / shard).exists()])

    def _fetch(self, shard: str) -> None:
        room = self._folder.local / f"{shard}{_ROOM}"
        try:
            for number in range(TRIES):
                if number:
                    time.sleep(_PAUSE_S * 2 ** (number - 1))
                try:
                    self._make_room(room, self._folder.sizes.get(shard, 0))
                    self._folder.get(shard)
                    return
                except Exception as error:  # each store has its own
                    problem = error
            raise OSError(f"{self._folder.address}/{shard} could not be fetched: {reason(problem)}") from problem
        finally:
            room.unlink(missing_ok=True)

    def _make_room(self, room: Path, size: int) -> None:
        """Removes the shards that were not used for longest until there is room, and takes it."""
        with _locked(self._folder.cache_dir / ".lock"):
            self._remove_left_over()
            room.unlink(missing_ok=True)
            paths = [path for path in self._folder.cache_dir.glob("*/*") if path.suffix in (".tar", _ROOM)]
            found = [(path, path.stat()) for path in paths]
            total = sum(stat.st_size for _, stat in found) + size
            for path, stat in sorted(found, key=lambda pair: pair[1].st_mtime_ns):
                if total <= self._limit:
                    break
                if path.suffix == ".tar":
                    path.unlink()
                    total -= stat.st_size
            with room.open("wb") as file:
                file.truncate(size)

    def _remove_left_over(self) -> None:
        """What processes left that were killed while they fetched: nobody holds the shard's lock."""
        for room in self._folder.cache_dir.glob(f"*/*{_ROOM}"):
            shard = room.with_suffix("")
            with open(shard.with_name(f"{shard.name}.lock"), "w") as lock, suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shard.with_name(f"{shard.name}{PART}").unlink(missing_ok=True)
                room.unlink(missing_ok=True)


class _Ahead:
    """Threads of one process that fetch shards. They are daemons: a process that ends does not wait for them, and what
    they leave is removed by the next one that needs room.
    """

    def __init__(self, fetch: Callable[[str], Path]) -> None:
        self.process = os.getpid()
        self._fetch = fetch
        self._queue: queue.SimpleQueue[tuple[str, Future[Path]]] = queue.SimpleQueue()
        self._running: dict[str, Future[Path]] = {}
        for _ in range(_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def add(self, shards: Sequence[str]) -> list[Future[Path]]:
        """What is on its way, with these."""
        self._running = {shard: future for shard, future in self._running.items() if not future.done()}
        for shard in shards:
            if shard not in self._running:
                self._running[shard] = Future()
                self._queue.put((shard, self._running[shard]))
        return list(self._running.values())

    def _work(self) -> None:
        while True:
            shard, future = self._queue.get()
            try:
                future.set_result(self._fetch(shard))
            except Exception as error:
                future.set_exception(error)


def open_remote(folder: RemoteFolder, limit_bytes: float) -> ShardSet:
    """The samples of a remote folder of shards.

    Args:
        folder: with an index.
        limit_bytes: see `ShardCache`.
    Raises:
        UserError: if it has no index, a shard is missing or cut short, or there is nothing to use.
    """
    if INDEX not in folder.sizes:
        raise UserError(
            f"data.shards {folder.address} has no {INDEX}: write the shards with videodit, or copy them to a disk"
        )
    used, columns, ends = used_samples(folder.local / INDEX)
    check_sizes(folder.address, ends, folder.sizes)
    if not used:
        raise UserError(f"data.shards {folder.address} has no samples that filters left in")
    return ShardSet(folder.local, used, folder.address, ShardCache(folder, limit_bytes), columns)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The kernel drops the lock with the process. The file stays: removed, two could hold it.
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
