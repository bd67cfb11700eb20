"""What ingest writes: clips with what is known of them, and a line for each source, scene or clip that is left out."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from videodit.data.channel_statistics import ChannelMoments, ChannelStatistics
from videodit.data.clip_cutter import CutResult
from videodit.data.ingest_cuts import Cut
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import Entry, json_bytes, sha256_hex
from videodit.data.sources import Source
from videodit.data.storable import printable

_PLACE = ("source", "start_s", "end_s")


def write_clips(writer: ShardWriter, source: Source, base: str, cut: Cut) -> list[Entry]:
    """A source's clips as samples BASE-0000 and so on."""
    written = []
    for scene, (clip, data) in enumerate(cut.read()):
        record = source.captions.record() | {
            "source": source.name,
            "num_frames": clip.num_frames,
            "height": clip.height,
            "width": clip.width,
            "sha256": clip.sha256,
        }
        if clip.scores:
            record |= clip.scores.record()
        if clip.moments:
            record["channels"] = len(clip.moments.mean)
        if clip.fps:
            record["fps"] = clip.fps
            record["start_s"] = round(clip.start_frame / clip.fps, 6)
            record["end_s"] = round((clip.start_frame + clip.num_frames) / clip.fps, 6)
        if any(clip.bars):
            record["bars"] = clip.bars._asdict()
        if source.extra:
            record["extra"] = source.extra
        written.append(writer.write(f"{base}-{scene:04d}", {clip.extension: data, "json": json_bytes(record)}))
    return written


class ChannelTally:
    """Sums up the channels of a set's fields, source by source; all fields of a set have as many channels."""

    def __init__(self) -> None:
        self._moments: ChannelMoments | None = None
        self._first = ""

    def take(self, source: Source, cut: Cut) -> Cut:
        """What is to be written of a source: nothing if it has another number of channels than those before."""
        moments = [clip.moments for clip in cut.result.clips if clip.moments]
        if moments and self._moments and len(moments[0].mean) != len(self._moments.mean):
            reason = f"{len(moments[0].mean)} channels, but {self._first} has {len(self._moments.mean)}"
            problem = f"{reason}: all fields of a set have as many; give it a folder of its own"
            return Cut(CutResult(problem=problem), lasts=False)
        for of_clip in moments:
            self._first = self._first or source.name
            self._moments = self._moments + of_clip if self._moments else of_clip
        return cut

    def record(self) -> dict[str, Any]:
        """For ingest.json: statistics of all fields in the shards; nothing where there are none."""
        return {"channels": asdict(ChannelStatistics.from_moments(self._moments))} if self._moments else {}


def write_rejects(file: TextIO, source: Source, result: CutResult) -> None:
    """What of a source gave no clip: all of it, or scenes."""
    lines: list[dict[str, Any]] = (
        [{"source": source.name, "reason": printable(result.problem)}] if result.problem else []
    )
    for scene in result.dropped:
        start_s, end_s = scene.start_frame / scene.fps, (scene.start_frame + scene.num_frames) / scene.fps
        lines.append(
            {"source": source.name, "start_s": round(start_s, 6), "end_s": round(end_s, 6), "reason": scene.reason}
        )
    write_lines(file, lines)


def write_lines(file: TextIO, lines: Iterable[dict[str, Any]]) -> None:
    """JSON, one line each."""
    for line in lines:
        file.write(json_bytes(line).decode() + "\n")


def write_filtered(file: TextIO, entries: Sequence[Entry]) -> None:
    """The clips that filters left out."""
    for entry in entries:
        if entry.dropped:
            place: dict[str, Any] = {name: entry.meta[name] for name in _PLACE if name in entry.meta}
            write_lines(file, [{"key": entry.key, **place, "reason": entry.dropped}])


def key_bases(sources: list[Source]) -> list[str]:
    """A key for each source: its name in plain characters, with a hash where two would be alike or one too long."""
    bases = [re.sub(r"[^A-Za-z0-9_-]+", "_", str(Path(source.name).with_suffix(""))) for source in sources]
    count = Counter(base.lower() for base in bases)
    plain = [base if count[base.lower()] == 1 and len(base) <= 60 else "" for base in bases]
    return [
        whole or f"{base[:60]}-{sha256_hex(source.name.encode())[:8]}"
        for whole, base, source in zip(plain, bases, sources, strict=True)
    ]
