"""Shards: tars of samples (webdataset's layout) and an index that says where each member lies.

A sample is a key and its members: KEY.mp4, KEY.json, KEY.npy, KEY.safetensors. Beside the tars lies index.jsonl, one
line a sample in the order of writing: {"key", "shard", "members": {extension: [offset, size]}, "meta": {the json
member's plain values}}, "dropped": why, for a sample that is there but not to be used, and "captions": {...}, where a
model wrote some, in the place of the json's. A reader needs one pread a
member. Folders without an index (any plain webdataset) are scanned instead.
"""

import hashlib
import json
import os
import re
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from videodit.data.captions import Captions, stored_captions
from videodit.data.columns import Columns
from videodit.errors import UserError

INDEX = "index.jsonl"
PART = ".part"  # what is being written; it loses the suffix when all of it is there
_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")  # webdataset: the key ends at the first dot of the base name
_META_LENGTH = 300

MAX_READ_BYTES = 1 << 30
"""Most of a member that is read at once: a damaged or hostile set is not to fill the memory."""

Stamp = tuple[int, int]
"""Bytes of a file, and when it was last written (ns): what tells that it was replaced."""


class ReplacedShard(UserError):
    """A shard is not the one any more that was opened: what the index says of it is of another."""


@dataclass(frozen=True)
class Entry:
    """One sample of a shard."""

    key: str
    """Its name, unique in the set, without a dot."""
    shard: str
    """File name of the tar."""
    members: dict[str, tuple[int, int]]
    """Extension -> (offset, size) in bytes within the tar."""
    meta: dict[str, Any]
    """The plain values of its json but the caption: num_frames, height, width, fps, source, ..."""
    dropped: str = ""
    """Why it is not to be used; empty if it is."""
    captions: dict[str, Any] = field(default_factory=dict)
    """What is read in the place of its json's captions, in the same form; empty for those."""

    @property
    def end(self) -> int:
        """Bytes that its shard has at least."""
        return max(map(sum, self.members.values()), default=0)


def json_bytes(value: Any) -> bytes:
    """JSON, always the same bytes for the same value: sorted keys, UTF-8, one line."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """The sha256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class SpanReader(Protocol):
    """Reads parts of shards by name, wherever they lie; OSError if one cannot be had."""

    def read(self, shard: str, offset: int, size: int) -> bytes: ...

    def fetch_ahead(self, shards: Sequence[str]) -> object: ...


class ShardSet:
    """The samples of a folder of shards, by number.

    Forked workers may share it.

    Attributes:
        root: the folder.
        entries: the samples.
        name: what messages call it.
        cache: what reads the tars if they are not in the folder for good.
    """

    def __init__(
        self,
        root: str | Path,
        entries: Sequence[Entry],
        name: str = "",
        cache: "SpanReader | None" = None,
        columns: Columns | None = None,
        stamps: Mapping[str, Stamp] | None = None,
    ) -> None:
        self.root = Path(root)
        self._stamps = stamps or {}  # of shards that must stay as they are
        self._columns = columns
        self.entries = entries
        self.name = name or str(root)
        self.cache = cache

    @property
    def columns(self) -> Columns:
        """The samples by column; made once."""
        if self._columns is None:
            self._columns = Columns.of(self.entries)
        return self._columns

    @property
    def sets(self) -> list["ShardSet"]:
        """What it is put together from: itself, or several of them, whose samples follow each other."""
        return [self]

    @classmethod
    def open(cls, root: str | Path, *, dropped: bool = False) -> "ShardSet":
        """Opens a folder of shards and checks that every tar is there in full.

        Args:
            root: a folder with index.jsonl, or with plain webdataset tars, which are then scanned.
            dropped: whether samples that are not to be used come too.
        Raises:
            UserError: if there is nothing, a tar is missing or cut short, or the set was not completed.
        """
        root = Path(root)
        if not root.is_dir():
            if root.is_file():
                raise UserError(f"{root} is a file: give the folder of the shards, {root.parent}")
            raise UserError(f"{root}: no such folder of shards: make it with 'videodit ingest SRC --out {root}'")
        if (root / INDEX).is_file():
            entries = read_index(root / INDEX)
        elif next(root.glob(f"*{PART}"), None):
            raise UserError(f"{root} is incomplete, its writing was interrupted: run the command that writes it again")
        else:
            from videodit.data.shard_scan import scan_tars  # it needs this module

            entries = scan_tars(root)
        used = [entry for entry in entries if dropped or not entry.dropped]
        if not used:
            raise UserError(
                f"{root} has no samples: nothing passed ingest (see rejects.jsonl), or it is no folder of shards, as "
                "'videodit ingest SRC --out SHARDS' makes one of videos"
            )
        return cls(root, used, stamps=check_local_sizes(root, shard_ends(entries)))

    def __len__(self) -> int:
        return len(self.entries)

    def read(self, i: int, ext: str, start: int = 0, size: int | None = None) -> bytes:
        """One member's bytes, or a part of them.

        Args:
            i: the sample's number in `entries`.
            ext: extension, as in "mp4".
            start: first byte.
            size: how many, or as many as there are; None reads to the end.
        Raises:
            UserError: if the sample has no such member, or the tar cannot be read or got shorter.
            ReplacedShard: if it was written anew since the set was opened.
        """
        entry = self.entries[i]
        if ext not in entry.members:
            raise UserError(
                f"{self.root / entry.shard}: {entry.key} has no .{ext} (it has {', '.join(sorted(entry.members))})"
            )
        offset, whole = entry.members[ext]
        offset, left = offset + start, max(0, whole - start)
        size = left if size is None else min(size, left)
        if size > MAX_READ_BYTES:
            raise UserError(
                f"{self.root / entry.shard}: {entry.key}.{ext} has {size} bytes, and no more than {MAX_READ_BYTES} are "
                "read at once: ingest it in shorter clips"
            )
        path = f"{self.root}/{entry.shard}"
        try:
            if self.cache:
                data = self.cache.read(entry.shard, offset, size)
            else:
                data = read_span(path, offset, size, self._stamps.get(entry.shard))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        if len(data) != size:
            raise UserError(
                f"{path} is cut short: {entry.key}.{ext} should have {size} bytes at {offset}; write the shards again"
            )
        return data

    def read_json(self, i: int) -> dict[str, Any]:
        """The sample's json, {} if it has none."""
        return json.loads(self.read(i, "json")) if "json" in self.entries[i].members else {}

    def captions(self, i: int) -> list[str]:
        """The texts of `weighted_captions`."""
        return self.weighted_captions(i).texts

    def weighted_captions(self, i: int) -> Captions:
        """The sample's captions, from the index, its json ("captions" or "caption") or its .txt; [""] if it has none.

        Raises:
            UserError: if its weights are none.
        """
        try:
            found = stored_captions(self.entries[i].captions or self.read_json(i))
        except ValueError as error:
            entry = self.entries[i]
            raise UserError(f"{self.root / entry.shard}: {entry.key}.json: {error}") from error
        if not found.texts:
            text = self.read(i, "txt").decode(errors="replace").strip() if "txt" in self.entries[i].members else ""
            return Captions([text])
        return found


def plain_values(record: Any) -> dict[str, Any]:
    """What of a sample's json goes into the index."""
    if not isinstance(record, dict):
        return {}
    plain = {
        key: value for key, value in record.items() if isinstance(value, bool | int | float | str) and key != "caption"
    }
    return {key: value for key, value in plain.items() if not (isinstance(value, str) and len(value) > _META_LENGTH)}


def tar_samples(path: str | Path, file: BinaryIO | None = None) -> dict[str, dict[str, tuple[int, int]]]:
    """The samples of a webdataset tar, in its order: key -> extension -> (offset, size); only headers are read.

    Args:
        path: where it lies.
        file: what to read of, if it is open already.
    Raises:
        UserError: if it is no tar, or damaged.
    """
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            for info in tar:
                match = _MEMBER.match(info.name)
                # No links, devices or holes, and no way out of a folder, should anyone unpack by these names.
                plain = info.isfile() and not info.issparse() and ".." not in Path(info.name).parts
                if plain and match and not info.name.startswith("/"):
                    samples.setdefault(match[1], {})[match[2].lower()] = (info.offset_data, info.size)
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if any(tar.fileobj.read(tarfile.BLOCKSIZE)):  # tarfile takes any damage but the first for the end
                raise tarfile.ReadError(f"damaged at byte {tar.offset}")
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is no readable tar ({error}): remove it or get it again") from error
    return samples


def read_span(path: str | Path, offset: int, size: int, stamp: Stamp | None = None) -> bytes:
    """Bytes of a file; fewer where it ends before.

    Args:
        path: of the file.
        offset, size: which bytes.
        stamp: that the file must have; None for any.
    Raises:
        OSError: if it cannot be read.
        ReplacedShard: if it has another stamp.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if stamp is not None and _stamp(os.fstat(descriptor)) != stamp:
            raise ReplacedShard(
                f"{path} was written anew while it was in use: run the same command again, and write new shards to "
                "another folder than a training reads"
            )
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def read_index(path: Path) -> list[Entry]:
    """The samples that an index lists.

    Raises:
        UserError: if it is damaged, or names a shard outside its folder.
    """
    entries = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            entry = parse_line(line)
            if entry is None:
                raise damaged_index(path, number)
            entries.append(entry)
    return entries


def parse_line(line: bytes) -> Entry | None:
    """The sample of an index's line; None if it is damaged, or names a shard outside its folder."""
    try:
        record = json.loads(line)
        shard = record["shard"]
        members = {extension: (int(place[0]), int(place[1])) for extension, place in record["members"].items()}
        if "/" in shard or shard in ("", ".", "..") or min(map(min, members.values()), default=0) < 0:
            return None  # it could name any file
        more = record.get("dropped", ""), record.get("captions", {})
        return Entry(record["key"], shard, members, record["meta"], *more)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        return None


def damaged_index(path: Path, number: int) -> UserError:
    """The error of an index whose line of this number, from 1, is damaged."""
    return UserError(f"{path}, line {number} is damaged: remove the index to scan the tars, or write the shards again")


def shard_ends(entries: Iterable[Entry]) -> dict[str, int]:
    """Shard -> bytes that it has at least to hold its samples."""
    ends: dict[str, int] = {}
    for entry in entries:
        ends[entry.shard] = max(ends.get(entry.shard, 0), entry.end)
    return ends


def check_sizes(where: str | Path, ends: Mapping[str, int], sizes: Mapping[str, int]) -> None:
    """Checks that every shard of an index is there in full.

    Args:
        where: the folder, for messages.
        ends: bytes of each shard of the index, at least.
        sizes: bytes of each shard that is there.
    Raises:
        UserError: if one is missing or shorter than its samples.
    """
    for name, end in sorted(ends.items()):
        if name not in sizes:
            raise UserError(f"{where}/{name} is missing, but {INDEX} lists it: restore it or write the shards again")
        if sizes[name] < end:
            raise UserError(
                f"{where}/{name} is cut short ({sizes[name]} bytes of at least {end}): restore it or write the shards "
                "again"
            )


def check_local_sizes(root: Path, ends: Mapping[str, int]) -> dict[str, Stamp]:
    """`check_sizes` of a folder of this machine: the shards' stamps."""
    stamps = {}
    for name in ends:
        with suppress(OSError):
            stamps[name] = _stamp((root / name).stat())
    check_sizes(root, ends, {name: size for name, (size, _) in stamps.items()})
    return stamps


def _stamp(stat: os.stat_result) -> Stamp:
    return stat.st_size, stat.st_mtime_ns  # no inode: some network file systems give others all the time
