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
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from videodit.data import video_io
from videodit.data.captions import Captions, stored_captions
from videodit.errors import UserError

INDEX = "index.jsonl"
PART = ".part"  # what is being written; it loses the suffix when all of it is there
_MEMBER = re.compile(r"^((?:.*/)?[^./]+)\.([^/]+)$")  # webdataset: the key ends at the first dot of the base name
_META_LENGTH = 300


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


def json_bytes(value: Any) -> bytes:
    """JSON, always the same bytes for the same value: sorted keys, UTF-8, one line."""
    return json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """The sha256 of bytes, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class ShardSet:
    """The samples of a folder of shards, by number.

    It holds no open file, so it may be shared by forked workers or pickled.
    """

    def __init__(self, root: str | Path, entries: list[Entry]) -> None:
        self.root = Path(root)
        self.entries = entries

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
            raise UserError(f"{root}: no such folder of shards: make it with 'videodit ingest SRC --out {root}'")
        if (root / INDEX).is_file():
            entries = _read_index(root / INDEX)
        elif next(root.glob(f"*{PART}"), None):
            raise UserError(f"{root} is incomplete, its writing was interrupted: run the command that writes it again")
        else:
            entries = list(_scan(root))
        used = [entry for entry in entries if dropped or not entry.dropped]
        if not used:
            raise UserError(
                f"{root} has no samples: nothing passed ingest (see rejects.jsonl), or it is no folder of shards"
            )
        _check_sizes(root, entries)
        return cls(root, used)

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
        """
        entry = self.entries[i]
        if ext not in entry.members:
            raise UserError(
                f"{self.root / entry.shard}: {entry.key} has no .{ext} (it has {', '.join(sorted(entry.members))})"
            )
        offset, whole = entry.members[ext]
        offset, left = offset + start, max(0, whole - start)
        size = left if size is None else min(size, left)
        path = self.root / entry.shard
        try:
            data = read_span(path, offset, size)
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from error
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
                if info.isfile() and match:
                    samples.setdefault(match[1], {})[match[2].lower()] = (info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{path} is no readable tar ({error}): remove it or get it again") from error
    return samples


def read_span(path: str | Path, offset: int, size: int) -> bytes:
    """Bytes of a file; fewer where it ends before.

    Raises:
        OSError: if it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return os.pread(descriptor, size, offset)
    finally:
        os.close(descriptor)


def _read_index(path: Path) -> list[Entry]:
    entries = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                record = json.loads(line)
                members = {extension: (int(place[0]), int(place[1])) for extension, place in record["members"].items()}
                more = record.get("dropped", ""), record.get("captions", {})
                entries.append(Entry(record["key"], record["shard"], members, record["meta"], *more))
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                raise UserError(
                    f"{path}, line {number} is damaged: remove the index to scan the tars, or write the shards again"
                ) from error
    return entries


def _scan(root: Path) -> Iterator[Entry]:
    """Entries of plain webdataset tars; what the json does not say of a clip (often so) is read from the mp4."""
    seen: set[str] = set()
    for path in sorted(root.glob("*.tar")):
        entries = [Entry(key, path.name, members, {}) for key, members in tar_samples(path).items()]
        _check_sizes(root, entries)
        one = ShardSet(root, entries)
        for i, entry in enumerate(entries):
            meta = plain_values(one.read_json(i))
            if "mp4" in entry.members and not {"num_frames", "height", "width", "fps"} <= meta.keys():
                try:
                    info_ = video_io.probe(one.read(i, "mp4"))
                except video_io.VideoError:
                    continue  # it could not be read in training either
                meta |= {"num_frames": info_.num_frames, "height": info_.height, "width": info_.width, "fps": info_.fps}
            key = entry.key if entry.key not in seen else f"{path.stem}/{entry.key}"
            seen.add(key)
            yield Entry(key, entry.shard, entry.members, meta)


def _check_sizes(root: Path, entries: list[Entry]) -> None:
    ends: dict[str, int] = {}
    for entry in entries:
        ends[entry.shard] = max(ends.get(entry.shard, 0), *(offset + size for offset, size in entry.members.values()))
    for name, end in sorted(ends.items()):
        try:
            size = (root / name).stat().st_size
        except OSError as error:
            raise UserError(
                f"{root / name} is missing, but {INDEX} lists it: restore it or write the shards again"
            ) from error
        if size < end:
            raise UserError(
                f"{root / name} is cut short ({size} bytes of at least {end}): restore it or write the shards again"
            )
