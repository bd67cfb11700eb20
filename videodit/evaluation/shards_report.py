"""The page of `videodit inspect`: the way from sources to clips, buckets, scores with their thresholds, the crops."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, NamedTuple

from videodit.data.filters import THRESHOLDS, FilterConfig, Stage
from videodit.data.shards import Entry
from videodit.evaluation.histogram import histogram
from videodit.evaluation.report_page import page, section, tile_row, video
from videodit.evaluation.report_tables import percent

SCORES = {  # score → what it is, with its unit
    "short_side": "Short side (pixels)",
    "duration_s": "Duration (s)",
    "brightness": "Brightness (mean luma, 0 to 1)",
    "sharpness": "Sharpness (variance of the Laplacian)",
    "motion": "Motion (optical flow, short sides a second)",
    "static": "Static (share of frames that repeat the one before)",
    "text_match": "Match (cosine of captions and frames)",
    "aesthetic": "Aesthetic score (of the model that was given)",
    "text_cover": "Text (share of the picture under titles, subtitles, logos)",
}


class BucketRow(NamedTuple):
    """A bucket, its clips, the mean share of a frame that crops cut away, and how many clips are enlarged."""

    name: str
    clips: int
    cut_away: float
    enlarged: int


class Crop(NamedTuple):
    """A clip as training sees it: an H.264 file and its caption, or no file and what went wrong."""

    bucket: str
    entry: Entry
    mp4: bytes
    caption: str


@dataclass(frozen=True)
class ShardsReport:
    """All that the page shows.

    Attributes:
        name: of the set.
        sources: files that ingest saw; 0 if the shards are from elsewhere.
        rejected: sources without a clip.
        entries: every clip, also those that filters left out.
        filters: the thresholds that were used.
        stages: what each of them left out.
        buckets: clips by bucket.
        too_short: clips that are shorter than every bucket.
        crops: clips as training sees them.
        left_out: clips that filters left out, with a preview.
        rejects: sources and scenes that gave no clip, as rejects.jsonl has them.
    """

    name: str
    sources: int
    rejected: int
    entries: Sequence[Entry]
    filters: FilterConfig
    stages: Mapping[str, Stage]
    buckets: Sequence[BucketRow]
    too_short: int
    crops: Sequence[Crop]
    left_out: Sequence[tuple[Entry, bytes]]
    rejects: Sequence[Mapping[str, Any]]

    @property
    def used(self) -> int:
        """Clips that filters leave in."""
        return sum(not entry.dropped for entry in self.entries)


def render_shards_report(report: ShardsReport) -> str:
    """The page as text."""
    hours = sum(_seconds(entry) for entry in report.entries if not entry.dropped) / 3600
    length = f"{hours:.1f}<small>h</small>" if hours >= 0.95 else f"{60 * hours:.1f}<small>min</small>"
    size = sum(size for entry in report.entries for _, size in entry.members.values())
    tiles = [
        ("Clips in use", f"{report.used:,}", f"of {len(report.entries):,} in the shards"),
        ("Length", length, "of the clips in use"),
    ]
    if report.sources:
        tiles.append(("Sources", f"{report.sources:,}", f"{report.rejected:,} of them gave no clip"))
    tiles.append(("Size", f"{size / 2**20:,.1f}<small>MiB</small>", "all clips"))
    sections = (_funnel(report), _buckets(report), _crops(report), _scores(report), _left_out(report), _rejects(report))
    return page("videodit shards", report.name, _lead(report), tile_row(tiles), sections)


def _lead(report: ShardsReport) -> str:
    out = len(report.entries) - report.used
    filtered = f"Filters leave {out:,} of {len(report.entries):,} clips out." if out else "No clip is filtered out."
    short = f" {report.too_short:,} more are shorter than every bucket." if report.too_short else ""
    return filtered + short


def _funnel(report: ShardsReport) -> str:
    left = len(report.entries)
    rows = [("clips cut", left, "")]
    for setting, stage in report.stages.items():
        left -= stage.clips
        rows.append((f"{setting} {getattr(report.filters, setting):g}", left, f"−{stage.clips:,}"))
    if report.too_short:
        rows.append(("long enough for a bucket", left - report.too_short, f"−{report.too_short:,}"))
    whole = max(1, len(report.entries))
    body = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        f'<td><span class="bar" style="--w:{100 * clips / whole:.1f}%"></span></td>'
        f"<td>{clips:,} {f'({lost})' if lost else ''}</td></tr>"
        for name, clips, lost in rows
    )
    table = f'<div class="card"><table class="stages"><tbody>{body}</tbody></table></div>'
    return section("What is left after each filter", "A clip counts for the first one that leaves it out.", table)


def _buckets(report: ShardsReport) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Bucket", "Clips", "Share", "Cut away", "Enlarged"))
    total = max(1, sum(row.clips for row in report.buckets))
    body = "".join(
        f'<tr><th scope="row">{row.name}</th><td>{row.clips:,}</td><td>{percent(row.clips / total)}</td>'
        f"<td>{percent(row.cut_away)}</td><td>{row.enlarged:,}</td></tr>"
        for row in report.buckets
    )
    table = f'<table class="measured"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    lead = (
        "Frames × height × width. Cut away: mean share of a clip's picture outside the crop. Enlarged: clips that are "
        "smaller than the bucket."
    )
    return section("Buckets", lead, f'<div class="card"><div class="scroll" tabindex="0">{table}</div></div>')


def _crops(report: ShardsReport) -> str:
    if not report.crops:
        return ""
    body = ""
    for bucket in dict.fromkeys(crop.bucket for crop in report.crops):
        cards = "".join(_crop(crop) for crop in report.crops if crop.bucket == bucket)
        body += f'<h3>{bucket}</h3><div class="clips">{cards}</div>'
    button = '<button id="pause" type="button" hidden>Pause clips</button>'
    return section("What training sees", "Clips drawn at random, with the very frames and crop.", body, button)


def _crop(crop: Crop) -> str:
    if not crop.mp4:
        mark = f'<span class="mark no">{escape(crop.caption)}</span>'
        return _card("", crop.entry.key, mark, crop.entry)
    return _card(video(crop.mp4, crop.caption), crop.caption or "(no caption)", "", crop.entry)


def _card(picture: str, text: str, marks: str, entry: Entry) -> str:
    source = str(entry.meta.get("source", entry.key))
    start = f" at {entry.meta['start_s']:.1f} s" if isinstance(entry.meta.get("start_s"), int | float) else ""
    below = f'<span class="marks">{marks}<small class="from">{escape(source + start)}</small></span>'
    return f'<figure class="card clip">{picture}<figcaption><span>{escape(text)}</span>{below}</figcaption></figure>'


def _scores(report: ShardsReport) -> str:
    cards = ""
    for score, label in SCORES.items():
        thresholds = [threshold for threshold in THRESHOLDS if threshold.score == score]
        values = [v for entry in report.entries if (v := thresholds[0].value(entry.meta)) is not None]
        if values:
            low = next((t.limit(report.filters) for t in thresholds if t.is_minimum), None)
            high = next((t.limit(report.filters) for t in thresholds if not t.is_minimum), None)
            cards += f'<div class="card">{histogram(values, label, low, high)}</div>'
    lead = "All clips in the shards. Dashed: the threshold; pale: what it leaves out."
    return section("Scores", lead, f'<div class="two">{cards}</div>') if cards else ""


def _left_out(report: ShardsReport) -> str:
    cards = "".join(
        _card(video(mp4, entry.key), entry.key, f'<span class="mark no wrap">{escape(entry.dropped)}</span>', entry)
        for entry, mp4 in report.left_out
    )
    lead = "Some for each reason, their first seconds."
    return section("Left out by filters", lead, f'<div class="clips">{cards}</div>') if cards else ""


def _rejects(report: ShardsReport) -> str:
    if not report.rejects:
        return ""
    counts = Counter(str(reject["reason"]) for reject in report.rejects)
    first = {str(reject["reason"]): str(reject["source"]) for reject in reversed(report.rejects)}
    items = "".join(
        f"<li>{escape(reason)}: {count:,}, such as {escape(first[reason])}</li>"
        for reason, count in counts.most_common(40)
    )
    return section("Sources and scenes without a clip", "", f'<ul class="notes">{items}</ul>')


def _seconds(entry: Entry) -> float:
    fps = float(entry.meta.get("fps") or 0)
    return float(entry.meta.get("num_frames", 0)) / fps if fps else 0.0
