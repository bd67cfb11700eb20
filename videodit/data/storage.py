"""Files of this machine and, by fsspec, anywhere else: s3://bucket/videos, https://host/list.csv, zip://videos::all.zip.

fsspec and what a kind of address needs beside it come with the extra `remote`.
"""

import contextlib
import errno
import os
import shutil
import stat
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from videodit.errors import MissingExtra, UserError

_REQUESTS = 32  # at a time: each of them waits for the network
_BLOCK_BYTES = 1 << 16  # read ahead between the headers of a tar
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PAUSES_S = (0.5, 2.0)  # before a file is asked for again
# Names under which file systems tell that a file has changed, the best first.
_VERSIONS = "ETag etag md5Hash md5 CRC mtime LastModified Last-Modified last_modified updated modified created".split()

Item = TypeVar("Item")
Result = TypeVar("Result")


class FetchError(Exception):
    """A file elsewhere that cannot be had; the message is a short reason."""


class FileState(NamedTuple):
    """What tells that a file elsewhere has changed."""

    size: int
    """Bytes; 0 if the file system does not tell."""
    version: str
    """Its etag, checksum or time, as the file system gives it; empty if it gives none."""


class Found(NamedTuple):
    """A file that was come across."""

    address: str
    state: FileState | None = None
    """Of a file elsewhere, if the listing told."""


def plain(address: str | Path) -> str:
    """The address, as a path of this machine if it is one."""
    text = str(address)
    local = text.partition("://")[2] if text.startswith(("file://", "local://")) else text
    return text if "::" in text else local


def is_remote(address: str | Path) -> bool:
    """Whether fsspec is needed."""
    return "://" in plain(address)


def split_suffix(address: str) -> tuple[str, str]:
    """(everything before it, the suffix) of a file's name; what is no part of the name, such as ?key=1, is left out."""
    name = address.partition("::")[0] if is_remote(address) else address
    return os.path.splitext(name.partition("?")[0] if name.startswith(("http://", "https://")) else name)


def beside(address: str, name: str) -> str:
    """The address of another file of the same folder, or of one below it."""
    if not is_remote(address):
        return str(Path(address).parent / name)
    head, chained, chain = address.partition("::")
    folder, slash, _ = head.partition("?")[0].rpartition("/")
    return f"{folder}{slash}{name}{chained}{chain}"


def walk(root: str, exclude: Iterable[Path] = (), whole: tuple[str, ...] = ()) -> Iterator[dict[str, Found]]:
    """The files of every folder by name; nothing whose name begins with a dot.

    Args:
        root: where to begin.
        exclude: folders of this machine, resolved, to leave out.
        whole: endings of the names of folders that count as files.
    Raises:
        OSError: if a folder of this machine cannot be read.
        UserError: if files elsewhere cannot be listed.
    """
    if is_remote(root):
        yield from _walk_remote(root, whole)
        return
    left_out = set(exclude)

    def refuse(error: OSError) -> None:
        raise error

    for folder, below, files in os.walk(root, onerror=refuse):
        below[:] = [n for n in below if not n.startswith(".") and (Path(folder) / n).resolve() not in left_out]
        files += [name for name in below if name.endswith(whole)]
        below[:] = [name for name in below if not name.endswith(whole)]
        yield {name: Found(str(Path(folder) / name)) for name in files if not name.startswith(".")}


def _walk_remote(root: str, whole: tuple[str, ...]) -> Iterator[dict[str, Found]]:
    with _explained(root):
        system, top = open_system(root)
        listed: dict[str, dict[str, Any]] = system.find(top, detail=True)
    folders: dict[str, dict[str, Found]] = defaultdict(dict)
    _, chained, chain = root.partition("::")
    for path, facts in listed.items():
        below = path.removeprefix(top).split("/")
        inside = next((number for number, part in enumerate(below[:-1], 1) if part.endswith(whole)), None)
        if inside:
            path, facts, below = path.rsplit("/", len(below) - inside)[0], {}, below[:inside]
        folder, _, name = path.rpartition("/")
        if not any(part.startswith(".") for part in below):
            known = _state(facts) if facts.get("size") is not None else None  # a page of links does not tell
            folders[folder][name] = Found(f"{system.unstrip_protocol(path)}{chained}{chain}", known)
    yield from folders.values()


def relative_name(address: str, root: str) -> str:
    """A file's name below a folder with "/", so that outputs do not depend on where the folder lies; of a file that is
    not below it the whole path.
    """
    if not is_remote(address):
        try:
            return Path(address).relative_to(root).as_posix()
        except ValueError:
            return Path(address).as_posix().lstrip("/")
    name, top = "".join(split_suffix(address)).partition("://")[2].lstrip("/"), root.partition("::")[0]
    return name.removeprefix(f"{top.partition('://')[2].strip('/')}/") if is_remote(root) else name


def state(address: str) -> FileState:
    """A file's state.

    Raises:
        FileNotFoundError: if it is not there.
        UserError: if a file elsewhere cannot be asked for.
    """
    if not is_remote(address):
        facts = os.stat(address)
        return FileState(facts.st_size, str(facts.st_mtime_ns))
    with _explained(address):
        system, path = open_system(address)
        return _state(system.info(path))


def files_below(folder: str) -> dict[str, FileState]:
    """The files in a folder and all folders below it, by their path from there with "/".

    Raises:
        FileNotFoundError: if there is none, of a folder elsewhere.
        OSError: if a folder of this machine cannot be listed.
        UserError: if one elsewhere cannot.
    """
    if not is_remote(folder):
        paths = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): state(str(path)) for path in paths}
    with _explained(folder):
        system, top = open_system(folder)
        listed: dict[str, dict[str, Any]] = system.find(top, detail=True)
    if not listed:
        raise FileNotFoundError(errno.ENOENT, "no such folder", folder)
    return {path.removeprefix(top).strip("/"): _state(facts) for path, facts in listed.items()}


def _state(facts: dict[str, Any]) -> FileState:
    return FileState(int(facts.get("size") or 0), version_of(facts))


def version_of(facts: Mapping[str, Any]) -> str:
    """What of a file system's facts about a file changes with it; empty if it gives nothing of the kind."""
    return next((str(facts[name]) for name in _VERSIONS if facts.get(name) is not None), "")


def read_small(found: Found, at_most: int) -> bytes:
    """The bytes of a small file, such as a caption.

    Args:
        found: the file.
        at_most: bytes that are believed of it.
    Raises:
        ValueError: if it is larger, or no regular file: a pipe would never end.
        OSError: if it cannot be read.
        UserError: if a file elsewhere cannot be read.
    """
    if is_remote(found.address):
        with _explained(found.address):
            system, path = open_system(found.address)
            size = found.state.size if found.state else 0
            data: bytes = b"" if size > at_most else system.cat_file(path)
    else:
        descriptor = os.open(found.address, os.O_RDONLY | os.O_NONBLOCK)
        with open(descriptor, "rb") as file:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise ValueError("no regular file")
            size = facts.st_size
            data = b"" if size > at_most else file.read(at_most + 1)
    if max(size, len(data)) > at_most:
        raise ValueError(f"{max(size, len(data))} bytes, more than {at_most}")
    return data


@contextlib.contextmanager
def open_file(address: str) -> Iterator[BinaryIO]:
    """A file to read in parts; raises as `read_bytes` does."""
    if not is_remote(address):
        with open(address, "rb") as file:
            yield file
        return
    with _explained(address):
        system, path = open_system(address)
        with system.open(path, "rb", block_size=_BLOCK_BYTES) as file, tempfile.TemporaryFile() as copy:
            if not file.seekable():  # a server that gives whole files only
                shutil.copyfileobj(file, copy)
                copy.seek(0)
            yield file if file.seekable() else copy


def fetch(address: str, copy: Path, beat: Callable[[], None], span: tuple[int, int] | None = None) -> None:
    """Copies a file from elsewhere; tries again when that fails.

    Args:
        address: where it is.
        copy: the file to write.
        beat: called as it grows.
        span: (offset, size) of the part that is wanted; None for all of it.
    Raises:
        FetchError: if it cannot be had.
        OSError: if the copy cannot be written.
    """
    from fsspec.callbacks import Callback

    class Beat(Callback):  # type: ignore[misc]
        def relative_update(self, inc: int = 1) -> None:
            beat()

    for pause_s in (*_PAUSES_S, None):
        try:
            system, path = open_system(address)
            if span is None:
                system.get_file(path, str(copy), callback=Beat())
            else:
                data = system.cat_file(path, span[0], sum(span))
                # A server that gives whole files only does so here too.
                copy.write_bytes(data if len(data) <= span[1] else data[span[0] : sum(span)])
            return
        except FileNotFoundError as error:
            raise FetchError("no such file") from error
        except Exception as error:  # every file system has errors of its own
            if isinstance(error, OSError) and (error.errno in _FULL or error.filename == str(copy)):
                raise
            if pause_s is None:
                raise FetchError(f"cannot be fetched: {reason(error)}") from error
            time.sleep(pause_s)
            beat()


def fetch_folder(address: str, copy: Path, beat: Callable[[], None]) -> None:
    """Copies a folder from elsewhere with all that is below it; what was copied before is copied again.

    Args:
        address: where it is.
        copy: the folder to write.
        beat: called as it grows, from several threads.
    Raises:
        FetchError: if it cannot be had.
        OSError: if the copy cannot be written.
    """
    try:
        names = list(files_below(address))
    except FileNotFoundError as error:
        raise FetchError("no such folder") from error
    except UserError as error:
        raise FetchError(str(error)) from error
    head, chained, chain = address.partition("::")

    def fetch_file(name: str) -> None:
        if ".." in name.split("/"):
            raise FetchError(f"a file that is called {name}")
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        fetch(f"{head}/{name}{chained}{chain}", copy / name, beat)

    map_all(fetch_file, names, at_once=True)


def in_this_process(address: str) -> bool:
    """Whether other processes cannot see the file: fsspec's memory://."""
    return address.startswith("memory://")


def map_all(function: Callable[[Item], Result], items: Sequence[Item], at_once: bool) -> list[Result]:
    """A function of each item; many at once where it waits for the network."""
    if not at_once:
        return list(map(function, items))
    with ThreadPoolExecutor(_REQUESTS) as pool:
        return list(pool.map(function, items))


def open_system(address: str, *, anew: bool = False) -> tuple[Any, str]:
    """(fsspec's file system, the path in it).

    Args:
        address: of a file or folder.
        anew: with connections of its own, as a forked process needs.
    Raises:
        MissingExtra: if fsspec is not installed.
    """
    try:
        import fsspec  # takes 0.1 s, and its drivers more
    except ImportError:
        raise MissingExtra("fsspec", "remote") from None
    system, path = fsspec.core.url_to_fs(address, skip_instance_cache=anew)
    return system, str(path)


@contextlib.contextmanager
def _explained(address: str) -> Iterator[None]:
    """Whatever a file system raises as one line; a file that is not there stays FileNotFoundError."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except ImportError as error:
        extra = "pip install 'videodit[remote]' brings what http and S3 need"
        raise UserError(f"{address} cannot be read: {reason(error)}; {extra}") from error
    except Exception as error:  # every file system has errors of its own
        raise UserError(f"{address} cannot be read: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """A file system's error as a short text; most of them are told by their type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ImportError) and text else f"{type(error).__name__}{f': {text}' if text else ''}"
