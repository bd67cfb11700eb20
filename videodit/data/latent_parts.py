"""A latent set in parts: each of its shards is made from a fixed range of clips, by whichever process, at any time.

Beside the shards lie records/NAME.json, one for each NAME.tar: what it was made of, its size and hash, its samples'
lines of the index. A shard counts if its record is what would be made now and the tar is what the record says.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from videodit.data.clip_reader import CLIP_EXTENSIONS, FIELD_EXTENSION
from videodit.data.index_file import prepare
from videodit.data.latents import MANIFEST, invalidate
from videodit.data.shard_writer import ShardFile, rewrite_index
from videodit.data.shards import INDEX, PART, Entry, ShardSet, json_bytes, read_index
from videodit.errors import UserError, user_error

RECORDS = "records"

_CHUNK = 1 << 24  # bytes that are hashed at a time
_FACTS = ("num_frames", "height", "width", "fps", "channels")  # of the index, which the cut hangs on


@dataclass(frozen=True)
class Part:
    """A shard of latents and the clips that it is made from."""

    shard: str
    """its file name"""
    clips: tuple[int, ...]
    """their numbers"""


@dataclass(frozen=True)
class ShardRecord:
    """What is known of a finished shard of latents."""

    made_of: str
    """hash of the clips and of everything that was done to them"""
    size: int
    """bytes of the tar"""
    sha256: str
    """of the tar"""
    entries: list[Entry]
    """its samples"""


def make_parts(shards: ShardSet, clips: Sequence[int], clips_per_shard: int) -> list[Part]:
    """One part for each shard of clips, several for one that has more clips than that.

    Args:
        shards: the clips.
        clips: numbers of those that are to be encoded.
        clips_per_shard: most clips of a part.
    Raises:
        UserError: if two parts would have the same name.
    """
    by_shard: dict[str, list[int]] = {}
    for index in clips:
        by_shard.setdefault(shards.entries[index].shard, []).append(index)
    parts = []
    for name, members in by_shard.items():
        pieces = [members[first : first + clips_per_shard] for first in range(0, len(members), clips_per_shard)]
        for number, piece in enumerate(pieces):
            suffix = f"-{number:03d}" if len(pieces) > 1 else ""
            parts.append(Part(f"{Path(name).stem}{suffix}.tar", tuple(piece)))
    (shard, count), *_ = Counter(part.shard for part in parts).most_common(1)
    if count > 1:
        raise UserError(f"{shards.name}: {count} shards of latents would be called {shard}: rename a shard of clips")
    return parts


def deal_parts(parts: Sequence[Part], ranks: int) -> list[list[Part]]:
    """Each rank's parts: neighbours, about as many clips for all."""
    shares: list[list[Part]] = [[] for _ in range(ranks)]
    total, before = sum(len(part.clips) for part in parts), 0
    for part in parts:
        shares[(2 * before + len(part.clips)) * ranks // (2 * total)].append(part)  # by where its middle lies
        before += len(part.clips)
    return shares


def clips_fingerprint(shards: ShardSet, clips: Sequence[int], beat: Callable[[], None] = lambda: None) -> str:
    """A sha256 over what clips are, whatever tar they lie in: key, pixels, captions and all else that their json says.

    Pixels are known by the `sha256` of their json, as ingest writes it; without one they are read.

    Args:
        shards: the clips.
        clips: numbers of those that count.
        beat: called now and then.
    Raises:
        UserError: if a shard cannot be read.
    """
    digest = hashlib.sha256()
    for index in clips:
        beat()
        entry = shards.entries[index]
        pixels = entry.meta.get("sha256") or _pixels_sha256(shards, index)
        facts = {name: entry.meta[name] for name in _FACTS if name in entry.meta}
        digest.update(json_bytes([entry.key, pixels, facts, entry.captions]) + b"\n")
        # Not from the index: a caption may be edited to one of the same length.
        for extension in ("json", "txt"):
            if extension in entry.members:
                digest.update(shards.read(index, extension) + b"\n")
    return digest.hexdigest()


def _pixels_sha256(shards: ShardSet, index: int) -> str:
    digest, members = hashlib.sha256(), shards.entries[index].members
    extension = next((ext for ext in (*CLIP_EXTENSIONS, FIELD_EXTENSION) if ext in members), None)
    size = members[extension][1] if extension else 0
    for start in range(0, size, _CHUNK):
        assert extension is not None
        digest.update(shards.read(index, extension, start, _CHUNK))
    return digest.hexdigest()


def is_whole(out_dir: Path, part: Part, made_of: str, beat: Callable[[], None] = lambda: None) -> bool:
    """Whether a part's shard is there, made of this, and without a bit changed: all of it is read.

    Args:
        out_dir: folder of the latent shards.
        part: which.
        made_of: what its record has to say.
        beat: called now and then.
    """
    record = read_record(out_dir, part.shard)
    if record is None or record.made_of != made_of:
        return False
    digest, path = hashlib.sha256(), out_dir / part.shard
    try:
        if path.stat().st_size != record.size:
            return False
        with open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                beat()
                digest.update(chunk)
    except OSError:
        return False
    return digest.hexdigest() == record.sha256


def finish_part(file: ShardFile, made_of: str) -> None:
    """Gives a closed shard its name and its record; in between, it does not count.

    Raises:
        UserError: if they cannot be written.
    """
    path = _record_path(file.path.parent, file.path.name)
    samples = [[entry.key, entry.members, entry.meta] for entry in file.entries]
    record = {"made_of": made_of, "size": file.size, "sha256": file.sha256, "samples": samples}
    try:
        with open(f"{path}{PART}", "wb") as part:
            part.write(json_bytes(record) + b"\n")
            part.flush()
            os.fsync(part.fileno())
        file.publish()
        os.replace(f"{path}{PART}", path)
    except OSError as error:
        raise user_error(error, path) from error


def read_record(out_dir: Path, shard: str) -> ShardRecord | None:
    """What `finish_part` wrote; None if it is missing or damaged."""
    try:
        record = json.loads(_record_path(out_dir, shard).read_bytes())
        entries = [
            Entry(key, shard, {extension: (int(at), int(size)) for extension, (at, size) in members.items()}, meta)
            for key, members, meta in record["samples"]
        ]
        return ShardRecord(record["made_of"], record["size"], record["sha256"], entries)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def prepare_folder(out_dir: Path, parts: Sequence[Part]) -> None:
    """Takes back that the folder holds a whole set, and removes what is not of these parts or was not finished.

    Raises:
        UserError: if the folder holds tars that are no latents, or cannot be written.
    """
    records = out_dir / RECORDS
    ours = records.is_dir() or any((out_dir / name).is_file() for name in (MANIFEST, f"{INDEX}{PART}"))
    if not ours and next(out_dir.glob("*.tar"), None):
        raise UserError(f"out {out_dir} holds tars that encode did not write: choose another out")
    others = set(_earlier_shards(out_dir)) - {part.shard for part in parts}
    invalidate(out_dir)
    try:
        records.mkdir(exist_ok=True)
        for shard in others:
            (out_dir / shard).unlink(missing_ok=True)
            _record_path(out_dir, shard).unlink(missing_ok=True)
        for folder, pattern in ((out_dir, f"*.tar{PART}"), (records, f"*{PART}")):
            for path in folder.glob(pattern):
                path.unlink()
    except OSError as error:
        raise user_error(error, out_dir) from error


def write_parts_index(out_dir: Path, parts: Sequence[Part]) -> int:
    """Writes the index of a folder in which every part is finished.

    Returns:
        Samples in it.
    Raises:
        UserError: if a record is not there any more, or the index cannot be written.
    """
    entries: list[Entry] = []
    for part in parts:
        record = read_record(out_dir, part.shard)
        if record is None:
            raise UserError(f"{_record_path(out_dir, part.shard)} is missing or damaged: run the same command again")
        entries += record.entries
    try:
        rewrite_index(out_dir, entries)
        prepare(out_dir / INDEX)
    except OSError as error:
        raise user_error(error, out_dir) from error
    return len(entries)


def _earlier_shards(out_dir: Path) -> Iterator[str]:
    for path in (out_dir / RECORDS).glob("*.json"):
        yield f"{path.stem}.tar"
    if (out_dir / INDEX).is_file():  # of a set that was made before there were records
        yield from {entry.shard for entry in read_index(out_dir / INDEX)}


def _record_path(out_dir: Path, shard: str) -> Path:
    return out_dir / RECORDS / f"{Path(shard).stem}.json"
