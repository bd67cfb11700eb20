"""Raw videos to shards: decode check, scene cuts, scores, filters, tars, index; what did not make it is listed."""

import dataclasses
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import av

from videodit.data.clip_cutter import CutRules
from videodit.data.filters import FilterConfig, Stage, mark
from videodit.data.folder_lock import FolderLock
from videodit.data.index_file import prepare
from videodit.data.ingest_cuts import CUTS, SCORES_VERSION, WORK, CutLog, EarlierCuts, clear_scraps, cut_key, spool_file
from videodit.data.ingest_jobs import cut_job, cut_sources, remove_scraps
from videodit.data.ingest_output import ChannelTally, key_bases, write_clips, write_filtered, write_lines, write_rejects
from videodit.data.ingest_record import (
    RECORD,
    REJECTS,
    earlier_run,
    fingerprint,
    read_rejects,
    reject_reasons,
    write_json,
)
from videodit.data.isolation import run_isolated
from videodit.data.models_config import SCORES, ModelsConfig
from videodit.data.shard_writer import ShardWriter, rewrite_index
from videodit.data.shards import INDEX, PART, Entry, ShardSet
from videodit.data.sources import Source, list_sources
from videodit.data.storage import is_remote, plain
from videodit.errors import UserError, user_error
from videodit.progress import counted


@dataclass(frozen=True)
class IngestConfig:
    """How raw videos become clips in shards."""

    min_frames: int = 17
    """Scenes with fewer frames are dropped; 17 is the shortest clip of the demo's models."""
    max_duration_s: float = 10.0
    """Longer scenes are cut into clips of this many seconds."""
    max_short_side: int = 480
    """Clips whose shorter side has more pixels are scaled down to it; 0 keeps the size."""
    scene_cuts: bool = True
    """Whether to cut at scene changes; without it, a clip may hold a cut."""
    cut_threshold: float = 3.0
    """How many times a frame's change must exceed its neighbours' to be a cut; higher finds fewer."""
    images: bool = False
    """Take pictures too, as clips of one frame"""
    crop_bars: bool = False
    """Cut black bars off (letterbox and pillarbox), where all of a source has them"""
    crf: int = 18
    """x264's constant rate factor of the clips: 0 to 51, lower is better and larger."""
    clips_per_shard: int = 1000
    """Clips in one tar."""
    workers: int = 0
    """Processes that decode; 0 takes one per core. The result does not depend on it."""
    stall_limit_s: float = 60.0
    """A file that yields no frame for so many seconds is given up, after a second try with nothing beside it."""
    time_limit_s: float = 86400.0
    """A file that takes longer is given up; 0 for no limit."""
    max_source_frames: int = 5_000_000
    """A file with more frames is rejected (two days at 30 a second); 0 for no limit."""
    max_memory_gb: float = 8.0
    """Address space of a decoding process; a file that needs more is rejected; 0 for no limit."""
    models: ModelsConfig = field(default_factory=ModelsConfig)
    """Models that score and caption the clips; changed later, nothing is decoded or cut again"""
    filters: FilterConfig = field(default_factory=FilterConfig)
    """Which clips training sees; changed later, nothing is decoded again"""
    dry_run: bool = False
    """Say what would be left out and why, and write nothing"""

    def __post_init__(self) -> None:
        for name, low in (
            ("min_frames", 1),
            ("max_short_side", 0),
            ("clips_per_shard", 1),
            ("workers", 0),
            ("max_memory_gb", 0),
            ("time_limit_s", 0),
            ("max_source_frames", 0),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}: at least {low} is needed")
        for name in ("max_duration_s", "cut_threshold", "stall_limit_s"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)}: more than 0 is needed")
        if not 0 <= self.crf <= 51:
            raise ValueError(f"crf is {self.crf}: 0 (best) to 51 (smallest) is possible")
        for name in ("match", "aesthetic"):
            if getattr(self.filters, f"min_{name}") is not None and not getattr(self.models, name):
                raise ValueError(f"filters.min_{name} is set without a model: give --models.{name} FOLDER")
        if 0 < self.max_short_side < 16:
            raise ValueError(f"max_short_side is {self.max_short_side}: 0 (keep the size) or at least 16 is needed")

    def result_fields(self) -> dict[str, Any]:
        """The fields that the shards depend on."""
        limits = ("stall_limit_s", "time_limit_s", "max_source_frames", "max_memory_gb")
        others = (*limits, "workers", "models", "filters", "dry_run")
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in others}


@dataclass(frozen=True)
class IngestResult:
    """What ingest did."""

    accepted: int
    """Sources with at least one clip."""
    rejected: int
    """Sources without any."""
    clips: int
    """Clips that training sees."""
    filtered: dict[str, Stage]
    """What each setting of the filters left out, by its name."""
    seconds: float
    """Wall time."""
    reasons: dict[str, int] = field(default_factory=dict)
    """How often each reason is given for a source or scene that no filter left out, the most frequent first."""
    uncaptioned: list[str] = field(default_factory=list)
    """Sources that have only their file's name for a caption."""
    up_to_date: bool = False
    """The shards were there already, made of the same sources with the same config."""


def ingest(
    src: str | Path,
    out: str | Path,
    config: IngestConfig | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> IngestResult:
    """Makes shards of raw videos.

    The same sources and config give the same bytes, however many workers and interruptions there were. Shards hold
    every clip; those that the filters leave out are marked in the index, so that the same command with other filters
    only writes the index again; models look at the finished clips, and what they say goes into the index.

    Writes OUT/shard-*.tar, index.jsonl, rejects.jsonl (a line for each source, scene and clip left out, with the
    reason) and ingest.json (config, counts).

    Args:
        src: a folder of videos and fields, a .csv or .jsonl table or one file, on this machine or, as an address that
            fsspec knows, elsewhere; see `sources.list_sources`.
        out: folder of the shards, on this machine; made if missing, left out of the search if it lies below src.
        config: how.
        progress: called as progress(sources done, all sources).
    Returns:
        Counts.
    Raises:
        UserError: if there is nothing to ingest, nothing was accepted, or `out` cannot be written or holds something
            else.
    """
    started = time.monotonic()
    config = config or IngestConfig()
    if is_remote(out):
        raise UserError(f"--out {out} is no folder of this machine: write there, then copy the folder")
    src, out = plain(src), Path(plain(out))
    if not is_remote(src) and Path(src).resolve() == out.resolve():
        raise UserError(f"--out {out} is the source itself: choose another folder")
    sources = list_sources(src, exclude=[out], images=config.images)
    record = {
        "config": config.result_fields(),
        "sources_sha256": fingerprint(sources),
        "av": av.__version__,
        "scores": SCORES_VERSION,
    }
    filters, models = dataclasses.asdict(config.filters), config.models.record()
    marks: dict[str, Any] = {"filters": filters} | ({"models": models} if models else {})
    progress = progress or (lambda done, total: None)
    work = partial(_run, sources, config=config, record=record, finished=out, progress=progress)
    marked = partial(_marked, config=config, models=models, progress=progress)
    named = [] if not config.models.reads_captions else [s.name for s in sources if not (s.captioned or s.problem)]
    try:
        if config.dry_run:
            counts, filtered, reasons = _rehearse(out, record, sources, work, marked)
            return _result(counts, filtered, started, reasons, named)
        with FolderLock(out, "--out") as lock:
            lock.hold_alone()
            earlier = earlier_run(out, record, sources)
            up_to_date = earlier is not None and all(earlier.get(k) == marks.get(k) for k in ("filters", "models"))
            if not earlier:
                if not (out / RECORD).exists():
                    write_json(out / RECORD, record | {"complete": False})
                counts, filtered = work(out)
                if models and (counts["clips"] or filtered):
                    # From here on an interruption costs what models have still to do, and no decoding.
                    earlier = record | counts | {"complete": True}
                    write_json(out / RECORD, earlier)
            if earlier:
                counts, filtered = _mark_again(out, earlier, marked)
            if not counts["clips"] and not filtered:
                first = read_rejects(out)[0]
                raise UserError(
                    f"none of the {counted(len(sources), 'video')} of {src} gave a clip, {first['source']} for one: "
                    f"{first['reason']}; see {out / REJECTS} for the rest"
                )
            prepare(out / INDEX)
            write_json(out / RECORD, record | counts | marks | {"complete": True})
            clear_scraps(out)  # of an interrupted run with other sources
            if not counts["clips"]:
                most = max(filtered, key=lambda setting: filtered[setting].clips)
                raise UserError(
                    f"filters leave out every clip, filters.{most} most of them ({filtered[most].example}): loosen it "
                    "and run the same command again"
                )
    except OSError as error:
        raise user_error(error, error.filename or out) from error
    return _result(counts, filtered, started, reject_reasons(out), named, up_to_date)


Progress = Callable[[int, int], None]
Marked = Callable[[Path], tuple[list[Entry], dict[str, Stage]]]
# Sources accepted and rejected, clips, statistics of channels, as ingest.json has them; and what filters left out.
Outcome = tuple[dict[str, Any], dict[str, Stage]]


def _result(
    counts: dict[str, Any],
    filtered: dict[str, Stage],
    started: float,
    reasons: dict[str, int],
    named: list[str],
    up_to_date: bool = False,
) -> IngestResult:
    done = counts["accepted"], counts["rejected"], counts["clips"]
    return IngestResult(*done, filtered, time.monotonic() - started, reasons, named, up_to_date)


def _rehearse(
    out: Path, record: dict[str, Any], sources: list[Source], work: Callable[[Path], Outcome], marked: Marked
) -> tuple[dict[str, Any], dict[str, Stage], dict[str, int]]:
    """What ingest would do: told from the scores where they are there already, else done and thrown away."""
    earlier = earlier_run(out, record, sources) if out.is_dir() else None
    if earlier:
        entries, filtered = marked(out)
        return earlier | {"clips": _used(entries)}, filtered, reject_reasons(out)
    beside = next(folder for folder in out.absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix=".videodit-dry-run-", dir=beside) as folder:
        counts, filtered = work(Path(folder))
        if counts["clips"] or filtered:
            entries, filtered = marked(Path(folder))
            counts["clips"] = _used(entries)
        return counts, filtered, reject_reasons(Path(folder))


def _marked(
    out: Path, config: IngestConfig, models: dict[str, Any], progress: Progress
) -> tuple[list[Entry], dict[str, Stage]]:
    """The entries of a complete set, with models' scores and captions and the filters' verdicts."""
    entries = ShardSet.open(out, dropped=True).entries
    if models or any(entry.captions or SCORES & entry.meta.keys() for entry in entries):
        from videodit.data.model_scores import apply_models  # it needs torch, which few runs do

        entries = apply_models(out, entries, config.models, models, progress, keep=not config.dry_run)
    return mark(entries, config.filters)


def _mark_again(out: Path, earlier: dict[str, Any], marked: Marked) -> Outcome:
    entries, filtered = marked(out)
    before = [reject for reject in read_rejects(out) if "key" not in reject]  # what no filter decided
    with open(out / (REJECTS + PART), "w", encoding="utf-8") as rejects:
        write_lines(rejects, before)
        write_filtered(rejects, entries)
    rewrite_index(out, entries)
    os.replace(out / (REJECTS + PART), out / REJECTS)
    kept = {name: earlier[name] for name in ("accepted", "rejected", "channels", "not_fetched") if name in earlier}
    return kept | {"clips": _used(entries)}, filtered


def _run(
    sources: list[Source],
    out: Path,
    *,
    config: IngestConfig,
    record: dict[str, Any],
    finished: Path,
    progress: Progress,
) -> Outcome:
    work = out / WORK
    encode = not config.dry_run or bool(config.models.record())  # models look at clips
    settings = dataclasses.asdict(config) | {"encode": encode}
    rules = CutRules(**{field.name: settings[field.name] for field in dataclasses.fields(CutRules)})
    keys = [cut_key(source, rules) for source in sources]
    earlier = EarlierCuts(out, work, keys, finished)
    isolated = partial(
        run_isolated,
        partial(cut_job, rules=rules, max_frames=config.max_source_frames),
        workers=config.workers or _cores(),
        stall_limit_s=config.stall_limit_s,
        time_limit_s=config.time_limit_s,
        max_memory_gb=config.max_memory_gb,
    )
    cuts = cut_sources(sources, keys, earlier, work, isolated)
    counts = {"accepted": 0, "rejected": 0}
    not_fetched = 0
    channels = ChannelTally()
    writer, log = ShardWriter(out, config.clips_per_shard), CutLog(out)
    with open(out / (REJECTS + PART), "w", encoding="utf-8") as rejects:
        for done, (source, key, base, cut) in enumerate(zip(sources, keys, key_bases(sources), cuts, strict=True), 1):
            cut = channels.take(source, cut if encode else cut.without_bytes())
            entries = write_clips(writer, source, base, cut)
            write_rejects(rejects, source, cut.result)
            if cut.lasts:
                writer.flush()  # the log is not to know of what a killed process had still to write
                log.add(key, cut.result, entries)
            earlier.release(key)
            remove_scraps(source, spool_file(work, key))
            counts["accepted" if cut.result.clips else "rejected"] += 1
            not_fetched += not cut.result.fetched
            progress(done, len(sources))
        writer.entries, filtered = mark(writer.entries, config.filters)
        write_filtered(rejects, writer.entries)
    log.close()
    if not writer.entries and (out / INDEX).is_file():
        raise UserError(
            f"none of the {counted(len(sources), 'video')} gave a clip, the shards in {out} stay as they are: see "
            f"{out / (REJECTS + PART)} for the reasons"
        )
    # From here to the end an interruption costs the earlier set, and nothing that was cut.
    write_json(out / RECORD, record | {"complete": False})
    (out / CUTS).unlink(missing_ok=True)
    writer.close()
    os.replace(out / (REJECTS + PART), out / REJECTS)
    log.publish()
    shutil.rmtree(work)
    if not_fetched:
        counts["not_fetched"] = not_fetched
    return counts | channels.record() | {"clips": _used(writer.entries)}, filtered


def _used(entries: Sequence[Entry]) -> int:
    return sum(not entry.dropped for entry in entries)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
