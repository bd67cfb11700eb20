"""Writing shards: the same samples give the same bytes (USTAR, mtime 0, no owner), and only whole sets can be read."""

import contextlib
import filecmp
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from videodit.data.shards import INDEX, PART, Entry, json_bytes, plain_values
from videodit.errors import user_error


class SampleWriter(Protocol):
    """What samples are written to: a set of shards, or one of them."""

    def write(self, key: str, members: Mapping[str, bytes]) -> Entry: ...


class ShardFile:
    """One tar, which has the suffix .part until `publish`.

    As a context manager it closes; an exception leaves what was written so far as it is.

    Args:
        path: where it is to lie.
        keys: those of the set that were used before; the tar's own are added.
    Raises:
        UserError: if it cannot be written.

    Attributes:
        entries: the samples.
        is_as_before: whether `compare` found it unchanged.
        size, sha256: bytes of the whole tar and their hash, as they were given to the system; right once it is closed.
    """

    def __init__(self, path: Path, keys: set[str] | None = None) -> None:
        self.path = path
        self.entries: list[Entry] = []
        self.size = 0
        self.is_as_before = False
        self._keys = set() if keys is None else keys
        self._digest = hashlib.sha256()
        try:
            self._file: io.BufferedWriter = open(f"{path}{PART}", "wb")
        except OSError as error:
            raise user_error(error, path) from error

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def write(self, key: str, members: Mapping[str, bytes]) -> Entry:
        """Adds one sample; see `ShardWriter.write`."""
        if not key or "." in key or "/" in key or len(key.encode()) > 80:
            raise ValueError(
                f"key {key!r} must have 1 to 80 bytes and no dot or slash: webdataset ends a key at the first dot"
            )
        if key in self._keys:
            raise ValueError(f"key {key!r} was already written")
        if not members:
            raise ValueError(f"key {key!r} has no members")
        meta = plain_values(json.loads(members["json"])) if "json" in members else {}
        try:
            places = {
                extension: self._member(f"{key}.{extension}", members[extension]) for extension in sorted(members)
            }
        except OSError as error:
            raise user_error(error, self.path) from error
        self._keys.add(key)
        entry = Entry(key, self.path.name, places, meta)
        self.entries.append(entry)
        return entry

    def close(self) -> None:
        """Completes the tar: all of it is on the disk then.

        Raises:
            UserError: if the disk is full.
        """
        if self._file.closed:
            return
        try:
            self._add(b"\0" * (2 * tarfile.BLOCKSIZE))
            _sync(self._file)
            self._file.close()
        except OSError as error:
            raise user_error(error, self.path) from error

    def flush(self) -> None:
        """Gives what was written so far to the system.

        Raises:
            UserError: if the disk is full.
        """
        try:
            self._file.flush()
        except OSError as error:
            raise user_error(error, self.path) from error

    def compare(self) -> None:
        """Drops a closed tar that is, byte for byte, the one that has its name already.

        Raises:
            UserError: if that cannot be read.
        """
        if self.is_as_before or not self.path.is_file():
            return
        part = Path(f"{self.path}{PART}")
        try:
            self.is_as_before = filecmp.cmp(part, self.path, shallow=False)
            if self.is_as_before:
                part.unlink()
        except OSError as error:
            raise user_error(error, self.path) from error

    def publish(self) -> None:
        """Gives a closed tar its name.

        Raises:
            OSError: if that cannot be.
        """
        os.replace(f"{self.path}{PART}", self.path)

    def give_up(self) -> None:
        """Lets go of the file after an error."""
        with contextlib.suppress(OSError):  # the disk is still full; whoever calls says so
            self._file.close()

    def __enter__(self) -> "ShardFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close() if kind is None else self.give_up()

    def _member(self, name: str, data: bytes) -> tuple[int, int]:
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, 0o644
        self._add(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self.size
        self._add(data)
        self._add(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return offset, len(data)

    def _add(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size += len(data)


class ShardWriter:
    """Writes samples into PREFIX-000000.tar, PREFIX-000001.tar, ... and, last, index.jsonl.

    It owns those names in its folder. Until `close`, everything has the suffix .part, so that no reader takes an
    interrupted run for a complete one, and an earlier set stays as it is; of a tar that comes out as it was before
    there is one on the disk. As a context manager it closes, unless an exception passes through.

    Args:
        out_dir: the folder; made if missing.
        clips_per_shard: samples in a tar; the last has what is left.
        prefix: how the tars' names begin.
    Raises:
        UserError: if the folder cannot be written.
    """

    def __init__(self, out_dir: str | Path, clips_per_shard: int = 1000, prefix: str = "shard") -> None:
        if clips_per_shard < 1:
            raise ValueError(f"clips_per_shard is {clips_per_shard}: at least 1 is needed")
        self.out_dir = Path(out_dir)
        self.clips_per_shard = clips_per_shard
        self.prefix = prefix
        self.entries: list[Entry] = []
        self._keys: set[str] = set()
        self._shards: list[ShardFile] = []
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            for path in self.out_dir.glob(f"{prefix}-*.tar{PART}"):
                path.unlink()
            (self.out_dir / (INDEX + PART)).write_bytes(b"")  # an interrupted run shows, even before its first tar
        except OSError as error:
            raise user_error(error, self.out_dir) from error

    def write(self, key: str, members: Mapping[str, bytes]) -> Entry:
        """Adds one sample.

        Args:
            key: its name: no dot, not used before.
            members: extension -> bytes. Plain values of the "json" member go into the index.
        Returns:
            Where it lies.
        Raises:
            ValueError: if the key has a dot or a slash, is too long or was used, or there are no members.
            UserError: if the disk is full.
        """
        if not self._shards or len(self._shards[-1].entries) == self.clips_per_shard:
            self._end_shard()
            path = self.out_dir / f"{self.prefix}-{len(self._shards):06d}.tar"
            self._shards.append(ShardFile(path, self._keys))
        entry = self._shards[-1].write(key, members)
        self.entries.append(entry)
        return entry

    def flush(self) -> None:
        """Gives all samples so far to the system, where they outlive this process."""
        if self._shards:
            self._shards[-1].flush()

    def close(self) -> None:
        """Completes the set: the last tar, the names, the index. An earlier set is gone from the first name on."""
        try:
            self._end_shard()
            write_index(self.out_dir / (INDEX + PART), self.entries)
            kept = {shard.path.name for shard in self._shards}
            (self.out_dir / INDEX).unlink(missing_ok=True)
            for stale in self.out_dir.glob(f"{self.prefix}-*.tar"):
                if stale.name not in kept:
                    stale.unlink()
            for shard in self._shards:
                if not shard.is_as_before:
                    shard.publish()
            os.replace(self.out_dir / (INDEX + PART), self.out_dir / INDEX)
        except OSError as error:
            raise user_error(error, self.out_dir) from error

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._shards:
            self._shards[-1].give_up()

    def _end_shard(self) -> None:
        if self._shards:
            self._shards[-1].close()
            self._shards[-1].compare()


def rewrite_index(root: Path, entries: Sequence[Entry]) -> None:
    """Puts another index in the place of a set's, at once: the same samples, others of them dropped.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    write_index(root / (INDEX + PART), entries)
    os.replace(root / (INDEX + PART), root / INDEX)


def write_index(path: Path, entries: Sequence[Entry]) -> None:
    """Writes a line for each sample, which `read_index` takes.

    Raises:
        OSError: if it cannot be written.
    """
    with open(path, "wb") as file:
        for entry in entries:
            file.write(index_line(entry))
        _sync(file)


def index_line(entry: Entry) -> bytes:
    """A sample's line in the index."""
    line = {"key": entry.key, "shard": entry.shard, "members": entry.members, "meta": entry.meta}
    more = {"dropped": entry.dropped, "captions": entry.captions}
    return json_bytes(line | {name: value for name, value in more.items() if value}) + b"\n"


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
