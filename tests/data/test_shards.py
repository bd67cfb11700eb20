"""Shards: bytes come back, sets are deterministic, damage and interruption are named."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.mp4 import encode_mp4
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import INDEX, ShardSet, json_bytes
from videodit.errors import UserError


def sample(i: int) -> dict[str, bytes]:
    return {
        "npy": bytes([i]) * (500 + i),
        "json": json_bytes({"caption": f"clip {i}", "num_frames": i, "fps": 8.0, "extra": {"a": 1}}),
    }


def write(folder: Path, count: int = 7, per_shard: int = 3) -> Path:
    with ShardWriter(folder, per_shard) as writer:
        for i in range(count):
            writer.write(f"k{i}", sample(i))
    return folder


def test_what_is_written_is_read(tmp_path: Path) -> None:
    shards = ShardSet.open(write(tmp_path))
    assert [entry.key for entry in shards.entries] == [f"k{i}" for i in range(7)]
    assert [entry.shard for entry in shards.entries] == [f"shard-{i // 3:06d}.tar" for i in range(7)]
    for i in reversed(range(7)):
        assert shards.read(i, "npy") == sample(i)["npy"]
        assert shards.captions(i) == [f"clip {i}"]
        assert shards.entries[i].meta == {"num_frames": i, "fps": 8.0}


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.dictionaries(st.sampled_from(["mp4", "npy", "txt"]), st.binary(max_size=1500), min_size=1),
        min_size=1,
        max_size=8,
    ),
    st.integers(1, 5),
)
def test_any_members_come_back(
    tmp_path_factory: pytest.TempPathFactory, samples: list[dict[str, bytes]], per_shard: int
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    with ShardWriter(folder, per_shard) as writer:
        for i, members in enumerate(samples):
            writer.write(f"k{i}", members)
    shards = ShardSet.open(folder)
    assert [
        {extension: shards.read(i, extension) for extension in entry.members} for i, entry in enumerate(shards.entries)
    ] == samples


def test_same_samples_give_the_same_bytes(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a"), write(tmp_path / "b")
    names = sorted(path.name for path in first.iterdir())
    assert names == ["index.jsonl", "shard-000000.tar", "shard-000001.tar", "shard-000002.tar"]
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


def test_webdataset_reads_it(tmp_path: Path) -> None:
    write(tmp_path)
    urls = sorted(map(str, tmp_path.glob("*.tar")))
    found = {record["__key__"]: record["npy"] for record in webdataset.WebDataset(urls, shardshuffle=False)}
    assert found == {f"k{i}": sample(i)["npy"] for i in range(7)}
    with tarfile.open(urls[0]) as tar:
        assert {(member.mtime, member.uid, member.uname) for member in tar} == {(0, 0, "")}


def test_without_index_the_tars_are_scanned(tmp_path: Path) -> None:
    indexed = ShardSet.open(write(tmp_path)).entries
    (tmp_path / INDEX).unlink()
    assert ShardSet.open(tmp_path).entries == indexed


def test_foreign_webdataset_is_read(tmp_path: Path) -> None:
    """Keys with folders, repeated in the next tar; caption in .txt; the clip's size only in the mp4; what cannot be
    read is left out."""
    video = encode_mp4(np.zeros((5, 16, 32, 3), np.uint8), 10)
    for name in ("00000", "00001"):
        with webdataset.TarWriter(str(tmp_path / f"{name}.tar")) as writer:
            writer.write({"__key__": "part/0001", "mp4": video, "txt": b"a dog\n", "json": b'{"status": "success"}'})
            writer.write({"__key__": "damaged", "mp4": video[:-300], "txt": b"a cat"})
            writer.write({"__key__": "nested", "mp4": video, "json": b"[" * 100_000})
    shards = ShardSet.open(tmp_path)
    assert [entry.key for entry in shards.entries] == ["part/0001", "00001/part/0001"]
    assert shards.captions(1) == ["a dog"] and shards.read(1, "mp4") == video
    assert shards.entries[0].meta == {"status": "success", "num_frames": 5, "height": 16, "width": 32, "fps": 10.0}


@pytest.mark.parametrize("key", ["a.b", "", "a/b", "x" * 81, "k0"])
def test_bad_keys_are_refused(tmp_path: Path, key: str) -> None:
    writer = ShardWriter(tmp_path)
    writer.write("k0", sample(0))
    with pytest.raises(ValueError, match="key"):
        writer.write(key, sample(1))


@pytest.mark.parametrize("indexed", [True, False])
def test_a_tar_cut_short_is_named(tmp_path: Path, indexed: bool) -> None:
    path = write(tmp_path) / "shard-000001.tar"
    path.write_bytes(path.read_bytes()[:2000])
    if not indexed:
        (tmp_path / INDEX).unlink()
    with pytest.raises(UserError, match="shard-000001.tar"):
        ShardSet.open(tmp_path)


def test_a_missing_tar_is_named(tmp_path: Path) -> None:
    (write(tmp_path) / "shard-000002.tar").unlink()
    with pytest.raises(UserError, match=r"shard-000002.tar is missing"):
        ShardSet.open(tmp_path)


def test_a_tar_that_is_cut_short_while_open_is_named(tmp_path: Path) -> None:
    shards = ShardSet.open(write(tmp_path))
    (tmp_path / "shard-000000.tar").write_bytes(b"")
    with pytest.raises(UserError, match="shard-000000.tar was written anew while it was in use"):
        shards.read(0, "npy")
    (tmp_path / "shard-000000.tar").unlink()
    with pytest.raises(UserError, match="shard-000000.tar: cannot be read"):
        shards.read(0, "npy")


def test_a_member_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="k0 has no .mp4 .it has json, npy"):
        ShardSet.open(write(tmp_path)).read(0, "mp4")


@pytest.mark.parametrize(
    "line", ["{", '{"key": "a"}', '{"key": "a", "shard": "s", "members": {"mp4": [1]}, "meta": {}}']
)
def test_a_damaged_index_is_named(tmp_path: Path, line: str) -> None:
    with open(write(tmp_path) / INDEX, "a") as file:
        file.write(line + "\n")
    with pytest.raises(UserError, match="index.jsonl, line 8 is damaged"):
        ShardSet.open(tmp_path)


def test_nothing_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        ShardSet.open(tmp_path / "none")
    with pytest.raises(UserError, match="no samples"):
        ShardSet.open(tmp_path)


@pytest.mark.parametrize("before", [0, 7])
def test_an_interrupted_set_is_not_taken_for_a_complete_one(tmp_path: Path, before: int) -> None:
    """And an earlier one is whole until the new one is; of a tar that both have there is one on the disk."""
    if before:
        write(tmp_path, before)
    with pytest.raises(KeyboardInterrupt), ShardWriter(tmp_path, 3) as writer:
        for i in range(4):
            writer.write(f"k{i}", sample(i))
        raise KeyboardInterrupt
    if before:
        shards = ShardSet.open(tmp_path)
        assert [shards.read(i, "npy") for i in range(before)] == [sample(i)["npy"] for i in range(before)]
        assert [path.name for path in tmp_path.glob("*.tar.part")] == ["shard-000001.tar.part"]
    else:
        with pytest.raises(UserError, match="interrupted"):
            ShardSet.open(tmp_path)
    write(tmp_path)
    assert len(ShardSet.open(tmp_path)) == 7 and not list(tmp_path.glob("*.part"))


def test_an_earlier_larger_set_leaves_no_tars(tmp_path: Path) -> None:
    write(tmp_path, 9)
    write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["index.jsonl", "shard-000000.tar"]


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full on this system")
    writer = ShardWriter(tmp_path)
    (tmp_path / "shard-000000.tar.part").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left"):
        for i in range(100):
            writer.write(f"k{i}", sample(i))
        writer.close()


def test_a_folder_that_is_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is not a folder"):
            ShardWriter(path)


def test_json_is_the_same_bytes_for_the_same_value() -> None:
    assert (
        json_bytes({"b": 1, "a": "é"}) == json_bytes(json.loads('{"a": "é", "b": 1}')) == '{"a": "é", "b": 1}'.encode()
    )


def test_only_plain_files_of_a_foreign_tar_are_samples(tmp_path: Path) -> None:
    """Links would read what they point at, devices never end, and names may lead out of a folder."""
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, kind, target in (
            ("good.txt", tarfile.REGTYPE, ""),
            ("link.txt", tarfile.SYMTYPE, "/etc/passwd"),
            ("hard.txt", tarfile.LNKTYPE, "good.txt"),
            ("device.txt", tarfile.CHRTYPE, ""),
            ("pipe.txt", tarfile.FIFOTYPE, ""),
            ("../out.txt", tarfile.REGTYPE, ""),
            ("/root.txt", tarfile.REGTYPE, ""),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 3 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"abc"))
    shards = ShardSet.open(tmp_path)
    assert [entry.key for entry in shards.entries] == ["good"] and shards.read(0, "txt") == b"abc"


def test_no_more_is_read_at_once_than_the_cap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"npy": bytes(1000)})
    monkeypatch.setattr("videodit.data.shards.MAX_READ_BYTES", 999)
    shards = ShardSet.open(tmp_path)
    with pytest.raises(UserError, match="a.npy has 1000 bytes, and no more than 999"):
        shards.read(0, "npy")
    assert shards.read(0, "npy", 1) == bytes(999)  # a part of it may be
