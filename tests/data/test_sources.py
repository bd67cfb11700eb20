"""Sources: folders, tables and single files give the same list; what is wrong is said."""

import json
from pathlib import Path

import pytest

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
        Source(str(tmp_path / "a/c.MKV"), ["one", "two"], {"spec": {"n": 1}}, "a/c.MKV"),
        Source(str(tmp_path / "b.mp4"), ["a dog"], {}, "b.mp4"),
        Source(str(tmp_path / "two_red-cats.mov"), ["two red cats"], {}, "two_red-cats.mov"),
    ]


def test_excluded_folder_and_single_file(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4", tmp_path / "out/b.mp4")
    assert [source.name for source in list_sources(tmp_path, exclude=[tmp_path / "out"])] == ["a.mp4"]
    assert list_sources(tmp_path / "a.mp4") == list_sources(tmp_path, exclude=[tmp_path / "out"])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_tables(tmp_path: Path, kind: str) -> None:
    touch(tmp_path / "v/a.mp4", tmp_path / "b.mp4")
    rows = [("v/a.mp4", "first, a", "9"), ("b.mp4", "a b", "8"), ("v/a.mp4", "second", "9"), ("gone.mp4", "x", "7")]
    if kind == "jsonl":
        text = "\n".join(json.dumps({"path": p, "caption": c, "score": s}) for p, c, s in rows) + "\n\n"
    else:
        separator = {"csv": ",", "tsv": "\t"}[kind]
        text = "\n".join(
            separator.join(row) for row in [("path", "caption", "score"), *[(p, f'"{c}"', s) for p, c, s in rows]]
        )
    (tmp_path / f"list.{kind}").write_text(text)
    assert list_sources(tmp_path / f"list.{kind}") == [
        Source(str(tmp_path / "b.mp4"), ["a b"], {"score": "8"}, "b.mp4"),
        Source(str(tmp_path / "gone.mp4"), ["x"], {"score": "7"}, "gone.mp4", "no such file"),
        Source(str(tmp_path / "v/a.mp4"), ["first, a", "second"], {"score": "9"}, "v/a.mp4"),
    ]


def test_a_csv_cell_may_hold_a_list(tmp_path: Path) -> None:
    touch(tmp_path / "a.mp4")
    (tmp_path / "list.csv").write_text('video,captions\na.mp4,"[""one"", ""two""]"\n')
    assert list_sources(tmp_path / "list.csv")[0].captions == ["one", "two"]


@pytest.mark.parametrize("text", ["{", "[1]", '{"caption": 3}', '{"captions": ["a", 3]}'])
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
            "line 2 has no path: a column 'path' is needed, there are name, caption",
        ),
        ("list.csv", "path,caption\n", "has no videos"),
        ("list.jsonl", '{"path": "a.mp4"}\n{oops\n', "line 2 is no JSON"),
        ("list.jsonl", "[1]\n", "line 1: an object"),
        ("list.jsonl", '{"path": "a.mp4", "caption": 5}\n', "line 1: caption is no text"),
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
