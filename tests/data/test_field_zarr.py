"""Fields in zarr arrays become what the same .npy becomes; what is no field is one reason."""

import json
import pickle
import shutil
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from tests.data.test_field import ONE, saved, stored, values
from videodit.data.ingest import ingest
from videodit.data.ingest_record import read_rejects, read_statistics
from videodit.data.shards import ShardSet
from videodit.errors import MissingExtra, UserError

if sys.version_info < (3, 11):
    pytest.skip("zarr 3 asks for Python 3.11", allow_module_level=True)
import zarr


def save_zarr(path: Path, array: np.ndarray, **options: Any) -> Path:
    zarr.create_array(path, data=array, **options)
    return path


def clips_of(out: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """Arrays and records without the source's name."""
    shards = ShardSet.open(out)
    records = [shards.read_json(i) for i in range(len(shards))]
    assert all(record.pop("source") for record in records)
    return [(shards.read(i, "npy"), record) for i, record in enumerate(records)]


def test_a_zarr_array_gives_the_bytes_of_the_same_npy(tmp_path: Path) -> None:
    """Of clips that no chunk ends with, in a folder of a folder, by its own name, and by a table."""
    layouts: dict[str, dict[str, Any]] = {
        "chunks": {"chunks": (4, 3, 7, 1)},
        "frames": {"chunks": (1, 6, 7, 2)},
        "whole": {"chunks": (100, 6, 7, 2), "compressors": None},
    }
    layouts = {f"{name}{number}": {**how, "zarr_format": number} for name, how in layouts.items() for number in (2, 3)}
    layouts["shards3"] = {"chunks": (3, 3, 7, 2), "shards": (9, 6, 7, 2), "zarr_format": 3}
    for folder in ("npy/sea", "zarr/sea"):
        (tmp_path / folder).mkdir(parents=True)
    for number, (name, how) in enumerate(layouts.items()):
        array = (100 * values(number, 27, 6, 7, 2)).astype(("<f8", ">f4", "u1", "<i2")[number % 4])
        np.save(tmp_path / f"npy/sea/{name}.npy", array)
        save_zarr(tmp_path / f"zarr/sea/{name}.zarr", array, **how)
        for folder in ("npy/sea", "zarr/sea"):
            (tmp_path / folder / f"{name}.json").write_text(json.dumps({"caption": f"a storm {name}"}))
    lines = [{"path": f"zarr/sea/{name}.zarr", "caption": f"a storm {name}"} for name in layouts]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("npy", "zarr", "table.jsonl", "zarr/sea/chunks3.zarr"):
        ingest(tmp_path / name, tmp_path / "out" / name, replace(ONE, max_duration_s=11))
    expected = clips_of(tmp_path / "out/npy")
    assert [record["num_frames"] for _, record in expected] == [11, 11, 5] * 7
    assert clips_of(tmp_path / "out/zarr") == clips_of(tmp_path / "out/table.jsonl") == expected
    assert read_statistics(tmp_path / "out/zarr") == read_statistics(tmp_path / "out/npy")
    itself = clips_of(tmp_path / "out/zarr/sea/chunks3.zarr")
    assert itself == [clip for clip in expected if clip[1]["caption"] == "a storm chunks3"] and len(itself) == 3


def test_a_zarr_array_larger_than_memory_is_read_in_parts(tmp_path: Path) -> None:
    """A clip of 6 GB, in 3 GB of address space, up to the value in its second part that refuses it."""
    big = zarr.create_array(
        tmp_path / "in/a.zarr", shape=(1500, 1000, 1000), dtype="f4", chunks=(20, 500, 1000), fill_value=1.0
    )
    big[65, 0, 0] = np.nan
    with pytest.raises(UserError, match="none of the 1 video "):
        ingest(tmp_path / "in", tmp_path / "out", replace(ONE, max_memory_gb=3, max_duration_s=1500))
    found = [reject["reason"] for reject in read_rejects(tmp_path / "out")]
    assert found == ["frame 65 has values that are not finite in float32"]


def test_a_zarr_that_is_no_field_is_a_line_of_rejects(tmp_path: Path) -> None:
    good, folder = values(0, 5, 4, 4, 2), tmp_path / "in"
    for number in (2, 3):
        for name, array in {
            "a_good": good,
            "cut": good,
            "noise": good,
            "flat": good[0, 0],
            "complex": good + 1j,
            "nan": np.where(good > good.mean(), np.nan, good),
            "bad": good,
        }.items():
            save_zarr(folder / f"{name}{number}.zarr", array, chunks=array.shape, zarr_format=number)
        group = zarr.open_group(folder / f"group{number}.zarr", mode="w", zarr_format=number)
        for name in ("u", "v"):
            group.create_array(name, data=good)
        group.create_array("time", data=np.arange(5))
        shutil.copytree(folder / f"group{number}.zarr", folder / f"named{number}.zarr")
        (folder / f"named{number}.json").write_text('{"array": "v"}')
        shutil.copytree(folder / f"group{number}.zarr", folder / f"other{number}.zarr")
        (folder / f"other{number}.json").write_text('{"array": "w"}')
        one = zarr.open_group(folder / f"one{number}.zarr", mode="w", zarr_format=number)
        one.create_array("u", data=good)
        chunk = {2: "0.0.0.0", 3: "c/0/0/0/0"}[number]
        cut, noise = folder / f"cut{number}.zarr" / chunk, folder / f"noise{number}.zarr" / chunk
        cut.write_bytes(cut.read_bytes()[:-9])
        noise.write_bytes(bytes(reversed(noise.read_bytes())))
        (folder / f"bad{number}.zarr" / {2: ".zarray", 3: "zarr.json"}[number]).write_text("{")
    (folder / "empty.zarr").mkdir()
    (folder / "file.zarr").write_text("no folder")
    result = ingest(folder, tmp_path / "out", ONE)
    assert (result.accepted, result.clips) == (6, 6)
    found = {Path(reject["source"]).stem: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    wanted = {
        "flat": "shape (4, 2): (t, h, w)", "complex": "dtype complex128", "nan": "values that are not finite",
        "cut": "frames 0 to 4 cannot be read: ", "noise": "frames 0 to 4 cannot be read: ",
        "bad": "cannot be read as a zarr array", "group": "a group of arrays (u, v): say which",
        "other": "a group of arrays (u, v), not w: say which",
    }  # fmt: skip
    wanted = {f"{name}{number}": words for name, words in wanted.items() for number in (2, 3)}
    wanted |= {"empty": "cannot be read as a zarr array", "file": "cannot be read as a zarr array"}
    assert found.keys() == wanted.keys()
    assert not [(name, found[name]) for name, words in wanted.items() if words not in found[name]]
    assert not any("\n" in reason for reason in found.values())
    first, *others = (array for array, _ in clips_of(tmp_path / "out"))
    assert others == [first] * 5


def test_a_zarr_array_cannot_run_code(tmp_path: Path) -> None:
    """Not a chunk that numcodecs' codec of pickles would run: zarr has it for arrays of objects only."""
    trace, codec = tmp_path / "trace", {"id": "pickle", "protocol": 2}
    for name, codecs in {
        "filter": {"filters": [codec], "compressor": None},
        "compressor": {"filters": None, "compressor": codec},
    }.items():
        path = save_zarr(tmp_path / f"in/{name}.zarr", values(0, 5, 4, 4), chunks=(5, 4, 4), zarr_format=2)
        meta = json.loads((path / ".zarray").read_text())
        (path / ".zarray").write_text(json.dumps(meta | codecs))
        (path / "0.0.0").write_bytes(f"cos\nmkdir\n(V{trace}\ntR.".encode())
    with pytest.raises(UserError, match="none of the 2 videos"):
        ingest(tmp_path / "in", tmp_path / "out", ONE)
    found = {reject["source"]: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    assert all("cannot be read as a zarr array" in words and "pickle" in words for words in found.values())
    assert not trace.exists()
    pickle.loads((tmp_path / "in/filter.zarr/0.0.0").read_bytes())
    assert trace.exists()  # had it been read


def test_a_changed_chunk_is_ingested_again_and_an_unchanged_array_is_not(tmp_path: Path) -> None:
    path = save_zarr(tmp_path / "in/a.zarr", values(0, 5, 4, 4), chunks=(2, 4, 4))
    assert not ingest(tmp_path / "in", tmp_path / "out", ONE).up_to_date
    assert ingest(tmp_path / "in", tmp_path / "out", ONE).up_to_date
    zarr.open_array(path, mode="r+")[4] = 7.0
    assert not ingest(tmp_path / "in", tmp_path / "out", ONE).up_to_date
    assert (stored(ShardSet.open(tmp_path / "out"), 0)[4] == 7).all()


def test_without_zarr_its_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "in", a=values(0, 5, 4, 4))
    (tmp_path / "in/b.zarr").mkdir()
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "zarr")
    with pytest.raises(MissingExtra, match=r"zarr is not installed: run pip install 'videodit\[zarr\]'"):
        ingest(tmp_path / "in", tmp_path / "out", ONE)


def test_a_zarr_array_elsewhere_gives_the_same_clips(tmp_path: Path) -> None:
    """Of a folder, by its address, by a table and within a zip; a changed chunk is noticed, and nothing is left."""
    save_zarr(tmp_path / "in/sea/a.zarr", values(0, 5, 4, 4), chunks=(1, 2, 2), zarr_format=3)
    system = fsspec.filesystem("memory")
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for file in (tmp_path / "in").rglob("*"):
            if file.is_file():
                name = file.relative_to(tmp_path / "in").as_posix()
                system.pipe(f"/fields/{name}", file.read_bytes())
                archive.write(file, name)
    (tmp_path / "table.csv").write_text("path\nmemory://fields/sea/a.zarr\nmemory://fields/none.zarr\n")
    ingest(tmp_path / "in", tmp_path / "out/here", ONE)
    expected = clips_of(tmp_path / "out/here")
    for number, src in enumerate(
        [
            "memory://fields",
            "memory://fields/sea/a.zarr",
            tmp_path / "table.csv",
            f"zip://sea/a.zarr::{tmp_path}/in.zip",
        ]
    ):
        out = tmp_path / f"out/{number}"
        ingest(src, out, ONE)
        assert clips_of(out) == expected, src
        assert not [path for path in out.rglob("*") if ".copy" in path.name]
    assert [reject["reason"] for reject in read_rejects(tmp_path / "out/2")] == ["no such file"]
    assert ingest("memory://fields", tmp_path / "out/0", ONE).up_to_date
    system.pipe("/fields/sea/a.zarr/c/4/0/0", system.cat_file("/fields/sea/a.zarr/c/3/0/0"))
    assert not ingest("memory://fields", tmp_path / "out/0", ONE).up_to_date
    assert clips_of(tmp_path / "out/0") != expected
