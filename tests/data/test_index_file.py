"""A large index is read by columns and line by line: the same samples as when it is read as a whole."""

import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.data.test_field import ONE, saved, values
from tests.data.test_mixture import rows_of, write_latents
from videodit.data import index_file
from videodit.data.columns import Columns
from videodit.data.index_file import COLUMNS, open_folder
from videodit.data.ingest import ingest
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.loader import LatentLoader
from videodit.data.shards import INDEX, Entry, ShardSet
from videodit.errors import UserError

CLIPS = 23  # in shards of 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(write_latents(tmp_path / "a", "a", CLIPS))


@pytest.fixture
def as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "LARGE_BYTES", 1)


def change(folder: Path, *places: int, **values: object) -> None:
    """Sets values of lines of the index, as `rewrite_index` does it."""
    lines = (folder / INDEX).read_text().splitlines()
    for place in places:
        lines[place] = json.dumps(json.loads(lines[place]) | values, sort_keys=True)
    (folder / "new").write_text("\n".join(lines) + "\n")
    os.replace(folder / "new", folder / INDEX)


def same(a: ShardSet, b: ShardSet) -> None:
    assert len(a) == len(b) and list(a.entries) == list(b.entries)
    one, other = a.columns, b.columns
    assert list(one.keys) == list(other.keys) and one.sizes.keys() == other.sizes.keys()
    assert (one.shard_names, one.bucket_names) == (other.shard_names, other.bucket_names)
    pairs = [(one.shards, other.shards), (one.buckets, other.buckets)]
    pairs += [(values, other.sizes[name]) for name, values in one.sizes.items()]
    pairs += [(values, other.facts[name]) for name, values in one.facts.items()]
    for left, right in pairs:
        assert np.array_equal(left, right)


@pytest.mark.usefixtures("as_large")
@pytest.mark.parametrize("writable", [True, False])
def test_the_same_samples_columns_and_batches(folder: Path, monkeypatch: pytest.MonkeyPatch, writable: bool) -> None:
    change(folder, 0, 1, 2, 3, 9, dropped="too dark")  # all of the first shard
    change(folder, 5, 6, key="ключ-5")  # one that takes more bytes than it has letters
    if not writable:  # a folder at which nobody may write, root either
        (folder / COLUMNS).mkdir()
        (folder / COLUMNS / "x").touch()
    for _ in range(2):
        same(open_folder(folder), ShardSet.open(folder))
        assert (folder / COLUMNS).is_file() == writable
        assert not list(folder.glob(f"{COLUMNS}-*"))

    def rows(workers: int) -> object:
        config = LatentDataConfig(str(folder), num_workers=workers, cache_gib=0)
        return rows_of(
            [
                LatentLoader(config, seed=1, global_batch_size=4, micro_batch_size=2, rank=rank, world=2)
                for rank in (0, 1)
            ],
            10,
            3,
        )

    large = rows(0), rows(2)
    monkeypatch.setattr(index_file, "LARGE_BYTES", 1 << 40)
    assert large == (rows(0),) * 2


@pytest.mark.usefixtures("as_large")
def test_ingest_and_encode_leave_the_columns_behind(tmp_path: Path) -> None:
    ingest(saved(tmp_path / "in", a=values(0, 5, 4, 4)), tmp_path / "out", ONE)
    vae, shards = tiny.make_vae(tmp_path / "vae"), tiny.make_shards(tmp_path / "shards")
    for folder in (tmp_path / "out", tiny.make_latents(tmp_path / "latents", shards, vae)):
        made = (folder / COLUMNS).read_bytes(), (folder / COLUMNS).stat().st_ino
        same(open_folder(folder), ShardSet.open(folder))
        assert made == ((folder / COLUMNS).read_bytes(), (folder / COLUMNS).stat().st_ino)


@pytest.mark.usefixtures("as_large")
def test_columns_of_another_index_or_damaged_ones_are_made_anew(folder: Path) -> None:
    open_folder(folder)
    columns, before = (folder / COLUMNS).read_bytes(), (folder / INDEX).stat()
    # The same size, time and inode: only what it says is other.
    text = (folder / INDEX).read_text()
    with open(folder / INDEX, "r+") as file:
        file.write(text.replace('"c3"', '"x3"'))
    os.utime(folder / INDEX, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (folder / INDEX).stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    shards = open_folder(folder)
    assert shards.columns.keys[3] == shards.entries[3].key == "x3"
    same(shards, ShardSet.open(folder))
    made_anew = (folder / COLUMNS).read_bytes()
    assert made_anew != columns
    for damaged in (b"", columns, made_anew[:-7], made_anew[:100] + b"\xff" * 40 + made_anew[140:]):
        (folder / COLUMNS).write_bytes(damaged)
        same(open_folder(folder), ShardSet.open(folder))
        assert (folder / COLUMNS).read_bytes() == made_anew


@pytest.mark.usefixtures("as_large")
def test_an_index_that_is_replaced_is_read_on_and_one_that_is_overwritten_is_an_error(folder: Path) -> None:
    expected = list(ShardSet.open(folder).entries)
    first, second = open_folder(folder), open_folder(folder)
    change(folder, 0, key="other")
    assert list(first.entries) == expected
    copy = folder / "copy"
    shutil.copyfile(folder / INDEX, copy)
    shards = open_folder(folder)
    (folder / INDEX).write_bytes(b"{}\n" + copy.read_bytes())
    with pytest.raises(UserError, match="index.jsonl was changed while it was in use: run the same command again"):
        shards.entries[4]
    assert list(second.entries) == expected


@pytest.mark.usefixtures("as_large")
def test_mistakes_are_those_of_a_small_index(folder: Path) -> None:
    lines = (folder / INDEX).read_text().splitlines()
    (folder / INDEX).write_text("\n".join([*lines[:2], "{", *lines[3:]]) + "\n")
    with pytest.raises(UserError, match=r"index.jsonl, line 3 is damaged"):
        open_folder(folder)
    (folder / INDEX).write_text("\n".join(lines) + "\n")
    tar = sorted(folder.glob("*.tar"))[1]
    os.truncate(tar, 100)
    with pytest.raises(UserError, match=f"{tar.name} is cut short"):
        open_folder(folder)
    change(folder, *range(CLIPS), dropped="too dark")
    with pytest.raises(UserError, match="has no samples"):
        open_folder(folder)


def test_columns_of_some_samples_are_as_if_there_were_no_others(folder: Path) -> None:
    change(folder, *range(8, 12), meta={"bucket": "9x32x32"})
    change(folder, *range(12, 14), meta={}, members={"json": [512, 9]})
    entries = ShardSet.open(folder).entries
    rows = np.array([4, 5, 9, 12, 20])
    taken, made = Columns.of(entries).take(rows), Columns.of([entries[row] for row in rows])
    assert (taken.shard_names, taken.bucket_names) == (made.shard_names, made.bucket_names)
    assert taken.buckets.tolist() == made.buckets.tolist() == [0, 0, 1, -1, 0]
    assert taken.shards.tolist() == made.shards.tolist() == [0, 0, 1, 2, 3]
    assert {name: sizes.tolist() for name, sizes in taken.sizes.items()} == {
        n: s.tolist() for n, s in made.sizes.items()
    }
    assert list(islice(taken.keys, 2, 4)) == made.keys[2:4]


def test_the_usual_rate_is_that_of_half_the_clips_without_pictures() -> None:
    facts = [{"fps": 24.0}, {"fps": 30.0}, {"fps": 60.0, "num_frames": 9}, {}, {"fps": 1.0, "num_frames": 1}]
    facts += [{"fps": 1.0, "bucket": "1x32x32"}] * 4
    entries = [Entry(str(n), "a.tar", {}, meta) for n, meta in enumerate(facts)]
    assert Columns.of(entries).usual_fps() == 30.0
    assert Columns.of(entries[3:]).usual_fps() == 0.0
