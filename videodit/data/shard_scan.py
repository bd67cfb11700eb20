"""The samples of plain webdataset tars, such as other tools write: what their json doesn't say is read from the clips.

Foreign files are opened in worker processes: one that crashes or hangs FFmpeg costs its sample.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from videodit.data.isolation import Failure, run_isolated
from videodit.data.shards import (
    MAX_READ_BYTES,
    Entry,
    ShardSet,
    check_local_sizes,
    plain_values,
    read_span,
    shard_ends,
    tar_samples,
)
from videodit.data.video_io import VideoError, probe

_CHUNK = 64  # clips that a worker gets at a time
_WORKERS = 4  # every rank of a run does this
_STALL_LIMIT_S = 60.0
_MEMORY_GB = 8.0
_KNOWN = {"num_frames", "height", "width", "fps"}


class _Place(NamedTuple):
    path: Path
    offset: int
    size: int


def scan_tars(root: Path) -> list[Entry]:
    """Entries of a folder's tars, without those that could not be read in training either.

    Raises:
        UserError: if a tar is damaged.
    """
    found: list[Entry] = []
    unknown: dict[int, _Place] = {}  # clips of which the json does not say enough, often so
    for path in sorted(root.glob("*.tar")):
        entries = [Entry(key, path.name, members, {}) for key, members in tar_samples(path).items()]
        check_local_sizes(root, shard_ends(entries))
        one = ShardSet(root, entries)
        for i, entry in enumerate(entries):
            try:
                meta = plain_values(one.read_json(i))
            except (ValueError, RecursionError):
                continue
            if "mp4" in entry.members and not meta.keys() >= _KNOWN:
                unknown[len(found)] = _Place(path, *entry.members["mp4"])
            found.append(replace(entry, meta=meta))
    unread = set()
    for index, facts in zip(unknown, _probe(list(unknown.values())), strict=True):
        if isinstance(facts, Failure) or facts is None:
            unread.add(index)
        else:
            found[index].meta.update(facts)
    return _told_apart([entry for index, entry in enumerate(found) if index not in unread])


def _told_apart(entries: list[Entry]) -> list[Entry]:
    """With the tar's name before a key that was in one before it."""
    seen: set[str] = set()
    told: list[Entry] = []
    for entry in entries:
        told.append(replace(entry, key=f"{Path(entry.shard).stem}/{entry.key}") if entry.key in seen else entry)
        seen.add(told[-1].key)
    return told


def _probe(places: list[_Place]) -> Iterator[dict[str, Any] | Failure | None]:
    chunks = [places[start : start + _CHUNK] for start in range(0, len(places), _CHUNK)]
    return run_isolated(
        _facts,
        chunks,
        workers=_WORKERS,
        stall_limit_s=_STALL_LIMIT_S,
        max_memory_gb=_MEMORY_GB,
    )


def _facts(place: _Place, beat: Callable[[], None]) -> dict[str, Any] | None:
    """What a clip says of itself; None if it does not decode."""
    if place.size > MAX_READ_BYTES:
        return None
    try:
        info = probe(read_span(*place))
    except VideoError:
        return None
    return {"num_frames": info.num_frames, "height": info.height, "width": info.width, "fps": info.fps}
