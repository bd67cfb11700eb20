"""A large index, whose lines are read when their samples are asked for; columns of it lie in a file beside it.

    index.jsonl --once--> .index.safetensors: sha256 of index.jsonl, where each line begins, `Columns`

The file counts only for an index of that sha256, which is taken whenever the index is opened; else it is made anew.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple, overload

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from videodit.data.columns import FACTS, Columns, Keys
from videodit.data.shards import (
    INDEX,
    Entry,
    ShardSet,
    check_local_sizes,
    damaged_index,
    parse_line,
    read_index,
    shard_ends,
)
from videodit.errors import UserError

COLUMNS = ".index.safetensors"
LARGE_BYTES = 16 << 20
"""An index below this is read as a whole: that takes less than a second."""

_VERSION = 1  # of the file of columns
_KEPT = 4096  # entries that were asked for last


class UsedSamples(NamedTuple):
    """What an index has for use."""

    entries: Sequence[Entry]
    """The samples, without those that are not to be used."""
    columns: Columns | None
    """Of them, if they were at hand."""
    ends: dict[str, int]
    """Shard -> bytes that it has at least, for all samples."""


class IndexFile(Sequence[Entry]):
    """Samples of an index that stays on the disk. Its file is held open: what is put in its place later is another.

    Args:
        path: of index.jsonl.
        file: the same, open.
        lines: (n, 2) int64 where each sample's line begins and ends.
        keys: of the samples.
    """

    def __init__(self, path: Path, file: BinaryIO, lines: np.ndarray, keys: Sequence[str]) -> None:
        self._path, self._file, self._lines, self._keys = path, file, lines, keys
        self._kept: dict[int, Entry] = {}

    def __len__(self) -> int:
        return len(self._lines)

    @overload
    def __getitem__(self, i: int) -> Entry: ...
    @overload
    def __getitem__(self, i: slice) -> list[Entry]: ...
    def __getitem__(self, i: int | slice) -> Entry | list[Entry]:
        """Raises UserError if the file was written to since it was opened."""
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        entry = self._kept.get(i)
        if entry is None:
            start, end = self._lines[i].tolist()
            entry = parse_line(os.pread(self._file.fileno(), end - start, start))
            if entry is None or entry.key != self._keys[i]:
                raise UserError(f"{self._path} was changed while it was in use: run the same command again")
            if len(self._kept) >= _KEPT:
                self._kept.clear()
            self._kept[i] = entry
        return entry


def open_folder(root: str | Path) -> ShardSet:
    """`ShardSet.open` for training: a large index is not read as a whole.

    Raises:
        UserError: as it does.
    """
    root = Path(root)
    if not _is_large(root / INDEX):
        return ShardSet.open(root)
    entries, columns, ends = used_samples(root / INDEX)
    if not entries:
        return ShardSet.open(root)  # which says so
    return ShardSet(root, entries, columns=columns, stamps=check_local_sizes(root, ends))


def used_samples(path: Path) -> UsedSamples:
    """The samples of an index that are to be used.

    Args:
        path: of index.jsonl. Of a large one the columns are written beside it, where that can be.
    Raises:
        UserError: if the index is damaged.
    """
    if not _is_large(path):
        read = read_index(path)
        return UsedSamples([entry for entry in read if not entry.dropped], None, shard_ends(read))
    file = open(path, "rb")
    digest = _sha256(file)
    table = _load(path.with_name(COLUMNS), digest)
    if table is None:
        file.seek(0)
        table = _make(path, file)
        _save(path.with_name(COLUMNS), table, digest)
    lines, columns = np.stack([table.lines[:-1], table.lines[1:]], axis=1), table.columns
    if not table.used.all():
        rows = np.flatnonzero(table.used)
        lines, columns = lines[rows], columns.take(rows)
    return UsedSamples(IndexFile(path, file, lines, columns.keys), columns, table.ends)


def prepare(path: Path) -> None:
    """Makes what the first use of a large index would have to make, so that no training waits for it.

    Args:
        path: of index.jsonl, which is complete.
    """
    if _is_large(path):
        used_samples(path)


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def _is_large(path: Path) -> bool:
    try:
        return path.stat().st_size >= LARGE_BYTES
    except OSError:
        return False


@dataclass
class _Table:
    """All lines of an index.

    Attributes:
        columns: of the samples; their keys are `Keys`.
        lines: (n + 1,) int64 where each line begins, and where the last one ends.
        used: (n,) bool, false for samples that are not to be used.
        ends: shard -> bytes that it has at least.
    """

    columns: Columns
    lines: np.ndarray
    used: np.ndarray
    ends: dict[str, int]


def _make(path: Path, file: BinaryIO) -> _Table:
    lines, used, ends = [0], [], dict[str, int]()

    def entries() -> Iterator[Entry]:
        for number, line in enumerate(file, 1):
            entry = parse_line(line)
            if entry is None:
                raise damaged_index(path, number)
            lines.append(lines[-1] + len(line))
            used.append(not entry.dropped)
            ends[entry.shard] = max(ends.get(entry.shard, 0), entry.end)
            yield entry

    columns = Columns.of(entries())
    columns.keys = Keys.of(columns.keys)
    return _Table(columns, np.array(lines), np.array(used, dtype=bool), ends)


def _save(path: Path, table: _Table, digest: str) -> None:
    """Writes the columns, if the folder takes them: other processes may be doing the same."""
    columns = table.columns
    assert isinstance(columns.keys, Keys)
    tensors = {"lines": table.lines, "used": table.used, "shards": columns.shards, "buckets": columns.buckets}
    tensors |= {"keys": columns.keys.text, "key_ends": columns.keys.ends}
    tensors |= {f"sizes/{extension}": values for extension, values in columns.sizes.items()}
    tensors |= {f"facts/{name}": values for name, values in columns.facts.items()}
    facts = {"version": _VERSION, "sha256": digest, "ends": table.ends}
    facts |= {"shards": columns.shard_names, "buckets": columns.bucket_names}
    data = save(tensors, {"facts": json.dumps(facts)})
    part = ""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f"{COLUMNS}-", delete=False) as file:
            part = file.name
            file.write(data)
        os.chmod(part, 0o644)
        os.replace(part, path)
    except OSError:  # a folder that cannot be written, or a full disk: the next one to come reads the index as well
        Path(part).unlink(missing_ok=True) if part else None


def _load(path: Path, digest: str) -> _Table | None:
    """What `_save` wrote; None if it is missing, damaged or of another index."""
    try:
        with safe_open(path, framework="numpy") as file:
            facts = json.loads(file.metadata()["facts"])
            if (facts["version"], facts["sha256"]) != (_VERSION, digest):
                return None
            arrays = {name: file.get_tensor(name) for name in file.keys()}
        count = len(arrays["used"])
        ends = arrays["key_ends"]
        keys = Keys(arrays["keys"], np.concatenate([[0], ends[:-1]]), ends)
        sizes = {name.removeprefix("sizes/"): arrays[name] for name in arrays if name.startswith("sizes/")}
        numbers = {name: arrays[f"facts/{name}"] for name in FACTS}
        columns = Columns(keys, arrays["shards"], facts["shards"], arrays["buckets"], facts["buckets"], sizes, numbers)
        table = _Table(columns, arrays["lines"], arrays["used"], facts["ends"])
        lengths = [len(ends), len(table.lines) - 1, len(columns.shards), len(columns.buckets)]
        lengths += map(len, [*sizes.values(), *numbers.values()])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
    return table if set(lengths) == {count} else None
