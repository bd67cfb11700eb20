"""What ingest costs on one core, beside the least that it has to do.

    python benchmarks/ingest_speed.py --videos ../shared/videos --out benchmarks/results/ingest_speed.json

For every video that decodes, in turn, --rounds times, medians of frames a second: libavcodec alone; with the detection
of scene cuts (and the conversion to the shards' size and colours that comes before it); decoding, scaling and x264 at
ingest's preset and crf; and ingest's whole work on a file (`cut_source`: bars, cuts, scores, x264, sha256). One thread
each, seconds of CPU. "together" is all frames by all seconds.
"""

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import av
import cv2
from rich.console import Console
from rich.table import Table

from videodit.data.clip_cutter import CutRules, cut_source
from videodit.data.frame_convert import ToShardFormat
from videodit.data.scene_cuts import find_cuts
from videodit.data.video_io import KEYFRAME_EVERY, VideoError, open_decoded, probe
from videodit.evaluation.machine import machine_facts

RULES = CutRules(17, 10.0, 480, True, 3.0, 18, crop_bars=True)


def decode(path: Path) -> int:
    """Frames of a file, decoded and thrown away."""
    with av.open(str(path)) as container:
        return sum(1 for _ in container.decode(one_thread(container)))


def one_thread(container: av.container.InputContainer) -> Any:
    """The stream that ingest takes."""
    stream: Any = container.streams.best("video")
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1
    return stream


def decode_and_find_cuts(path: Path) -> int:
    """The cut pass."""
    with open_decoded(path) as (info, frames):
        convert = ToShardFormat(RULES.size(info))
        count = 0

        def counted() -> Any:
            nonlocal count
            for frame in frames:
                count += 1
                yield convert(frame)

        find_cuts(counted(), info.fps)
        return count


@cache
def coded_size(path: Path) -> tuple[int, int]:
    """(height, width) that ingest scales to, before it turns the picture."""
    info = probe(path)
    size = RULES.size(info)
    return size[::-1] if info.rotation % 180 else size


def transcode(path: Path) -> int:
    """Decoding, scaling to ingest's size and x264 as ingest sets it, without RGB."""
    height, width = coded_size(path)
    options = {"preset": "veryfast", "crf": str(RULES.crf), "bf": "0", "g": str(KEYFRAME_EVERY), "mbtree": "0"}
    with av.open(str(path)) as container, av.open(io.BytesIO(), "w", format="mp4") as out:
        source = one_thread(container)
        stream = out.add_stream("libx264", rate=source.average_rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width - width % 2, height - height % 2, "yuv420p"
        stream.codec_context.thread_count = 1
        count = 0
        for frame in container.decode(source):
            scaled = frame.reformat(width=stream.width, height=stream.height, format="yuv420p", threads=1)
            scaled.pts, scaled.time_base = count, 1 / source.average_rate
            out.mux(stream.encode(scaled))
            count += 1
        out.mux(stream.encode(None))
        return count


def whole_ingest(path: Path) -> int:
    """All that ingest does with one file."""
    with tempfile.TemporaryDirectory() as folder:
        result = cut_source(str(path), Path(folder) / "spool", RULES)
        return sum(part.num_frames for part in [*result.clips, *result.dropped])


PASSES: dict[str, Callable[[Path], int]] = {
    "decode": decode,
    "decode + cuts": decode_and_find_cuts,
    "decode + x264": transcode,
    "ingest": whole_ingest,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/ingest_speed.json"))
    options = parser.parse_args()
    cv2.setNumThreads(1)
    table = Table("video", *PASSES, "cuts / decode", "ingest / x264")
    rows: dict[str, dict[str, float]] = {}
    total, all_seconds = 0, dict.fromkeys(PASSES, 0.0)

    def add_row(name: str, row: dict[str, float]) -> None:
        shares = (row["decode + cuts"] / row["decode"], row["ingest"] / row["decode + x264"])
        table.add_row(name, *(f"{value:.0f}" for value in row.values()), *(f"{share:.2f}" for share in shares))
        rows[name] = row

    for path in sorted(options.videos.iterdir()):
        try:
            decode(path)
        except (av.FFmpegError, VideoError, IndexError):
            continue
        seconds: dict[str, list[float]] = {name: [] for name in PASSES}
        for _ in range(options.rounds):
            for name, function in PASSES.items():
                started = time.process_time()
                frames = function(path)
                seconds[name].append((time.process_time() - started) / frames)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        add_row(path.name, {name: 1 / median for name, median in medians.items()})
        total += frames
        all_seconds = {name: all_seconds[name] + frames * median for name, median in medians.items()}
    add_row("together", {name: total / value for name, value in all_seconds.items()})
    Console().print(table)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"machine": machine_facts(), "frames_per_s": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
