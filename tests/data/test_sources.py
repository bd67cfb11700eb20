"""Sources: folders, tables and single files give the same list; what is wrong is said."""

import datetime
import decimal
import io
import json
import math
import os
import tarfile
from pathlib import Path

import pyarrow.parquet
import pytest

from videodit.data.captions import Captions
from videodit.data.sources import Source, list_sources
from videodit.errors import UserError


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_folder_with_sidecars(tmp_path: Path) -> None:
    touch(
        tmp_path / "b.mp4",
        tmp_path / "a/c.MKV",
        tmp_path / "two_red-cats.mov",
        tmp_path / "README.md",
        tmp_path / ".hidden/x.mp4",
        tmp_path / "._b.mp4",
    )
    (tmp_path / "b.txt").write_text(" a dog\n")
    (tmp_path / "a/c.json").write_text(json.dumps({"captions": ["one", "two"], "spec": {"n": 1}}))
    assert list_sources(tmp_path) == [
        Source(str(tmp_path / "a/c.MKV"), Captions(["one", "two"]), {"spec": {"n": 1}}, "a/c.MKV"),
        Source(str(tmp_path / "b.mp4"), Captions(["a dog"]), {}, "b.mp4"),
        Source(str(tmp_path / "two_red-cats.mov"), Captions(["two red cats"]), {}, "two_red-cats.mov", captioned=False),
    ]


def test_tars_of_webdataset(tmp_path: Path) -> None:
    """As video2dataset writes them: caption in .txt, everything else in .json; members lie where the span says."""
    (tmp_path / "set").mkdir()
    members = {"00001.mp4": b"one", "00001.json": b'{"url": "u"}', "00001.txt": b" a cat \n", "sub/b.webm": b"two"}
    members |= {"sub/b.json": b'{"captions": ["x", "y"]}', "c.mp4": b"three", "c.json": b"{", "d.jpg": b"four"}
    with tarfile.open(tmp_path / "set" / "00000.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    touch(tmp_path / "set" / "a.mp4")
    found = {source.name: source for source in list_sources(tmp_path / "set")}
    assert list(found) == ["00000.tar/00001.mp4", "00000.tar/c.mp4", "00000.tar/sub/b.webm", "a.mp4"]
    one, two = found["00000.tar/00001.mp4"], found["00000.tar/sub/b.webm"]
    assert (one.captions, one.extra) == (Captions(["a cat"]), {"url": "u"})
    assert (two.captions, two.extra) == (Captions(["x", "y"]), {})
    assert "caption beside it" in found["00000.tar/c.mp4"].problem
    data = (tmp_path / "set" / "00000.tar").read_bytes()
    for source, content in ((one, b"one"), (two, b"two")):
        assert source.span and data[source.span[0] :][: source.span[1]] == content
    alone = list_sources(tmp_path / "set" / "00000.tar", images=True)
    assert [source.name for source in alone if source.is_image] == ["00000.tar/d.jpg"]


def test_a_bad_tar_costs_a_line_where_it_is_one_of_many(tmp_path: Path) -> None:
    """No tar at all, damage between two members, a caption and a video that claim to be larger than is believed."""
    touch(tmp_path / "set" / "a.mp4")
    (tmp_path / "set" / "bad.tar").write_bytes(b"no tar" * 200)
    with tarfile.open(tmp_path / "set" / "torn.tar", "w") as tar:
        for name in ("1.mp4", "2.mp4", "3.mp4"):
            tar.addfile(tarfile.TarInfo(name))
    data = bytearray((tmp_path / "set" / "torn.tar").read_bytes())
    data[512:520] = b"accident"
    (tmp_path / "set" / "torn.tar").write_bytes(data)
    with open(tmp_path / "set" / "vast.tar", "wb") as file:
        for name, size in (("1.mp4", 512), ("1.txt", (16 << 20) + 1), ("2.mp4", (1 << 30) + 1)):
            info = tarfile.TarInfo(name)
            info.size = size
            file.write(info.tobuf())
            file.seek(-(-size // 512) * 512, 1)
        file.write(bytes(1024))
    os.mkfifo(tmp_path / "set" / "pipe.tar")
    problems = {source.name: source.problem for source in list_sources(tmp_path / "set")}
    expected = {
        "a.mp4": "",
        "bad.tar": "no readable tar",
        "pipe.tar": "no regular file",
        "torn.tar": "no readable tar (damaged at byte 512)",
        "vast.tar/1.mp4": "caption beside it: 16777217 bytes are too many for a caption",
        "vast.tar/2.mp4": "1073741825 bytes, too many in a tar: unpack it",
    }
    assert problems.keys() == expected.keys()
    assert all(part in problems[name] and bool(part) == bool(problems[name]) for name, part in expected.items())
    for name in ("bad", "torn"):
        with pytest.raises(UserError, match=f"{name}.tar is no readable tar"):
            list_sources(tmp_path / "set" / f"{name}.tar")


def test_pictures_are_asked_for(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "b.JPG", tmp_path / "c.png")
    assert [source.name for source in list_sources(tmp_path)] == ["a.mp4"]
    assert [source.name for source in list_sources(tmp_path, images=True)] == ["a.mp4", "b.JPG", "c.png"]
    (tmp_path / "list.csv").write_text("path\nb.JPG\na.mp4\n")
    assert [source.problem for source in list_sources(tmp_path / "list.csv")] == ["", "a picture: --images takes it"]


def test_excluded_folder_and_single_file(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "out/b.mp4")
    assert [source.name for source in list_sources(tmp_path, exclude=[tmp_path / "out"])] == ["a.mp4"]
    assert list_sources(tmp_path / "a.mp4") == list_sources(tmp_path, exclude=[tmp_path / "out"])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_tables(tmp_path: Path, kind: str) -> None:
    touch(tmp_path / "v/a.mp4", tmp_path / "b.mp4")
    rows = [("v/a.mp4", "first, a", "9"), ("b.mp4", "a b", "8"), ("v/a.mp4", "second", "9"), ("gone.mp4", "x", "7")]
    if kind == "jsonl":
        text = "\n".join(json.dumps({"path": p, "caption": c, "score": s}) for p, c, s in rows) + "\n\n"
    elif kind == "parquet":
        columns = {name: [row[i] for row in rows] for i, name in enumerate(("path", "caption", "score"))}
        pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
        text = None
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        text = "\n".join(
            separator.join(row) for row in [("path", "caption", "score"), *[(p, f'"{c}"', s) for p, c, s in rows]]
        )
    if text is not None:
        (tmp_path / f"list.{kind}").write_text(text)
    assert list_sources(tmp_path / f"list.{kind}") == [
        Source(str(tmp_path / "b.mp4"), Captions(["a b"]), {"score": "8"}, "b.mp4"),
        Source(str(tmp_path / "gone.mp4"), Captions(["x"]), {"score": "7"}, "gone.mp4", "no such file"),
        Source(str(tmp_path / "v/a.mp4"), Captions(["first, a", "second"]), {"score": "9"}, "v/a.mp4"),
    ]


def test_a_csv_cell_may_hold_a_list(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text('video,captions\na.mp4,"[""one"", ""two""]"\n')
    assert list_sources(tmp_path / "list.csv")[0].captions == Captions(["one", "two"])


def test_weights_of_a_table_are_joined_over_its_rows(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "b.mp4")
    rows = ["path,caption,caption_weight", "a.mp4,one,2.5", "a.mp4,two,", 'b.mp4,"[""x"", ""y""]","[1, 4]"']
    (tmp_path / "list.csv").write_text("\n".join(rows))
    assert [source.captions for source in list_sources(tmp_path / "list.csv")] == [
        Captions(["one", "two"], [2.5, 1]),
        Captions(["x", "y"], [1, 4]),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        '{"caption": 3}',
        '{"captions": ["a", 3]}',
        '{"caption_weights": 2}',
        '{"caption": "\\ud800"}',
        '{"caption": "a", "more": ' + "[" * 65 + "]" * 65 + "}",
        "[" * 200_000,
        "1" * 5000,
        " " * (16 << 20) + "{}",
    ],
    ids=lambda text: text.strip()[:24],
)
def test_a_bad_sidecar_costs_its_video_only(tmp_path: Path, text: str) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "b.mp4")
    (tmp_path / "a.json").write_text(text)
    bad, good = list_sources(tmp_path)
    assert bad.problem.startswith("caption file a.json") and "\n" not in bad.problem and not good.problem


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none", None, "no such file or folder"),
        ("empty", "dir", "has no videos"),
        ("notes.txt", "hello", "neither a folder nor"),
        (
            "list.csv",
            "name,caption\na.mp4,x\n",
            "line 2 has no path: a column 'path' is needed .* this one has name, caption",
        ),
        ("list.csv", "path;caption\na.mp4;x\n", "line 2 has no path: .*separated by commas"),
        ("list.csv", "path,caption\n,x\n", "line 2 has no path: .*filled in on each line; this one has caption"),
        ("list.csv", "path,caption\n", "has no videos"),
        ("list.jsonl", '{"path": "a.mp4"}\n{oops\n', "line 2 is no JSON"),
        ("list.jsonl", "[1]\n", "line 1: an object"),
        ("list.jsonl", "[" * 200_000 + "\n", "line 1 is no JSON"),
    ],
)
def test_mistakes_get_one_line(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text == "dir":
        (tmp_path / name).mkdir()
    elif text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        list_sources(tmp_path / name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_bad_parquet_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "list.parquet").write_bytes(b"PAR1 no PAR1")
    with pytest.raises(UserError, match="list.parquet is no readable Parquet file: .+") as caught:
        list_sources(tmp_path / "list.parquet")
    assert "\n" not in str(caught.value)


def test_what_json_lacks_is_kept_as_text_or_costs_its_row(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{name}.mp4" for name in "abcd"))
    moment = datetime.datetime(2026, 11, 29, 8, 30)
    columns = {
        "path": pyarrow.array(["a.mp4", "b.mp4", "c.mp4", "d.mp4", "x" * 300]),
        "caption": pyarrow.array(["one"] * 5),
        "at": pyarrow.array([moment] * 5, pyarrow.timestamp("us")),
        "exactly": pyarrow.array([1, None, None, None, None], pyarrow.timestamp("ns")),
        "cost": pyarrow.array([decimal.Decimal("1.50")] * 5),
        "score": pyarrow.array([float("nan"), 0.5, 1.0, 2.0, 3.0]),
        "raw": pyarrow.array([None, b"\xff", None, None, None]),
        "words": pyarrow.array([["x", "y"]] * 5),
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "list.parquet")
    found = {source.name: source for source in list_sources(tmp_path / "list.parquet")}
    common = {"at": "2026-11-29T08:30:00", "cost": "1.50", "words": ["x", "y"]}
    assert found["a.mp4"].extra == common | {"exactly": "1970-01-01 00:00:00.000000001", "score": None}
    assert found["c.mp4"].extra == common | {"score": 1.0}
    problems = {name: source.problem for name, source in found.items() if source.problem}
    assert problems == {"b.mp4": "line 2 of the table: a value of type bytes cannot be kept: text, numbers, lists and "
    "objects can", "x" * 300: "no such file"}  # fmt: skip


def test_sidecars_as_windows_writes_them(tmp_path: Path) -> None:
    touch(*(tmp_path / f"{name}.mp4" for name in "abc"))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa dog\r\n")
    (tmp_path / "b.json").write_bytes(b'\xef\xbb\xbf{"caption": "a cat"}\r\n')
    (tmp_path / "c.txt").write_bytes("ein Hündchen".encode("latin-1"))
    a, b, c = list_sources(tmp_path)
    assert (a.captions, b.captions) == (Captions(["a dog"]), Captions(["a cat"]))
    assert (a.problem, b.problem, c.problem) == ("", "", "caption file c.txt is no UTF-8 text")


def test_a_table_as_spreadsheets_write_it(tmp_path: Path) -> None:
    """Spaces around names and paths, a byte order mark, Windows line ends, rows of commas below."""
    touch(tmp_path / "a b.mp4", tmp_path / "c.mp4")
    (tmp_path / "list.csv").write_bytes(b"\xef\xbb\xbf path , caption\r\n a b.mp4 , one \r\nc.mp4,\r\n,,\r\n,\r\n")
    one, other = list_sources(tmp_path / "list.csv")
    assert (one.name, one.captions, one.captioned, one.problem) == ("a b.mp4", Captions(["one"]), True, "")
    assert (other.name, other.captions, other.captioned, other.problem) == ("c.mp4", Captions(["c"]), False, "")


def test_a_row_with_a_bad_caption_costs_its_video_only(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "b.mp4")
    rows = [{"path": "a.mp4", "caption": 5}, {"path": "b.mp4", "caption": "x", "score": math.nan}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    bad, good = list_sources(tmp_path / "list.jsonl")
    assert bad.problem == "line 1 of the table: caption is no text: 5"
    assert (good.problem, good.captions, good.extra) == ("", Captions(["x"]), {"score": None})
