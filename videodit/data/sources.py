"""Which videos, pictures and fields to ingest and what is said of them: a folder with sidecar files, a table,
webdataset tars, one file.
"""

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from videodit.data.captions import CAPTION_NAMES, WEIGHT_NAMES, Captions, parse_captions
from videodit.data.shards import read_span, tar_samples
from videodit.errors import MissingExtra, UserError, user_error

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .mxf .gif .y4m".split()
)
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff".split())
FIELD_SUFFIXES = frozenset([".npy"])
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_SIDECAR_BYTES = 16 << 20  # of a caption in a tar
_PATH_COLUMNS = ("path", "video", "file", "filename", "video_path")


@dataclass(frozen=True)
class Source:
    """One video, picture or field to ingest."""

    path: str
    """The file, or the tar that it lies in."""
    captions: Captions
    """What is said of it, at least one; without any, the file's stem with _ and - as spaces."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Whatever else its sidecar or its table row says; it travels into the clips' json."""
    name: str = ""
    """The path below the folder (or beside the table) that was given, with "/": what outputs call it."""
    problem: str = ""
    """Why it cannot be taken, as in "caption file is no JSON"; empty if nothing is wrong so far."""
    span: tuple[int, int] | None = None
    """(offset, size) within the tar; None for a file of its own."""

    @property
    def is_image(self) -> bool:
        """Whether it is a picture rather than a video, by its name."""
        return Path(self.name or self.path).suffix.lower() in IMAGE_SUFFIXES

    @property
    def is_field(self) -> bool:
        """Whether it is an array rather than a video, by its name."""
        return Path(self.name or self.path).suffix.lower() in FIELD_SUFFIXES


def list_sources(src: str | Path, exclude: Iterable[str | Path] = (), *, images: bool = False) -> list[Source]:
    """Lists the videos and fields of a folder (all levels), a table, webdataset tars, or a single file.

    Beside NAME.mp4 in a folder, NAME.json is read ({"caption": str} or {"captions": [str]}, weights as in
    `captions.py`; other keys are carried along) or NAME.txt (one caption); in a tar, as webdataset and video2dataset
    write them, KEY.json and KEY.txt beside KEY.mp4. A table (.csv, .tsv, .jsonl, .parquet) has a column "path"
    (relative to the table) and "caption" or "captions" (in a CSV: a JSON list); other columns are carried along. A path
    that comes in several rows is one source with the captions of all. In a folder or tar, NAME.npy beside a video NAME
    (an embedding, say) is no field.

    Args:
        src: folder, table, .tar, or file of a video or field.
        exclude: folders to leave out, such as the output's.
        images: whether pictures are taken too.
    Returns:
        Sources sorted by name.
    Raises:
        UserError: if src is not there, is of no known kind or holds no video.
    """
    src = Path(src)
    suffixes = VIDEO_SUFFIXES | FIELD_SUFFIXES | (IMAGE_SUFFIXES if images else frozenset())
    try:
        if src.is_dir():
            root, found = src, list(_from_folder(src, {Path(folder).resolve() for folder in exclude}, suffixes))
        elif not src.exists():
            raise UserError(f"{src}: no such file or folder: give a folder of videos, a .tar, .csv, .jsonl or .parquet")
        elif src.suffix.lower() in _TABLES:
            root, found = src.parent, list(_from_table(src))
        elif src.suffix.lower() == ".tar":
            root, found = src.parent, list(_from_tar(src, suffixes))
        elif src.suffix.lower() in suffixes:
            root, found = src.parent, [_with_sidecar(src)]
        else:
            kinds = (
                f"{' '.join(_TABLES)}, .tar or a video or field ({' '.join(sorted(VIDEO_SUFFIXES | FIELD_SUFFIXES))})"
            )
            raise UserError(f"{src}: neither a folder nor {kinds}{'' if images else '; pictures need --images'}")
    except OSError as error:
        raise user_error(error, error.filename or src) from error
    if not found:
        kinds = " ".join(sorted(suffixes))
        raise UserError(f"{src} has no videos: {kinds} are looked for, also in the folders and tars in it")
    return sorted((_complete(source, root, images) for source in found), key=lambda source: source.name)


def _complete(source: Source, root: Path, images: bool) -> Source:
    """With a name, a caption, and what is wrong with it."""
    problem = source.problem or ("a picture: --images takes it" if source.is_image and not images else "")
    captions = source.captions if source.captions.texts else Captions([_stem_caption(source.name or source.path)])
    return replace(source, captions=captions, name=_name(source, root), problem=problem)


def _from_folder(root: Path, exclude: set[Path], suffixes: frozenset[str]) -> Iterator[Source]:
    def refuse(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, onerror=refuse):
        below[:] = [
            name for name in below if not name.startswith(".") and (Path(folder) / name).resolve() not in exclude
        ]
        for name in _unattached(files):
            if not name.startswith(".") and Path(name).suffix.lower() in suffixes:
                yield _with_sidecar(Path(folder) / name)
            elif not name.startswith(".") and name.lower().endswith(".tar"):
                yield from _from_tar(Path(folder) / name, suffixes)


def _from_tar(path: Path, suffixes: frozenset[str]) -> Iterator[Source]:
    """Videos of a webdataset tar; their names begin with the tar's."""
    for key, members in tar_samples(path).items():
        for name in _unattached([f"{key}.{extension}" for extension in members]):
            extension = name.removeprefix(f"{key}.")
            if f".{extension}" not in suffixes:
                continue
            source = Source(str(path), Captions([]), name=name, span=members[extension])
            try:
                if "json" in members:
                    captions, extra = _split(json.loads(_member(path, members["json"])))
                    source = replace(source, captions=captions, extra=extra)
                if "txt" in members and not source.captions.texts:
                    source = replace(source, captions=Captions([_member(path, members["txt"]).strip()]))
            except ValueError as error:
                source = replace(source, problem=f"caption beside it: {error}")
            yield source


def _unattached(names: Sequence[str]) -> list[str]:
    """The files of a folder without the arrays that belong to a video of the same name."""
    videos = {Path(name).stem for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES}
    return [name for name in names if Path(name).suffix.lower() not in FIELD_SUFFIXES or Path(name).stem not in videos]


def _member(path: Path, span: tuple[int, int]) -> str:
    if span[1] > _SIDECAR_BYTES:
        raise ValueError(f"{span[1]} bytes are too many for a caption")
    return read_span(path, *span).decode("utf-8")


def _with_sidecar(path: Path) -> Source:
    for sidecar in (path.with_suffix(".json"), path.with_suffix(".txt")):
        try:
            text = sidecar.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            return Source(str(path), Captions([]), problem=f"caption file {sidecar.name} cannot be read: {error}")
        if sidecar.suffix == ".txt":
            return Source(str(path), Captions([text.strip()] if text.strip() else []))
        try:
            captions, extra = _split(json.loads(text))
        except ValueError as error:
            return Source(str(path), Captions([]), problem=f"caption file {sidecar.name}: {error}")
        return Source(str(path), captions, extra)
    return Source(str(path), Captions([]))


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
    if table.suffix.lower() == ".parquet":
        yield from enumerate(_parquet_rows(table), 1)
        return
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


def _parquet_rows(table: Path) -> Iterator[Mapping[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise MissingExtra("pyarrow", "parquet") from None
    try:
        with pyarrow.parquet.ParquetFile(table) as file:
            for batch in file.iter_batches():
                yield from ({k: v for k, v in row.items() if v is not None} for row in batch.to_pylist())
    except pyarrow.ArrowException as error:
        raise UserError(f"{table} is no readable Parquet file: {str(error).splitlines()[0]}") from error


def _listed(value: Any) -> Any:
    """A CSV cell that holds a JSON list as that list, any other as it is."""
    if isinstance(value, str) and value.startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            pass
    return value


def _split(record: Any) -> tuple[Captions, dict[str, Any]]:
    """(captions, the rest) of a record; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError('an object such as {"caption": ...} is needed')
    of_captions = CAPTION_NAMES + WEIGHT_NAMES
    return parse_captions(record), {name: value for name, value in record.items() if name not in of_captions}


def _stem_caption(path: str) -> str:
    return re.sub(r"[\s_-]+", " ", Path(path).stem).strip()


def _name(source: Source, root: Path) -> str:
    """Relative to root where it is below it, so that outputs do not depend on where the folder lies."""
    try:
        name = Path(source.path).relative_to(root).as_posix()
    except ValueError:
        name = Path(source.path).as_posix().lstrip("/")
    return f"{name}/{source.name}" if source.span else name
