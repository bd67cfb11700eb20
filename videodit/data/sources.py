"""Which videos to ingest and what is said of them: a folder with sidecar files, a CSV or JSONL table, or one file."""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videodit.errors import UserError, user_error

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .mxf .gif .y4m".split()
)
_PATH_COLUMNS = ("path", "video", "file", "filename", "video_path")
_CAPTION_COLUMNS = ("captions", "caption", "text", "prompt")


@dataclass(frozen=True)
class Source:
    """One video to ingest."""

    path: str
    """The file."""
    captions: list[str]
    """What is said of it, at least one; without any, the file's stem with _ and - as spaces."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else its sidecar or its table row says; it travels into the clips' json."""
    name: str = ""
    """The path below the folder (or beside the table) that was given, with "/": what outputs call it."""
    problem: str = ""
    """Why it cannot be taken, as in "caption file is no JSON"; empty if nothing is wrong so far."""


def list_sources(src: str | Path, exclude: Iterable[str | Path] = ()) -> list[Source]:
    """Lists the videos of a folder (all levels), a CSV or JSONL table, or a single video file.

    Beside NAME.mp4 in a folder, NAME.json is read ({"caption": str} or {"captions": [str]}, other keys are carried
    along) or NAME.txt (one caption). A table has a column "path" (relative to the table) and "caption" or "captions"
    (in a CSV: a JSON list); other columns are carried along. A path that comes in several rows is one source with the
    captions of all.

    Args:
        src: folder, .csv, .jsonl or video file.
        exclude: folders to leave out, such as the output's.
    Returns:
        Sources sorted by name.
    Raises:
        UserError: if src is not there, is of no known kind or holds no video.
    """
    src = Path(src)
    try:
        if src.is_dir():
            root, found = src, list(_from_folder(src, {Path(folder).resolve() for folder in exclude}))
        elif not src.exists():
            raise UserError(f"{src}: no such file or folder: give a folder of videos, a .csv or a .jsonl")
        elif src.suffix.lower() in (".csv", ".tsv", ".jsonl"):
            root, found = src.parent, list(_from_table(src))
        elif src.suffix.lower() in VIDEO_SUFFIXES:
            root, found = src.parent, [_with_sidecar(src)]
        else:
            raise UserError(f"{src}: neither a folder nor .csv, .jsonl or a video ({' '.join(sorted(VIDEO_SUFFIXES))})")
    except OSError as error:
        raise user_error(error, error.filename or src) from error
    if not found:
        raise UserError(
            f"{src} has no videos: {' '.join(sorted(VIDEO_SUFFIXES))} are looked for, in folders below it too"
        )
    named = [
        Source(s.path, s.captions or [_stem_caption(s.path)], s.extra, _name(s.path, root), s.problem) for s in found
    ]
    return sorted(named, key=lambda source: source.name)


def _from_folder(root: Path, exclude: set[Path]) -> Iterator[Source]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, onerror=refuse):
        below[:] = [
            name for name in below if not name.startswith(".") and (Path(folder) / name).resolve() not in exclude
        ]
        for name in files:
            if not name.startswith(".") and Path(name).suffix.lower() in VIDEO_SUFFIXES:
                yield _with_sidecar(Path(folder) / name)


def _with_sidecar(path: Path) -> Source:
    for sidecar in (path.with_suffix(".json"), path.with_suffix(".txt")):
        try:
            text = sidecar.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            return Source(str(path), [], problem=f"caption file {sidecar.name} cannot be read: {error}")
        if sidecar.suffix == ".txt":
            return Source(str(path), [text.strip()] if text.strip() else [])
        try:
            captions, extra = _split(json.loads(text))
        except ValueError as error:
            return Source(str(path), [], problem=f"caption file {sidecar.name}: {error}")
        return Source(str(path), captions, extra)
    return Source(str(path), [])


def _from_table(table: Path) -> Iterator[Source]:
    sources: dict[str, Source] = {}
    for line, row in _rows(table):
        column = next((name for name in _PATH_COLUMNS if row.get(name)), None)
        if column is None:
            raise UserError(
                f"{table}, line {line} has no path: a column 'path' is needed, "
                f"there are {', '.join(map(str, row)) or 'none'}"
            )
        path = str(table.parent / str(row[column]))
        try:
            captions, extra = _split({name: value for name, value in row.items() if name != column})
        except ValueError as error:
            raise UserError(f"{table}, line {line}: {error}") from error
        problem = "" if Path(path).is_file() else "no such file"
        if path in sources:
            captions = sources[path].captions + captions
            extra = sources[path].extra | extra
        sources[path] = Source(path, captions, extra, problem=problem)
    yield from sources.values()


def _rows(table: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line number and row."""
    try:
        with open(table, encoding="utf-8-sig", newline="") as file:
            if table.suffix.lower() != ".jsonl":
                reader = csv.DictReader(file, dialect="excel-tab" if table.suffix.lower() == ".tsv" else "excel")
                for row in reader:
                    yield reader.line_num, {name: _listed(value) for name, value in row.items() if name and value}
                return
            for line, text in enumerate(file, 1):
                if text.strip():
                    record = json.loads(text)
                    if not isinstance(record, dict):
                        raise UserError(
                            f'{table}, line {line}: an object such as {{"path": ..., "caption": ...}} is needed'
                        )
                    yield line, record
    except json.JSONDecodeError as error:
        raise UserError(f"{table}, line {line} is no JSON: {error.msg}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{table} is no UTF-8 table: {error}") from error


def _listed(value: Any) -> Any:
    """A CSV cell that holds a JSON list as that list, any other as it is."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            pass
    return value


def _split(record: Any) -> tuple[list[str], dict[str, Any]]:
    """(captions, the rest) of a record; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError('an object such as {"caption": ...} is needed')
    captions: list[str] = []
    for name in _CAPTION_COLUMNS:
        value = record.get(name)
        values = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(caption, str) for caption in values):
            raise ValueError(f"{name} is no text: {json.dumps(value)[:80]}")
        captions += [caption.strip() for caption in values if caption.strip() and caption.strip() not in captions]
    return captions, {name: value for name, value in record.items() if name not in _CAPTION_COLUMNS}


def _stem_caption(path: str) -> str:
    return re.sub(r"[\s_-]+", " ", Path(path).stem).strip()


def _name(path: str, root: Path) -> str:
    """Relative to root where it is below it, so that outputs do not depend on where the folder lies."""
    try:
        return Path(path).relative_to(root).as_posix()
    except ValueError:
        return Path(path).as_posix().lstrip("/")
