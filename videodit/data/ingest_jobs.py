"""The work of ingest's processes: one source at a time, fetched if it lies elsewhere, cut into a spool file."""

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from videodit.data.clip_cutter import CutResult, CutRules, cut_source
from videodit.data.field import cut_field
from videodit.data.ingest_cuts import Cut, EarlierCuts, drop_spool, keep_result, spool_file
from videodit.data.ingest_record import source_bytes
from videodit.data.isolation import Beat, Failure
from videodit.data.picture import cut_picture
from videodit.data.shards import PART, read_span
from videodit.data.sources import Source
from videodit.data.storage import FetchError, fetch, fetch_folder, in_this_process, is_remote
from videodit.errors import user_error

_CHUNK_BYTES = 4 << 20  # small files go to a worker by the chunk
_CHUNK_FILES = 32
_READ_BYTES = 4 << 20
_PAUSE_S = 1.0  # before a file that could not be read is tried again


@dataclass(frozen=True)
class Job:
    """A source for a worker process."""

    source: Source
    spool: str
    """The file for its clips' bytes."""


class _TooManyFramesError(Exception):
    """A source has more frames than any is to have."""


def cut_job(job: Job, beat: Beat, rules: CutRules, max_frames: int = 0) -> CutResult | Failure:
    """Cuts a source, in a worker process; see `cut_source`.

    Args:
        job: the source.
        beat: of `run_isolated`.
        rules: how to cut.
        max_frames: more of them are a Failure; 0 for no limit.
    Raises:
        UserError: if the spool, or the copy of a file from elsewhere beside it, cannot be written.
        MemoryError: if there is too little.
    """
    source, spool = job.source, Path(job.spool)
    frames = 0

    def counted() -> None:
        nonlocal frames
        frames += 1
        if 0 < max_frames < frames:
            raise _TooManyFramesError
        beat()

    def cut(data: str | bytes) -> CutResult:
        nonlocal frames
        frames = 0 if source.is_field else -1  # a video's first beat comes before its first frame
        return _cut_data(source, data, spool, counted, rules)

    try:
        if is_remote(source.path):
            result = _cut_copy(source, spool, beat, cut)
        else:
            result = _cut_local(source, beat, cut)
    except FetchError as error:
        result = CutResult(problem=str(error), fetched=False)
    except _TooManyFramesError:
        return Failure(f"more than {max_frames} frames")
    if os.strerror(errno.ENOMEM) in result.problem and not source.is_field:  # of a field it comes with advice
        raise MemoryError
    try:
        keep_result(spool, result)
    except OSError as error:
        raise user_error(error, spool) from error
    return result


def _cut_copy(source: Source, spool: Path, beat: Beat, cut: Callable[[str | bytes], CutResult]) -> CutResult:
    copy = copy_file(source, spool)
    try:
        if not copy.exists():
            _fetch(source, copy, beat)
        return cut(str(copy))
    finally:
        remove_copy(source, spool)


def _cut_local(source: Source, beat: Beat, cut: Callable[[str | bytes], CutResult]) -> CutResult:
    """A source of this machine; one that is refused once more if it could be the disk, or the network to it."""
    result, trouble = CutResult(), ""
    for is_last in (False, True):
        try:
            data = source.path if source.span is None else read_span(source.path, *source.span)
            result = cut(data)
            in_doubt = result.problem and source.span is None and not source.is_field
            trouble = _trouble_of_disk(source.path, beat) if in_doubt else ""
        except OSError as error:
            trouble = os.strerror(error.errno or errno.EIO)
        if not trouble and os.strerror(errno.EIO) not in result.problem:
            break
        if trouble and not is_last:
            time.sleep(_PAUSE_S)
            beat()
    return CutResult(problem=f"cannot be read: {trouble}", fetched=False) if trouble else result


def _trouble_of_disk(path: str, beat: Beat) -> str:
    """What the system says where a file cannot be read to its end; empty if it can."""
    try:
        with open(path, "rb", buffering=0) as file:
            while file.read(_READ_BYTES):
                beat()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _fetch(source: Source, copy: Path, beat: Beat) -> None:
    part = copy.with_name(copy.name + PART)
    try:
        if source.is_zarr:
            fetch_folder(source.path, part, beat)
        else:
            fetch(source.path, part, beat, source.span)
        part.replace(copy)
    except OSError as error:
        raise user_error(error, copy) from error


def _cut_data(source: Source, data: str | bytes, spool: Path, beat: Beat, rules: CutRules) -> CutResult:
    if source.is_field:
        return cut_field(data, spool, rules, source.extra.get("fps", 1.0), beat, source.extra.get("array"))
    return cut_picture(data, spool, rules) if source.is_image else cut_source(data, spool, rules, beat)


def cut_sources(
    sources: Sequence[Source],
    keys: Sequence[str],
    earlier: EarlierCuts,
    work: Path,
    run: Callable[[list[list[Job]]], Iterator[CutResult | Failure]],
) -> Iterator[Cut]:
    """What becomes of each source, in their order: of those that earlier runs have cut, what these kept.

    Args:
        sources, keys: with the `cut_key` of each.
        earlier: what was kept.
        work: folder of the spools.
        run: runs `cut_job` on jobs by the chunk.
    """
    spools = [spool_file(work, key) for key in keys]
    new = [source.problem == "" and key not in earlier for source, key in zip(sources, keys)]
    results = run(make_jobs((source, spool) for source, spool, is_new in zip(sources, spools, new) if is_new))
    for source, key, spool, is_new in zip(sources, keys, spools, new):
        if source.problem:
            yield Cut(CutResult(problem=source.problem), lasts=False)
        elif is_new:
            yield _as_cut(next(results), source, spool)
        elif kept := earlier.find(key):
            yield kept
        else:  # it is damaged by now
            yield _as_cut(next(run(make_jobs([(source, spool)]))), source, spool)


def _as_cut(result: CutResult | Failure, source: Source, spool: Path) -> Cut:
    if isinstance(result, Failure):
        return Cut(CutResult(problem=result.reason, fetched=is_fetched(source, spool)), lasts=False)
    return Cut.in_spool(result, spool)


def make_jobs(sources: Iterable[tuple[Source, Path]]) -> list[list[Job]]:
    """Sources with their spools by the chunk, small ones together."""
    chunks: list[list[Job]] = [[]]
    size = 0
    for source, spool in sources:
        if len(chunks[-1]) >= _CHUNK_FILES or size >= _CHUNK_BYTES:
            chunks.append([])
            size = 0
        chunks[-1].append(Job(source, str(spool)))
        if in_this_process(source.path):
            _fetch(source, copy_file(source, spool), lambda: None)
        size += source_bytes(source)
    return chunks


def is_fetched(source: Source, spool: Path) -> bool:
    """Whether a source whose worker died was there to be cut, and not still on its way from elsewhere."""
    return not is_remote(source.path) or copy_file(source, spool).exists()


def remove_scraps(source: Source, spool: Path) -> None:
    """Removes the spool, and what a worker that died has left of a source from elsewhere."""
    drop_spool(spool)
    remove_copy(source, spool)


def remove_copy(source: Source, spool: Path) -> None:
    """Removes what was fetched of a source, if anything was."""
    copy = copy_file(source, spool)
    for path in (copy, copy.with_name(copy.name + PART)):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


def copy_file(source: Source, spool: Path) -> Path:
    """Where a source from elsewhere lies while it is being cut."""
    return spool.with_suffix(f".copy{Path(source.name).suffix.lower()}")
