"""`videodit inspect`: what a set of shards holds, what filters left out, and the very crops that training will see."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from videodit.config import from_dict
from videodit.data.batches import Request, clip_pixels
from videodit.data.buckets import Bucket
from videodit.data.clip_reader import ClipReader, DataConfig, measured_statistics
from videodit.data.field import preview
from videodit.data.filters import FilterConfig, mark
from videodit.data.ingest_record import read_record, read_rejects
from videodit.data.mp4 import encode_mp4
from videodit.data.randomness import sample_unit
from videodit.data.shards import Entry, ShardSet
from videodit.data.transforms import resize_and_crop
from videodit.data.video_io import read_frames
from videodit.errors import UserError, user_error
from videodit.evaluation.report_page import write_page
from videodit.evaluation.shards_report import BucketRow, Crop, ShardsReport, render_shards_report

SMALLEST = 160  # pixels of a clip's shorter side on the page: smaller ones are enlarged by whole factors
PREVIEW_FRAMES = 49  # of a clip that is left out


@dataclass(frozen=True)
class InspectConfig:
    """What to show of a set of shards."""

    data: DataConfig = field(default_factory=DataConfig)
    """Buckets, frame rate and crops, as in training; data.shards is the argument"""
    like: str | None = None
    """Config of a train vae run, or its run folder: data.* and seed are taken from it"""
    seed: int = 0
    """Of the run that is looked at: crops follow it"""
    epoch: int = 0
    """Which epoch's crops to show, from 0"""
    clips: int = 48
    """Crops on the page, over all buckets"""
    out: str | None = None
    """Page to write; by default inspect.html in the folder of shards"""

    def __post_init__(self) -> None:
        if self.clips < 0 or self.epoch < 0:
            raise ValueError(f"clips {self.clips} and epoch {self.epoch} must be 0 or more")


def inspect_shards(root: str, config: InspectConfig) -> Path:
    """Prints a set's buckets and what filters left out, and writes a page with the crops.

    Args:
        root: the folder of shards.
        config: what to show.
    Returns:
        The page.
    Raises:
        UserError: if there are no shards, no clip fits a bucket, or the page cannot be written.
    """
    config = _follow(config)
    everything = ShardSet.open(root, dropped=True)
    used = ShardSet.open(root)
    data = from_dict(DataConfig, {**vars(config.data), "shards": root, "weights": [], "cache_decoded": False})
    reader = ClipReader(used, data, config.seed, data.random_crop, measured_statistics(used))
    grouping = reader.group(multiple=1)
    record = read_record(Path(root)) or {}
    filters = from_dict(FilterConfig, record.get("filters") or {}, "ingest.json")
    _, stages = mark(everything.entries, filters)
    report = ShardsReport(
        name=Path(root).resolve().parent.name + "/" + Path(root).resolve().name,
        sources=record.get("accepted", 0) + record.get("rejected", 0),
        rejected=record.get("rejected", 0),
        entries=everything.entries,
        filters=filters,
        stages=stages,
        buckets=[_row(bucket, members, reader) for bucket, members in grouping.members.items()],
        too_short=len(grouping.dropped),
        crops=_crops(reader, grouping.members, config),
        left_out=_left_out(everything, config.clips // 4),
        rejects=[reject for reject in read_rejects(Path(root)) if "key" not in reject],
    )
    _print(report)
    path = Path(config.out or Path(root) / "inspect.html")
    try:
        write_page(path, render_shards_report(report))
    except OSError as error:
        raise user_error(error, path) from error
    return path


def _follow(config: InspectConfig) -> InspectConfig:
    """With the data settings of another run."""
    if config.like is None:
        return config
    path = Path(config.like) / "config.yaml" if Path(config.like).is_dir() else Path(config.like)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"like {config.like} is no config of a run ({error}): give its YAML or its folder") from error
    data = values.get("data", {}) if isinstance(values, dict) else None
    if not isinstance(data, dict) or "caption_drop" in data:
        raise UserError(f"like {config.like} is no config of a train vae run: only those cut clips")
    chosen = {**vars(config), "like": None, "data": data, "seed": values.get("seed", 0)}
    return from_dict(InspectConfig, chosen, str(path))


def _row(bucket: Bucket, members: list[int], reader: ClipReader) -> BucketRow:
    """How well clips fit a bucket: share of their pixels that crops cut away, and how many are enlarged."""
    metas = [reader.shards.entries[i].meta for i in members]
    sizes = [(meta.get("height") or 1, meta.get("width") or 1) for meta in metas]
    # Fields are cropped as they are.
    scales = [1.0 if reader.statistics else max(bucket.height / h, bucket.width / w) for h, w in sizes]
    cut = [1 - bucket.height * bucket.width / (h * w * scale**2) for (h, w), scale in zip(sizes, scales)]
    enlarged = sum(scale > 1.001 for scale in scales)
    return BucketRow(bucket.name, len(members), sum(cut) / len(cut) if cut else 0.0, enlarged)


def _crops(reader: ClipReader, members: Mapping[Bucket, list[int]], config: InspectConfig) -> list[Crop]:
    """As many clips of each bucket, or one more, drawn by the seed, as the loader cuts them in that epoch."""
    filled = {bucket: clips for bucket, clips in members.items() if clips}
    entries, crops = reader.shards.entries, []
    for place, (bucket, clips) in enumerate(filled.items()):
        drawn = sorted(clips, key=lambda i: sample_unit(config.seed, config.epoch, entries[i].key, "inspect"))
        for index in drawn[: (config.clips + len(filled) - 1 - place) // len(filled)]:
            rows = reader[Request(bucket, (config.epoch,), (index,))]
            if rows.failures:
                crops.append(Crop(bucket.name, entries[index], b"", rows.failures[0]))
                continue
            fps = _rate(entries[index], reader.config.fps)
            shown = preview(clip_pixels(rows.tensors["clip"])[0].numpy())
            crops.append(Crop(bucket.name, entries[index], _mp4(shown, fps), rows.captions[0]))
    return crops


def _rate(entry: Entry, wanted: float | None) -> float:
    return wanted or float(entry.meta.get("fps") or 8)


def _mp4(frames: Any, fps: float) -> bytes:
    factor = max(1, SMALLEST // min(frames.shape[1:3]))
    return encode_mp4(frames.repeat(factor, axis=1).repeat(factor, axis=2), fps)


def _left_out(shards: ShardSet, most: int) -> list[tuple[Entry, bytes]]:
    """Clips that filters left out, a few for each reason: their first seconds, small."""
    chosen: list[tuple[Entry, bytes]] = []
    seen: Counter[str] = Counter()
    for index, entry in enumerate(shards.entries):
        kind = entry.dropped.split(" ", 1)[0]
        if not entry.dropped or seen[kind] >= 4 or len(chosen) >= most or "mp4" not in entry.members:
            continue
        seen[kind] += 1
        frames = read_frames(shards.read(index, "mp4"), 0, min(int(entry.meta["num_frames"]), PREVIEW_FRAMES))
        height, width = frames.shape[1:3]
        scale = min(1.0, SMALLEST / min(height, width))
        size = max(2, round(height * scale)), max(2, round(width * scale))
        chosen.append((entry, _mp4(resize_and_crop(frames, *size, rng=None), _rate(entry, None))))
    return chosen


def _print(report: ShardsReport) -> None:
    console = Console()
    table = Table("bucket", "clips", "share", "cut away", "enlarged", title=escape(report.name))
    for row in report.buckets:
        share = row.clips / max(1, report.used)
        table.add_row(row.name, f"{row.clips:,}", f"{share:.0%}", f"{row.cut_away:.0%}", f"{row.enlarged:,}")
    console.print(table)
    for setting, stage in report.stages.items():
        console.print(f"{setting} leaves out {stage.clips:,}, such as {stage.example}", soft_wrap=True, highlight=False)
    if report.too_short:
        console.print(f"{report.too_short:,} clips are shorter than every bucket")
