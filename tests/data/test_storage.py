"""Sources that lie elsewhere: the same clips as from here, a line for what cannot be had, and what changed is seen."""

import functools
import http.server
import io
import json
import shutil
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest

from videodit.data.captions import Captions
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.ingest_cuts import spool_file
from videodit.data.ingest_jobs import copy_file, is_fetched, remove_copy
from videodit.data.mp4 import write_mp4
from videodit.data.shards import ShardSet
from videodit.data.sources import Source, list_sources
from videodit.data.storage import beside, is_remote, relative_name, split_suffix, state
from videodit.errors import UserError

CONFIG = IngestConfig(workers=1, min_frames=5)


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos with captions, a field, a tar of a video, and a hidden file."""
    folder = tmp_path_factory.mktemp("videos")
    (folder / "sub").mkdir()
    for number, name in enumerate(("a", "sub/b")):
        frames = np.random.default_rng(number).integers(0, 256, (1, 4, 4, 3), np.uint8).repeat(9, 0)
        write_mp4(folder / f"{name}.mp4", frames.repeat(8, 1).repeat(8, 2), 8)
    (folder / "a.json").write_text(json.dumps({"captions": ["one", "two"], "caption_weights": [1, 2]}))
    (folder / "sub" / "b.txt").write_text("a caption")
    np.save(folder / "sub" / "field.npy", np.ones((6, 4, 4), np.float32))
    (folder / ".hidden.mp4").write_bytes(b"x")
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name, data in (("c.mp4", (folder / "a.mp4").read_bytes()), ("c.txt", b"of the tar")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return folder


@pytest.fixture(scope="module")
def here(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    ingest(videos, tmp_path_factory.mktemp("here"), CONFIG)
    return tmp_path_factory.getbasetemp() / "here0"


def clips(out: Path) -> dict[str, bytes]:
    """All that depends on the videos and captions alone, and not on when they changed."""
    return {path.name: path.read_bytes() for path in out.iterdir() if path.name not in ("ingest.json", "cuts.jsonl")}


def pack(folder: Path, to: Path) -> Path:
    """A zip of a folder's files under videos/, in which a worker process can read."""
    with zipfile.ZipFile(to, "w") as file:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                file.write(path, f"videos/{path.relative_to(folder)}")
    return to


def to_memory(folder: Path, name: str) -> str:
    memory = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            memory.pipe(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://{name}"


@pytest.mark.parametrize("kind", ["zip", "memory", "file"])
def test_a_folder_elsewhere_gives_the_same_bytes(kind: str, videos: Path, here: Path, tmp_path: Path) -> None:
    if kind == "zip":
        address = f"zip://videos::{pack(videos, tmp_path / 'all.zip')}"
    else:
        address = to_memory(videos, "same") if kind == "memory" else f"file://{videos}"
    out = tmp_path / "out"
    result = ingest(address, out, CONFIG)
    assert (result.accepted, result.rejected) == (4, 0)
    assert clips(out) == clips(here)
    assert ingest(address, out, CONFIG).up_to_date


def test_a_file_that_changed_is_seen(videos: Path, tmp_path: Path) -> None:
    """Of the same length, so that only the version tells."""
    address, memory = to_memory(videos, "changes"), fsspec.filesystem("memory")
    ingest(address, tmp_path / "out", CONFIG)
    data = bytearray(memory.cat_file("/changes/a.mp4"))
    data[-1] ^= 1
    memory.pipe("/changes/a.mp4", bytes(data))
    assert not ingest(address, tmp_path / "out", CONFIG).up_to_date


def test_tables_tars_and_single_files_elsewhere(videos: Path, tmp_path: Path) -> None:
    shutil.copytree(videos, tmp_path / "v")
    archive = f"::{tmp_path / 'all.zip'}"
    rows = [
        {"path": "sub/b.mp4", "caption": "beside the table"},
        {"path": f"zip://videos/a.mp4{archive}", "caption": "by its address"},
        {"path": str(videos / "a.mp4"), "caption": "on this machine"},
        {"path": "gone.mp4", "caption": "not there"},
    ]
    (tmp_path / "v" / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pack(tmp_path / "v", tmp_path / "all.zip")
    for table in (f"zip://videos/list.jsonl{archive}", str(tmp_path / "v" / "list.jsonl")):
        assert {(source.captions.texts[0], source.problem) for source in list_sources(table)} == {
            ("beside the table", ""),
            ("by its address", ""),
            ("on this machine", ""),
            ("not there", "no such file"),
        }
        result = ingest(table, tmp_path / f"out{len(table)}", CONFIG)
        assert (result.accepted, result.rejected) == (3, 1)
    (tar,) = list_sources(f"zip://videos/set.tar{archive}")
    assert (tar.name, tar.captions.texts, tar.problem) == ("set.tar/c.mp4", ["of the tar"], "")
    (one,) = list_sources(f"zip://videos/a.mp4{archive}")
    assert (one.name, one.captions.weights) == ("a.mp4", [1, 2])


def test_what_cannot_be_had_costs_its_video_and_is_tried_again(videos: Path, tmp_path: Path) -> None:
    """A member of the archive whose bytes do not match their checksum, later mended."""
    archive = pack(videos, tmp_path / "all.zip")
    good = archive.read_bytes()
    place = good.index((videos / "a.mp4").read_bytes()) + 40
    archive.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
    address, out = f"zip://videos::{archive}", tmp_path / "out"
    result = ingest(address, out, CONFIG)
    assert (result.accepted, result.rejected) == (3, 1)
    (line,) = map(json.loads, (out / "rejects.jsonl").read_text().splitlines())
    assert line["source"] == "a.mp4" and line["reason"].startswith("cannot be fetched: BadZipFile")
    archive.write_bytes(good)
    again = ingest(address, out, CONFIG)
    assert (again.accepted, again.up_to_date) == (4, False)
    assert not (out / ".work").exists() and ingest(address, out, CONFIG).up_to_date


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nope://a/b", "nope://a/b cannot be read: ValueError: Protocol not known: nope"),
        ("gcs://bucket/videos", r"cannot be read: .*gcsfs.*pip install 'videodit\[remote\]'"),
        ("memory://nothing", "memory://nothing has no videos"),
        ("memory://nothing/list.csv", "list.csv: no such file"),
        ("zip://videos::/nowhere/all.zip", "all.zip: no such file"),
    ],
)
def test_mistakes_get_one_line(address: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message) as caught:
        ingest(address, tmp_path / "out", CONFIG)
    assert "\n" not in str(caught.value)


def test_shards_are_written_here(videos: Path) -> None:
    with pytest.raises(UserError, match="memory://out is no folder of this machine"):
        ingest(videos, "memory://out", CONFIG)


def test_addresses_and_names() -> None:
    assert not is_remote("file:///a/b.mp4") and not is_remote("a/b.mp4") and is_remote("s3://b/a.mp4")
    assert split_suffix("https://h/v/a.mp4?key=1.2") == ("https://h/v/a", ".mp4")
    assert split_suffix("zip://v/a.tar::b.zip") == ("zip://v/a", ".tar")
    assert beside("zip://v/a.csv::b.zip", "c/d.mp4") == "zip://v/c/d.mp4::b.zip"
    assert relative_name("s3://bucket/v/a.mp4", "s3://bucket/v/") == "a.mp4"
    assert relative_name("s3://bucket/v/a.mp4", "/data") == "bucket/v/a.mp4"
    assert relative_name("https://h/v/a.mp4?key=1", "https://h") == "v/a.mp4"


@pytest.fixture
def server(videos: Path) -> Iterator[str]:
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Handler, directory=str(videos))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def test_over_http(server: str, videos: Path, here: Path, tmp_path: Path) -> None:
    """A page of links as a folder, a list with addresses; without aiohttp one line says what to install."""
    out = tmp_path / "out"
    try:
        import aiohttp  # noqa: F401
    except ImportError:
        with pytest.raises(UserError, match=r"aiohttp.*pip install 'videodit\[remote\]'"):
            ingest(server, out, CONFIG)
        return
    assert ingest(server, out, CONFIG).accepted == 4
    assert clips(out) == clips(here) and len(ShardSet.open(out)) == 4
    (tmp_path / "list.csv").write_text(f"path,caption\n{server}/sub/b.mp4?key=1,x\n{server}/gone.mp4,y\n")
    found = {source.captions.texts[0]: source for source in list_sources(tmp_path / "list.csv")}
    assert found["y"].problem == "no such file" and found["x"].state == state(f"{server}/sub/b.mp4?key=1")
    assert found["x"].state.size == (videos / "sub" / "b.mp4").stat().st_size
    assert ingest(tmp_path / "list.csv", tmp_path / "listed", CONFIG).accepted == 1


def test_a_worker_that_dies_tells_whether_the_file_was_there(tmp_path: Path) -> None:
    """Killed while it fetched, the source is asked for again by the next run; killed while it decoded, it is not."""
    here, there = Source(str(tmp_path / "a.mp4"), Captions([])), Source("s3://b/a.mp4", Captions([]), name="a.mp4")
    spool = spool_file(tmp_path, "a")
    copy = copy_file(there, spool)
    assert is_fetched(here, spool) and not is_fetched(there, spool)
    copy.with_name(f"{copy.name}.part").touch()
    assert not is_fetched(there, spool)
    copy.touch()
    assert is_fetched(there, spool)
    remove_copy(there, spool)
    assert list(tmp_path.iterdir()) == []
