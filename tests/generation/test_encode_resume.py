"""`videodit encode` makes what is missing and nothing else, with the bytes of a run that was never disturbed."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.generation.test_encode import NUM_CLIPS, encode_config, write_clips
from videodit.data.folder_lock import FolderLock
from videodit.data.latents import read_manifest
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.errors import UserError
from videodit.generation.encode import EncodeConfig, encode_clips

SHARDS = [f"shard-{number:06d}.tar" for number in range(3)]  # of 2, 2 and 1 clips


@pytest.fixture
def config(tmp_path: Path) -> EncodeConfig:
    return encode_config(tmp_path)


def contents(folder: str | Path) -> dict[str, str]:
    """Digest of every file, by path."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def stamps(config: EncodeConfig) -> dict[str, tuple[int, int]]:
    """What changes when a shard of latents is written again."""
    found = {path.name: path.stat() for path in Path(config.out).glob("*.tar")}
    return {name: (facts.st_ino, facts.st_mtime_ns) for name, facts in found.items()}


def remade(config: EncodeConfig, before: dict[str, tuple[int, int]]) -> list[str]:
    """The shards that are others now; what there is, is what a run into an empty folder gives."""
    fresh = dataclasses.replace(config, out=f"{config.out}-fresh")
    encode_clips(fresh)
    assert contents(config.out) == contents(fresh.out)
    return sorted(name for name, stamp in stamps(config).items() if before.get(name) != stamp)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], list[str]]] = {
    "a bit of a shard": (SHARDS[1], flip, SHARDS[1:2]),
    "a shard cut short": (SHARDS[2], cut, SHARDS[2:]),
    "a shard lost": (SHARDS[0], Path.unlink, SHARDS[:1]),
    "a record lost": (f"records/{SHARDS[1][:-4]}.json", Path.unlink, SHARDS[1:2]),
    "a record cut short": (f"records/{SHARDS[1][:-4]}.json", cut, SHARDS[1:2]),
    "a bit of the index": ("index.jsonl", flip, []),
    "the manifest": ("latents.json", Path.unlink, []),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_only_what_was_damaged_is_made_again(config: EncodeConfig, damage: str) -> None:
    name, harm, expected = DAMAGE[damage]
    encode_clips(config)
    path = Path(config.out) / name
    harm(path)
    before = {shard: stamp for shard, stamp in stamps(config).items() if shard != name}
    assert encode_clips(config) == sum((2, 2, 1)[SHARDS.index(shard)] for shard in expected)
    assert remade(config, before) == expected
    assert encode_clips(config) == 0


def replace_clips(config: EncodeConfig, change: Callable[[int, dict], dict | None], more: int = 0) -> None:
    """Writes the shards of clips anew, their json changed; those without one go."""
    shards = ShardSet.open(config.data.shards)
    samples = [
        (entry.key, {"mp4": shards.read(index, "mp4"), "json": shards.read(index, "json")})
        for index, entry in enumerate(shards.entries)
    ]
    samples += [(f"more{number}", samples[number][1]) for number in range(more)]
    with ShardWriter(config.data.shards, clips_per_shard=2) as writer:
        for number, (key, members) in enumerate(samples):
            record = change(number, json.loads(members["json"]))
            if record is not None:
                writer.write(key, {**members, "json": json.dumps(record).encode()})


def test_a_changed_shard_of_clips_changes_its_latents_only(config: EncodeConfig) -> None:
    encode_clips(config)
    before = stamps(config)
    replace_clips(config, lambda number, record: {**record, "captions": ["clap 2", "no 2"]} if number == 2 else record)
    assert encode_clips(config) == 2
    assert remade(config, before) == SHARDS[1:2]


def test_added_clips_are_encoded_alone(config: EncodeConfig) -> None:
    encode_clips(config)
    before = stamps(config)
    replace_clips(config, lambda number, record: record, more=3)
    assert encode_clips(config) == 2 + 2  # the last shard had room for one
    assert remade(config, before) == [SHARDS[2], "shard-000003.tar"]
    replace_clips(config, lambda number, record: record if number < NUM_CLIPS - 1 else None)
    before = stamps(config)
    assert encode_clips(config) == 0
    assert remade(config, before) == [] and sorted(stamps(config)) == SHARDS[:2]


def test_latents_without_records_are_made_anew(config: EncodeConfig) -> None:
    encode_clips(config)
    shutil.rmtree(Path(config.out) / "records")  # as they were made before there were any
    replace_clips(config, lambda number, record: record if number < NUM_CLIPS - 1 else None)
    before = stamps(config)
    assert encode_clips(config) == 4
    assert remade(config, before) == sorted(stamps(config)) == SHARDS[:2]


def test_large_shards_are_made_in_pieces(config: EncodeConfig) -> None:
    small = dataclasses.replace(config, clips_per_shard=1)
    assert encode_clips(small) == NUM_CLIPS
    pieces = [f"shard-{number:06d}-{piece:03d}.tar" for number in range(2) for piece in range(2)]
    assert sorted(stamps(small)) == [*pieces, SHARDS[2]]
    before = stamps(small)
    replace_clips(config, lambda number, record: {**record, "captions": ["clap 1", "no 1"]} if number == 1 else record)
    assert encode_clips(small) == 1
    assert remade(small, before) == pieces[1:2]


class Killed(BaseException):
    """Nothing catches it."""


def test_wherever_it_is_killed_it_goes_on(config: EncodeConfig, tmp_path: Path, monkeypatch) -> None:
    """Killed before each file gets its name, in a folder that held latents of other clips."""
    write_clips(tmp_path / "shards", noun="clap")
    stale = dataclasses.replace(config, out=str(tmp_path / "stale"))
    encode_clips(stale)
    write_clips(tmp_path / "shards")
    fresh = dataclasses.replace(config, out=str(tmp_path / "fresh"))
    encode_clips(fresh)
    rename, left, again = os.replace, 0, []

    def replace(source: str, target: str) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Killed
        rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for survives in range(2 * len(SHARDS) + 2):  # a tar and a record each, the index, the manifest
        config = dataclasses.replace(config, out=str(tmp_path / f"killed-{survives}"))
        shutil.copytree(stale.out, config.out)
        left = survives
        with pytest.raises(Killed):
            encode_clips(config)
        assert read_manifest(config.out) is None  # which training asks for
        if survives <= 2 * len(SHARDS):
            with pytest.raises(UserError, match="incomplete"):
                ShardSet.open(config.out)
        left = 100
        again.append(encode_clips(config))
        assert contents(config.out) == contents(fresh.out)
    assert again == [5, 5, 3, 3, 1, 1, 0, 0]


def test_others_are_kept_out_while_it_writes(config: EncodeConfig) -> None:
    looks = FolderLock(config.out, "out")  # as one does that finds nothing to do
    with pytest.raises(UserError, match="in use by another process: wait for it, or choose another out"):
        encode_clips(config)
    looks.hold_alone()
    with pytest.raises(UserError, match=f"out {config.out} is in use by process {os.getpid()}: wait"):
        encode_clips(config)
    looks.close()
    assert encode_clips(config) == NUM_CLIPS
    looks = FolderLock(config.out, "out")
    assert encode_clips(config) == 0
    looks.close()


def test_folders_of_others_are_left_alone(config: EncodeConfig, tmp_path: Path) -> None:
    before = contents(config.data.shards)
    with pytest.raises(UserError, match="is the folder of the clips: choose another out"):
        encode_clips(dataclasses.replace(config, out=config.data.shards))
    write_clips(tmp_path / "others", noun="clap")
    with pytest.raises(UserError, match="holds tars that encode did not write: choose another out"):
        encode_clips(dataclasses.replace(config, out=str(tmp_path / "others")))
    assert contents(config.data.shards) == before
    assert ShardSet.open(tmp_path / "others").captions(0) == ["clap 0", "no 0"]


def test_latents_without_any_clip_are_none(config: EncodeConfig) -> None:
    write_clips(Path(config.data.shards), broken=tuple(range(NUM_CLIPS)))
    with pytest.raises(UserError, match="none of its 5 clips could be read"):
        encode_clips(config)
    assert read_manifest(config.out) is None
