"""What became of each source, kept so that one that did not change is decoded once: by an interrupted run that is
started again, and by a finished set that grows.

cuts.jsonl beside the shards has a line a source: a hash of all that its clips depend on, what was found, and where in
the shards the clips lie. A run that is under way keeps what its workers are done with in .work, and writes
cuts.jsonl.part as the clips go into the tars. Whatever is taken from there is held against the clips' sha256 first.
"""

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import av
import numpy as np

from videodit.data.channel_statistics import ChannelMoments
from videodit.data.clip_cutter import Clip, CutResult, CutRules, Dropped
from videodit.data.ingest_record import REJECTS, source_bytes, source_version
from videodit.data.letterbox import Bars
from videodit.data.scores import ClipScores
from videodit.data.shards import INDEX, PART, Entry, json_bytes, sha256_hex
from videodit.data.sources import Source

CUTS = "cuts.jsonl"
WORK = ".work"
SCORES_VERSION = 3
"""Goes up when scores are computed otherwise, so that old shards are scored anew."""
_DAMAGE = (ValueError, KeyError, TypeError)  # what reading a damaged line gives
_KEPT = "kept-"  # folders in .work: the tars of interrupted runs


class Place(NamedTuple):
    """Where a clip's bytes lie."""

    path: Path
    offset: int


@dataclass(frozen=True)
class Cut:
    """What became of a source, and where its clips are."""

    result: CutResult
    places: Sequence[Place] = ()
    lasts: bool = True
    """Whether it will be the same the next time, as long as the source is."""

    @classmethod
    def in_spool(cls, result: CutResult, spool: Path) -> "Cut":
        """Clips that lie where a worker has put them."""
        return cls(result, [Place(spool, clip.offset) for clip in result.clips], lasts=result.fetched)

    def read(self) -> Iterator[tuple[Clip, bytes]]:
        """The clips and their bytes."""
        for clip, (path, offset) in zip(self.result.clips, self.places, strict=True):
            with open(path, "rb") as file:
                file.seek(offset)
                yield clip, file.read(clip.size)

    def without_bytes(self) -> "Cut":
        """The same with clips of no bytes."""
        return replace(self, result=replace(self.result, clips=[replace(clip, size=0) for clip in self.result.clips]))

    def is_sound(self) -> bool:
        """Whether all bytes are there."""
        try:
            return all(sha256_hex(data) == clip.sha256 for clip, data in self.read())
        except (OSError, ValueError):
            return False


def cut_key(source: Source, rules: CutRules) -> str:
    """A hash of all that a source's clips depend on, but for what is said of them."""
    said = {name: source.extra.get(name) for name in ("fps", "array")} if source.is_field else {}
    state = [source.name, source_bytes(source), source_version(source), source.span]
    how = asdict(replace(rules, encode=True))  # clips that were written will do where none are asked for
    return sha256_hex(json_bytes([state, said, how, av.__version__, SCORES_VERSION]))[:32]


def spool_file(work: Path, key: str) -> Path:
    """Where the clips of a source go first."""
    return work / f"{key}.mp4s"


def keep_result(spool: Path, result: CutResult) -> None:
    """Puts a source's result beside its spool; from then on an interruption doesn't cost it.

    Raises:
        OSError: if it cannot be written.
    """
    part = spool.with_suffix(f".json{PART}")
    part.write_bytes(_to_json(result))
    part.replace(spool.with_suffix(".json"))


def drop_spool(spool: Path) -> None:
    """Removes a spool and the result beside it, if they are there."""
    spool.with_suffix(".json").unlink(missing_ok=True)
    spool.unlink(missing_ok=True)


class CutLog:
    """Writes cuts.jsonl, under the name of a part; every line is with the system at once.

    Raises:
        OSError: if it cannot be written.
    """

    def __init__(self, out: Path) -> None:
        self._path = out / CUTS
        self._file = open(f"{self._path}{PART}", "wb", buffering=0)

    def add(self, key: str, result: CutResult, entries: Sequence[Entry]) -> None:
        """Notes a source whose clips are in the shards.

        Args:
            key: its `cut_key`.
            result: what became of it.
            entries: its clips.
        Raises:
            OSError: if the disk is full.
        """
        places = [(entry.shard, entry.members[clip.extension][0]) for clip, entry in zip(result.clips, entries)]
        line = json_bytes({"cut": key, "places": places})
        self._file.write(line[:-1] + b', "result": ' + _to_json(result) + b"}\n")

    def close(self) -> None:
        os.fsync(self._file.fileno())
        self._file.close()

    def publish(self) -> None:
        """Gives the closed file its name."""
        os.replace(f"{self._path}{PART}", self._path)


class EarlierCuts:
    """The sources of a run that earlier ones have cut: in the set that is there, and in what interrupted runs left.

    Tars of interrupted runs are moved into .work, where each goes when its last clip was taken: on the disk nothing
    lies twice but the clips of one tar for each interruption.

    Args:
        out: the folder that is written now.
        work: its folder for scraps, made if missing; what is of no use in it is removed.
        keys: of the run's sources.
        finished: the folder of a finished set, which may be another than `out`.
    Raises:
        OSError: if these cannot be read or written.
    """

    def __init__(self, out: Path, work: Path, keys: Iterable[str], finished: Path) -> None:
        work.mkdir(exist_ok=True)
        self._work, wanted = work, set(keys)
        self._lines: dict[str, tuple[Path, list[Path], int]] = {}  # the log, where its tars may lie, the line's offset
        self._left: Counter[Path] = Counter()  # clips of each kept tar that are still to be taken
        _keep_parts(out, work)
        kept = sorted(work.glob(f"{_KEPT}*"))
        for folder, tars in [*((folder, [folder, out]) for folder in kept), (finished, [finished])]:
            self._index(folder / CUTS, tars, wanted)
        for key in self._lines:
            self._left.update(self._kept(self._of_log(key).places))
        for tar in work.glob(f"{_KEPT}*/*.tar"):
            if not self._left[tar]:
                tar.unlink()
        self._spooled = {path.stem for path in work.glob("*.json")} & wanted - self._lines.keys()
        for path in work.iterdir():
            if path.is_file() and not (path.stem in self._spooled and path.suffix in (".json", ".mp4s")):
                path.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._lines or key in self._spooled

    def find(self, key: str) -> Cut | None:
        """What became of a source; None if that was not kept, or got damaged."""
        if key in self._lines:
            cut = self._of_log(key)
        elif key in self._spooled:
            spool = spool_file(self._work, key)
            try:
                cut = Cut.in_spool(_from_record(json.loads(spool.with_suffix(".json").read_bytes())), spool)
            except _DAMAGE:
                return None
        else:
            return None
        return cut if cut.is_sound() else None

    def release(self, key: str) -> None:
        """Says that a source's clips are in the new shards: a kept tar goes with its last one."""
        if key in self._lines:
            for path in self._kept(self._of_log(key).places):
                self._left[path] -= 1
                if not self._left[path]:
                    path.unlink(missing_ok=True)

    def _index(self, log: Path, tars: list[Path], wanted: set[str]) -> None:
        if not log.is_file():
            return
        with open(log, "rb") as file:
            offset = 0
            for line in file:
                try:
                    record = json.loads(line)
                    if record["cut"] in wanted:
                        _as_cut(record, tars)
                        self._lines[record["cut"]] = (log, tars, offset)
                except _DAMAGE:
                    pass  # such as the last line of a run that was killed while writing it
                offset += len(line)

    def _of_log(self, key: str) -> Cut:
        log, tars, offset = self._lines[key]
        with open(log, "rb") as file:
            file.seek(offset)
            return _as_cut(json.loads(file.readline()), tars)

    def _kept(self, places: Iterable[Place]) -> list[Path]:
        return [place.path for place in places if place.path.parent.parent == self._work]


def clear_scraps(out: Path) -> None:
    """Removes what an interrupted run has left in the folder of a complete set."""
    shutil.rmtree(out / WORK, ignore_errors=True)
    for path in [*out.glob(f"*.tar{PART}"), *(out / f"{name}{PART}" for name in (CUTS, INDEX, REJECTS))]:
        path.unlink(missing_ok=True)


def _keep_parts(out: Path, work: Path) -> None:
    """Moves the unfinished tars of an interrupted run, and what says what is in them, out of the way of a new run."""
    log = out / (CUTS + PART)
    if not log.is_file():
        return
    folder = work / f"{_KEPT}{len(list(work.glob(f'{_KEPT}*/{CUTS}'))):06d}"
    folder.mkdir(exist_ok=True)
    for tar in out.glob(f"*.tar{PART}"):
        os.replace(tar, folder / tar.name.removesuffix(PART))
    os.replace(log, folder / CUTS)  # last: without it the folder counts for nothing, and is filled again


def _to_json(result: CutResult) -> bytes:
    record = asdict(result)
    return json.dumps(record, sort_keys=True, default=lambda array: array.tolist()).encode()


def _as_cut(record: dict[str, Any], tars: list[Path]) -> Cut:
    """A line of the log; the tars are where the first of the folders has them."""
    places = []
    for name, offset in record["places"]:
        paths = [folder / Path(name).name for folder in tars]
        places.append(Place(next((path for path in paths if path.is_file()), paths[0]), int(offset)))
    return Cut(_from_record(record["result"]), places)


def _from_record(record: dict[str, Any]) -> CutResult:
    return CutResult(
        [_clip(clip) for clip in record["clips"]], [Dropped(**scene) for scene in record["dropped"]], record["problem"]
    )


def _clip(record: dict[str, Any]) -> Clip:
    scores, moments = record["scores"], record["moments"]
    return Clip(
        **record
        | {
            "bars": Bars(*record["bars"]),
            "scores": ClipScores(**scores) if scores else None,
            "moments": ChannelMoments(moments["count"], np.array(moments["mean"]), np.array(moments["squares"]))
            if moments
            else None,
        }
    )
