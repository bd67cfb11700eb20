"""Which videos, pictures and fields to ingest and what is said of them: a folder with sidecar files, a table,
webdataset tars, one file.
"""

import json
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from videodit.data.captions import CAPTION_NAMES, WEIGHT_NAMES, Captions, parse_captions
from videodit.data.field_arrays import ZARR, folder_state, require_zarr
from videodit.data.shards import INDEX, MAX_READ_BYTES, tar_samples
from videodit.data.storable import parse_json, printable, storable
from videodit.data.storage import (
    FileState,
    Found,
    beside,
    is_remote,
    map_all,
    open_file,
    plain,
    read_small,
    relative_name,
    split_suffix,
    state,
    walk,
)
from videodit.data.tables import table_rows
from videodit.errors import UserError, user_error

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .mkv .webm .avi .mpg .mpeg .ts .mts .m2ts .wmv .flv .ogv .3gp .mxf .gif .y4m".split()
)
IMAGE_SUFFIXES = frozenset(".jpg .jpeg .png .webp .bmp .tif .tiff".split())
FIELD_SUFFIXES = frozenset([".npy", ZARR])
_TABLES = (".csv", ".tsv", ".jsonl", ".parquet")
_CLIPS_LOOKED_AT = 100  # of a set of shards: some of its sources may be gone
_SIDECAR_BYTES = 16 << 20  # of a caption
_PATH_COLUMNS = ("path", "video", "file", "filename", "video_path")


@dataclass(frozen=True)
class Source:
    """One video, picture or field to ingest."""

    path: str
    """The file, or the tar that it lies in; an address for fsspec if it is not on this machine."""
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
    state: FileState | None = None
    """Of a file that is not on this machine, or of a zarr array."""
    captioned: bool = True
    """Whether something is said of it, so that `captions` are not only its name."""

    @property
    def is_image(self) -> bool:
        """Whether it is a picture rather than a video, by its name."""
        return Path(self.name or self.path).suffix.lower() in IMAGE_SUFFIXES

    @property
    def is_zarr(self) -> bool:
        """Whether it is a zarr array, by its name."""
        return (self.name or self.path).endswith(ZARR)

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
    (an embedding, say) is no field. A folder NAME.zarr is an array as NAME.npy is; of a group the sidecar's "array"
    names the one that is meant.

    Args:
        src: folder, table, .tar, or file of a video or field; also an address that fsspec knows, such as s3://bucket/a.
        exclude: folders to leave out, such as the output's.
        images: whether pictures are taken too.
    Returns:
        Sources sorted by name.
    Raises:
        UserError: if src is not there, is of no known kind or holds no video.
        MissingExtra: if it needs fsspec or zarr and that is not installed.
    """
    given = plain(src)
    suffixes = VIDEO_SUFFIXES | FIELD_SUFFIXES | (IMAGE_SUFFIXES if images else frozenset())
    suffix = split_suffix(given)[1].lower()
    root = beside(given, "").removesuffix("/") if is_remote(given) else str(Path(given).parent)
    try:
        if (Path(given).is_dir() and suffix != ZARR) or (
            is_remote(given) and suffix not in {*_TABLES, ".tar", *suffixes}
        ):
            root, found = given, list(_from_folder(given, {Path(folder).resolve() for folder in exclude}, suffixes))
        elif not is_remote(given) and not Path(given).exists():
            raise FileNotFoundError
        elif suffix in _TABLES:
            found = list(_from_table(given))
        elif suffix == ".tar":
            found = list(_from_tar(Found(given), suffixes))
        elif suffix in suffixes:
            found = [_with_sidecar(Found(given))]
        else:
            kinds = (
                f"{' '.join(_TABLES)}, .tar or a video or field ({' '.join(sorted(VIDEO_SUFFIXES | FIELD_SUFFIXES))})"
            )
            raise UserError(f"{given}: neither a folder nor {kinds}{'' if images else '; pictures need --images'}")
    except FileNotFoundError as error:
        kinds = "a folder of videos, a .tar, .csv, .jsonl or .parquet"
        raise UserError(f"{error.filename or given}: no such file or folder: give {kinds}") from error
    except OSError as error:
        raise user_error(error, error.filename or given) from error
    if not found:
        kinds, hint = " ".join(sorted(suffixes)), "" if images else "; pictures need --images"
        raise UserError(f"{given} has no videos: {kinds} are looked for, also in the folders and tars in it{hint}")
    if any(source.is_zarr for source in found):
        require_zarr()
    unknown = any(is_remote(source.path) and not source.state for source in found)
    complete = partial(_complete, root=root, images=images)
    return _told_apart(sorted(map_all(complete, found, at_once=unknown), key=lambda source: source.name))


def _told_apart(sources: list[Source]) -> list[Source]:
    """Refuses those of the same name but the first: names that are no UTF-8 can be written alike."""
    return [
        replace(source, problem="a second file of this name") if before and before.name == source.name else source
        for before, source in zip([None, *sources], sources)
    ]


def _complete(source: Source, root: str, images: bool) -> Source:
    """With a name, a caption, its state if it lies elsewhere, and what is wrong with it."""
    name = relative_name(source.path, root)
    source = replace(source, name=printable(f"{name}/{source.name}" if source.span else name))
    problem = source.problem or ("a picture: --images takes it" if source.is_image and not images else "")
    where = source.state
    if source.is_zarr and source.span and not problem:
        problem = "a zarr array in a tar: take it out of it"
    elif (source.is_zarr or (is_remote(source.path) and not where)) and not problem:
        try:
            where = folder_state(source.path) if source.is_zarr else state(source.path)
        except FileNotFoundError:
            problem = "no such file"
        except OSError as error:
            problem = f"cannot be read: {error.strerror or error}"
        except UserError as error:
            problem = str(error)
    elif not is_remote(source.path) and not problem:
        problem = _local_problem(source.path)
    captioned = bool(source.captions.texts)
    captions = source.captions if captioned else Captions([_stem_caption(source.name)])
    return replace(source, captions=captions, problem=printable(problem), state=where, captioned=captioned)


def _local_problem(path: str) -> str:
    """Why a file of this machine cannot be read, as far as that shows without opening it; empty if it can."""
    try:
        return "" if stat.S_ISREG(os.stat(path).st_mode) else "no regular file"
    except FileNotFoundError:
        return "no such file"
    except (OSError, ValueError) as error:
        return f"cannot be read: {getattr(error, 'strerror', None) or error}"


def _from_folder(root: str, exclude: set[Path], suffixes: frozenset[str]) -> Iterator[Source]:
    for files in walk(root, exclude, whole=(ZARR,)):
        if _is_made_of(root, files):
            continue
        names = [name for name in _unattached(files) if Path(name).suffix.lower() in suffixes]
        videos = [files[name] for name in names]
        yield from map_all(partial(_with_sidecar, files=files), videos, at_once=is_remote(root))
        for name in files:
            if name.lower().endswith(".tar"):
                yield from _from_tar_in_folder(files[name], suffixes)


def _is_made_of(root: str, files: Mapping[str, Found]) -> bool:
    """Whether a folder below root is a set that ingest made of the videos around it, which else would come twice."""
    if is_remote(root) or INDEX not in files:
        return False
    path = Path(files[INDEX].address)
    try:
        with open(path, encoding="utf-8") as lines:
            names = [json.loads(line)["meta"]["source"] for line in islice(lines, _CLIPS_LOOKED_AT)]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    around = [folder for folder in path.parent.parents if folder.is_relative_to(root)]
    return any(os.path.lexists(folder / name) for folder in around for name in names)


def _from_tar_in_folder(tar: Found, suffixes: frozenset[str]) -> list[Source]:
    """Videos of a tar among others, or one source that says why there are none."""
    problem = "" if is_remote(tar.address) else _local_problem(tar.address)
    try:
        if not problem:
            return list(_from_tar(tar, suffixes))
    except (UserError, OSError) as error:
        problem = str(error)
    return [Source(tar.address, Captions([]), problem=problem, state=tar.state)]


def _from_tar(tar: Found, suffixes: frozenset[str]) -> Iterator[Source]:
    """Videos of a webdataset tar; their names begin with the tar's."""
    with open_file(tar.address) as file:
        for key, members in tar_samples(tar.address, file).items():
            for name in _unattached([f"{key}.{extension}" for extension in members]):
                extension = name.removeprefix(f"{key}.")
                if f".{extension}" not in suffixes:
                    continue
                source = Source(tar.address, Captions([]), name=name, span=members[extension], state=tar.state)
                if members[extension][1] > MAX_READ_BYTES:
                    yield replace(source, problem=f"{members[extension][1]} bytes, too many in a tar: unpack it")
                    continue
                try:
                    if "json" in members:
                        captions, extra = _split(parse_json(_member(file, members["json"])))
                        source = replace(source, captions=captions, extra=extra)
                    if "txt" in members and not source.captions.texts:
                        source = replace(source, captions=Captions([_member(file, members["txt"]).strip()]))
                except ValueError as error:
                    source = replace(source, problem=f"caption beside it: {error}")
                yield source


def _unattached(names: Collection[str]) -> list[str]:
    """The files of a folder without the arrays that belong to a video of the same name."""
    videos = {Path(name).stem for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES}
    return [name for name in names if Path(name).suffix.lower() not in FIELD_SUFFIXES or Path(name).stem not in videos]


def _member(tar: BinaryIO, span: tuple[int, int]) -> str:
    if span[1] > _SIDECAR_BYTES:
        raise ValueError(f"{span[1]} bytes are too many for a caption")
    tar.seek(span[0])
    return tar.read(span[1]).decode("utf-8-sig")


def _with_sidecar(video: Found, files: Mapping[str, Found] | None = None) -> Source:
    """With the captions beside it, among the files of its folder as far as they are known."""
    source = Source(video.address, Captions([]), state=video.state)
    stem = split_suffix(video.address)[0].rpartition("/" if is_remote(video.address) else os.sep)[2]
    for name in (f"{stem}.json", f"{stem}.txt"):
        if files is not None and name not in files:
            continue
        try:
            found = files[name] if files else Found(beside(video.address, name))
            text = read_small(found, _SIDECAR_BYTES).decode("utf-8-sig")
        except FileNotFoundError:
            continue
        except UnicodeDecodeError:
            return replace(source, problem=f"caption file {name} is no UTF-8 text")
        except (OSError, ValueError, UserError) as error:
            return replace(source, problem=f"caption file {name} cannot be read: {error}")
        if name.endswith(".txt"):
            return replace(source, captions=Captions([text.strip()] if text.strip() else []))
        try:
            captions, extra = _split(parse_json(text))
        except ValueError as error:
            return replace(source, problem=f"caption file {name}: {error}")
        return replace(source, captions=captions, extra=extra)
    return source


def _from_table(table: str) -> Iterator[Source]:
    sources: dict[str, Source] = {}
    is_csv = split_suffix(table)[1].lower() in (".csv", ".tsv")
    for line, row in table_rows(table):
        column = next((name for name in _PATH_COLUMNS if row.get(name)), None)
        if column is None:
            if not row:  # "," as spreadsheets leave it below a table
                continue
            names = ", ".join(map(str, row))
            hint = " (columns are separated by commas)" if ";" in names else ""
            raise UserError(
                f"{table}, line {line} has no path: a column 'path' is needed and filled in on each line; "
                f"this one has {names}{hint}"
            )
        path = plain(str(row[column]).strip() if is_csv else str(row[column]))
        if not is_remote(path) and not os.path.isabs(path):
            path = beside(table, path)
        there = is_remote(path) or os.path.isfile(path) or (path.endswith(ZARR) and os.path.isdir(path))
        problem = "" if there else "no such file"
        captions, extra = Captions([]), dict[str, Any]()
        try:
            captions, extra = _split(storable({name: value for name, value in row.items() if name != column}))
        except ValueError as error:
            problem = problem or f"line {line} of the table: {error}"
        if path in sources:
            problem = sources[path].problem or problem
            captions = sources[path].captions + captions
            extra = sources[path].extra | extra
        sources[path] = Source(path, captions, extra, problem=problem)
    yield from sources.values()


def _split(record: Any) -> tuple[Captions, dict[str, Any]]:
    """(captions, the rest) of a record; ValueError says what is wrong with it."""
    if not isinstance(record, dict):
        raise ValueError('an object such as {"caption": ...} is needed')
    of_captions = CAPTION_NAMES + WEIGHT_NAMES
    return parse_captions(record), {name: value for name, value in record.items() if name not in of_captions}


def _stem_caption(path: str) -> str:
    return re.sub(r"[\s_-]+", " ", Path(path).stem).strip()
