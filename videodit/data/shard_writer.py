"""Writing shards: the same samples give the same bytes (USTAR, mtime 0, no owner), and only whole sets can be read."""

import contextlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from videodit.data.shards import INDEX, PART, Entry, json_bytes, plain_values
from videodit.errors import user_error


class ShardWriter:
    """Writes samples into PREFIX-000000.tar, PREFIX-000001.tar, ... and, last, index.jsonl.

    It owns those names in its folder: an earlier index goes when it starts and earlier tars when it closes. Until
    `close`, everything has the suffix .part, so that no reader takes an interrupted run for a complete one. As a
    context manager it closes, unless an exception passes through.

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
        self._shards: list[str] = []
        self._file: io.BufferedWriter | None = None
        self._in_shard = 0
        try:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            (self.out_dir / INDEX).unlink(missing_ok=True)
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
            if self._file is None or self._in_shard == self.clips_per_shard:
                self._next_shard()
            places = {extension: self._add(f"{key}.{extension}", members[extension]) for extension in sorted(members)}
        except OSError as error:
            raise user_error(error, self.out_dir / self._shards[-1]) from error
        self._keys.add(key)
        self._in_shard += 1
        entry = Entry(key, self._shards[-1], places, meta)
        self.entries.append(entry)
        return entry

    def close(self) -> None:
        """Completes the set: the last tar, the names, the index."""
        try:
            self._end_shard()
            _write_index(self.out_dir / (INDEX + PART), self.entries)
            for stale in self.out_dir.glob(f"{self.prefix}-*.tar"):
                if stale.name not in self._shards:
                    stale.unlink()
            for name in self._shards:
                os.replace(self.out_dir / (name + PART), self.out_dir / name)
            os.replace(self.out_dir / (INDEX + PART), self.out_dir / INDEX)
        except OSError as error:
            raise user_error(error, self.out_dir) from error

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        elif self._file is not None:
            with contextlib.suppress(OSError):  # the disk is still full; what passes through says so
                self._file.close()

    def _next_shard(self) -> None:
        self._end_shard()
        self._shards.append(f"{self.prefix}-{len(self._shards):06d}.tar")
        self._file = open(self.out_dir / (self._shards[-1] + PART), "wb")
        self._in_shard = 0

    def _end_shard(self) -> None:
        if self._file is not None:
            self._file.write(b"\0" * (2 * tarfile.BLOCKSIZE))
            _sync(self._file)
            self._file.close()
            self._file = None

    def _add(self, name: str, data: bytes) -> tuple[int, int]:
        assert self._file is not None
        info = tarfile.TarInfo(name)
        info.size, info.mtime, info.mode = len(data), 0, 0o644
        self._file.write(info.tobuf(tarfile.USTAR_FORMAT))
        offset = self._file.tell()
        self._file.write(data)
        self._file.write(b"\0" * (-len(data) % tarfile.BLOCKSIZE))
        return offset, len(data)


def rewrite_index(root: Path, entries: Sequence[Entry]) -> None:
    """Puts another index in the place of a set's, at once: the same samples, others of them dropped.

    Raises:
        OSError: if it cannot be written; the old one stays.
    """
    _write_index(root / (INDEX + PART), entries)
    os.replace(root / (INDEX + PART), root / INDEX)


def _write_index(path: Path, entries: Sequence[Entry]) -> None:
    with open(path, "wb") as file:
        for entry in entries:
            line = {"key": entry.key, "shard": entry.shard, "members": entry.members, "meta": entry.meta}
            more = {"dropped": entry.dropped, "captions": entry.captions}
            file.write(json_bytes(line | {name: value for name, value in more.items() if value}) + b"\n")
        _sync(file)


def _sync(file: io.BufferedWriter) -> None:
    file.flush()
    os.fsync(file.fileno())
