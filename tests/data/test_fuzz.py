"""Damaged files of many kinds through ingest: each costs a line in rejects.jsonl at most; nothing hangs, dies or leaks.

pytest tests/data/test_fuzz.py -m slow      1,000 files
"""

import io
import multiprocessing
import os
import tempfile
from pathlib import Path

import av
import numpy as np
import pytest

from tests.data.test_scores import moving
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.ingest_record import read_rejects
from videodit.data.shards import ShardSet
from videodit.data.video_io import read_frames
from videodit.errors import UserError

KINDS = {  # file suffix → codec, container, pixel format
    ".mp4": ("libx264", "mp4", "yuv420p"),
    ".mov": ("mpeg4", "mov", "yuv420p"),
    ".mkv": ("libx265", "matroska", "yuv420p10le"),
    ".webm": ("libvpx-vp9", "webm", "yuv420p"),
    ".avi": ("mjpeg", "avi", "yuvj420p"),
    ".gif": ("gif", "gif", "rgb8"),
    ".ts": ("mpeg2video", "mpegts", "yuv420p"),
}
REAL_BYTES = 150_000  # of a real clip's beginning


def originals(real: Path | None) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of small videos in several codecs and containers, and the beginnings of the real clips."""
    files = []
    for suffix, (codec, container, pix_fmt) in KINDS.items():
        buffer = io.BytesIO()
        with av.open(buffer, "w", format=container) as out:
            options = {"x265-params": "log-level=none"} if codec == "libx265" else {}
            stream = out.add_stream(codec, rate=8, options=options)
            stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
            for frame in moving(1, 2, height=48, width=64):
                out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(format=pix_fmt)))
            out.mux(stream.encode(None))
        files.append((suffix, buffer.getvalue()))
    if real is not None:
        files += [
            (p.suffix, p.read_bytes()[:REAL_BYTES])
            for p in sorted(real.iterdir())
            if p.suffix in (".mp4", ".avi", ".mkv")
        ]
    return files


def mutate(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four accidents, half near the head: bits flipped, stretches overwritten, removed, repeated, a cut."""
    out = bytearray(data)
    for _ in range(rng.integers(1, 5)):
        if len(out) < 2:
            break
        reach = min(len(out), 600) if rng.random() < 0.5 else len(out)
        start = int(rng.integers(reach))
        stop = min(len(out), start + int(rng.geometric(1 / 40)))
        kind = rng.integers(6)
        if kind == 0:
            for place in rng.integers(reach, size=rng.integers(1, 16)):
                out[place] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            out[start:stop] = rng.bytes(stop - start)
        elif kind == 2:
            del out[start:stop]
        elif kind == 3:
            out[start:start] = out[start:stop]
        elif kind == 4:
            out[start:stop] = bytes(stop - start)
        else:
            del out[max(start, 1) :]
    return bytes(out)


def holdings(pid: int) -> tuple[float, int]:
    """(MiB of memory, open files) of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, len(os.listdir(f"/proc/{pid}/fd"))


def assert_damage_costs_a_line_each(folder: Path, count: int, real: Path | None, seed: int) -> None:
    """The second half of the files is the first once more, so that what the processes hold can be compared."""
    rng = np.random.default_rng(seed)
    files = originals(real)
    (folder / "videos").mkdir()
    for number in range(count // 2):
        suffix, data = files[number % len(files)]
        data = mutate(data, rng)
        for half in (0, count // 2):
            (folder / "videos" / f"{half + number:05d}{suffix}").write_bytes(data)
    held: dict[int, dict[int, tuple[float, int]]] = {}

    def look(done: int, total: int) -> None:
        if done in (count // 2, count):
            processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)]
            held[done] = {pid: holdings(pid) for pid in processes}

    scraps = set(os.listdir(tempfile.gettempdir()))
    config = IngestConfig(workers=2, min_frames=2, crop_bars=True, stall_limit_s=20, max_memory_gb=4)
    result = ingest(folder / "videos", folder / "out", config, progress=look)
    assert result.accepted + result.rejected == count
    shards = ShardSet.open(folder / "out")
    accepted = {entry.meta["source"] for entry in shards.entries}
    listed = {reject["source"] for reject in read_rejects(folder / "out")}
    assert len(accepted) == result.accepted > count // 20  # what can be read is read
    assert len(listed - accepted) == result.rejected > count // 20  # and damage is found: no file is lost unseen
    for index, entry in enumerate(shards.entries):
        frames = read_frames(shards.read(index, "mp4"))
        assert frames.shape == (entry.meta["num_frames"], entry.meta["height"], entry.meta["width"], 3)
    reasons = [reject["reason"] for reject in read_rejects(folder / "out")]
    bad = ("Error:", "no progress", "took longer", "decoding crashed", "decoding ended", "needs more than")
    assert not [reason for reason in reasons if any(text in reason for text in bad)]  # every one in words of its own
    print(f"{count} files: {result.accepted} accepted, {result.rejected} rejected, {result.seconds:.0f} s")
    print("\n".join(sorted({reason.split(",")[0] for reason in reasons})))

    halfway, end = held[count // 2], held[count]
    assert halfway.keys() == end.keys() and len(end) == 3  # this process and both workers: none was replaced
    main = os.getpid()
    for name, pids in (("main process", {main}), ("workers", end.keys() - {main})):
        memory, files_open = ([max(half[pid][i] for pid in pids) for half in (halfway, end)] for i in (0, 1))
        print(f"{name}: at most {memory[0]:.0f} MiB, then {memory[1]:.0f}; {files_open[0]} files, then {files_open[1]}")
        assert memory[1] < memory[0] + 50 and files_open[1] <= files_open[0] + 1
    assert not multiprocessing.active_children()
    left = {path.name.split("-0")[0] for path in (folder / "out").iterdir()}
    assert left == {"shard", "index.jsonl", "rejects.jsonl", "cuts.jsonl", "ingest.json", ".lock"}
    assert set(os.listdir(tempfile.gettempdir())) == scraps


def test_eighty_damaged_files(tmp_path: Path) -> None:
    assert_damage_costs_a_line_each(tmp_path, 80, None, seed=0)


@pytest.mark.slow
def test_a_thousand_damaged_files(tmp_path: Path, real_clips: Path) -> None:
    assert_damage_costs_a_line_each(tmp_path, 1000, real_clips, seed=1)


def test_nothing_but_damage_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    for number, (suffix, data) in enumerate(originals(None)):
        (tmp_path / "videos" / f"{number}{suffix}").write_bytes(bytes(len(data)))
    with pytest.raises(UserError, match="none of the 7 videos .* gave a clip"):
        ingest(tmp_path / "videos", tmp_path / "out", IngestConfig(workers=1))
