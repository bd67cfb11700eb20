"""Ingest: clips, cuts and captions arrive; the same bytes after interruptions and at any number of workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from videodit.cli import main
from videodit.data.clip_cutter import CutRules, cut_source
from videodit.data.filters import FilterConfig
from videodit.data.folder_lock import FolderLock
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.ingest_record import read_record, read_rejects
from videodit.data.mp4 import encode_mp4, write_mp4
from videodit.data.shards import ShardSet, sha256_hex
from videodit.data.video_io import read_frames
from videodit.errors import UserError

ONE = IngestConfig(workers=1, clips_per_shard=3)


def scene(seed: int, num_frames: int, height: int = 48, width: int = 64) -> np.ndarray:
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    picture = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, shift, axis=1) for shift in range(num_frames)])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good sources, one that is cut short, one with a bad caption file; at 8 frames a second."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(3):
        write_mp4(folder / f"clip_{i}.mp4", scene(i, 17), 8)
        (folder / f"clip_{i}.json").write_text(json.dumps({"captions": [f"exact {i}", f"other {i}"], "spec": {"i": i}}))
    write_mp4(folder / "clip.0.mp4", scene(3, 17), 8)  # the same key, were it not for the hash
    write_mp4(folder / "three-scenes.mp4", np.concatenate([scene(4, 40), scene(5, 10), scene(6, 130)]), 8)
    (folder / "short.mp4").write_bytes(encode_mp4(scene(7, 60), 8)[:-3000])
    write_mp4(folder / "mute.mp4", scene(8, 17), 8)
    (folder / "mute.json").write_text("{")
    return folder


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.fixture(scope="module")
def ingested(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out") / "shards"
    steps: list[tuple[int, int]] = []
    result = ingest(videos, out, ONE, progress=lambda done, total: steps.append((done, total)))
    assert (result.accepted, result.rejected, result.clips, result.up_to_date) == (5, 2, 7, False)
    assert steps == [(i + 1, 7) for i in range(7)]
    return out


def test_clips_and_their_records(ingested: Path, videos: Path) -> None:
    shards = ShardSet.open(ingested)
    keys = [entry.key for entry in shards.entries]
    hashed = f"clip_0-{sha256_hex(b'clip.0.mp4')[:8]}-0000", f"clip_0-{sha256_hex(b'clip_0.mp4')[:8]}-0000"
    assert keys == [*hashed, "clip_1-0000", "clip_2-0000", *(f"three-scenes-{i:04d}" for i in range(3))]
    for i in range(len(shards)):
        record, frames = shards.read_json(i), read_frames(shards.read(i, "mp4"))
        assert sha256_hex(shards.read(i, "mp4")) == record["sha256"]
        assert frames.shape == (record["num_frames"], record["height"], record["width"], 3)
        assert (record["end_s"] - record["start_s"]) * record["fps"] == pytest.approx(record["num_frames"], abs=1e-3)
        original = read_frames(videos / record["source"])[round(record["start_s"] * 8) :][: len(frames)]
        assert np.abs(frames.astype(int) - original).mean() < 6
    by_source = {entry.meta["source"]: i for i, entry in enumerate(shards.entries)}
    assert shards.captions(by_source["clip_1.mp4"]) == ["exact 1", "other 1"]
    assert shards.read_json(by_source["clip_1.mp4"])["extra"] == {"spec": {"i": 1}}
    assert shards.captions(by_source["clip.0.mp4"]) == ["clip.0"]


def test_scenes_and_rejects(ingested: Path) -> None:
    scenes = [e.meta for e in ShardSet.open(ingested).entries if e.meta["source"] == "three-scenes.mp4"]
    assert [(round(m["start_s"] * 8), m["num_frames"]) for m in scenes] == [
        (0, 40),
        (50, 80),
        (130, 50),
    ]  # 10 s at most
    rejects = [json.loads(line) for line in (ingested / "rejects.jsonl").read_text().splitlines()]
    assert {reject["source"] for reject in rejects} == {"mute.mp4", "short.mp4", "three-scenes.mp4"}
    dropped = next(reject for reject in rejects if reject["source"] == "three-scenes.mp4")
    assert (dropped["start_s"], dropped["end_s"]) == (5, 6.25) and "10 frames" in dropped["reason"]


def test_same_bytes_whatever_the_workers(ingested: Path, videos: Path, tmp_path: Path) -> None:
    ingest(videos, tmp_path / "out", IngestConfig(workers=2, clips_per_shard=3))
    assert contents(tmp_path / "out") == contents(ingested)


def test_again_does_nothing_other_settings_are_refused(ingested: Path, videos: Path) -> None:
    before = contents(ingested)
    result = ingest(videos, ingested, ONE)
    assert result.up_to_date and (result.accepted, result.rejected, result.clips) == (5, 2, 7)
    with pytest.raises(UserError, match="other settings .crf 18, now 20"):
        ingest(videos, ingested, IngestConfig(crf=20, clips_per_shard=3))
    assert contents(ingested) == before


def killed_after(done: int, videos: Path, out: Path) -> None:
    """An ingest of its own process that ends by SIGKILL when so many sources are in the shards."""
    code = f"""
import os, signal, sys
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.ingest_record import read_record, read_rejects
if __name__ == "__main__":
    kill = lambda done, total: done == {done} and os.kill(os.getpid(), signal.SIGKILL)
    ingest(sys.argv[1], sys.argv[2], IngestConfig(workers=1, clips_per_shard=3), progress=kill)
"""
    out.with_suffix(".py").write_text(code)
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(out.with_suffix(".py")), str(videos), str(out)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(root)}, timeout=300)
    assert killed.returncode == -signal.SIGKILL


def spoil(*paths: Path) -> None:
    """Makes files unreadable, as only a look into them tells: size and time stay."""
    for path in paths:
        facts = path.stat()
        path.write_bytes(bytes(facts.st_size))
        os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def test_killed_and_started_again(ingested: Path, videos: Path, tmp_path: Path) -> None:
    """What was cut before a kill, or is in a finished set, is not decoded again, and the bytes are those of one run."""
    copy, out = tmp_path / "videos", tmp_path / "out"
    shutil.copytree(videos, copy)
    names = sorted(path.name for path in videos.glob("*.mp4"))
    killed_after(4, copy, out)
    with pytest.raises(UserError, match="interrupted"):
        ShardSet.open(out)
    spoil(*(copy / name for name in names[:4]))
    killed_after(2, copy, out)  # in the middle of taking over what was cut, and with a tar half taken
    ingest(copy, out, ONE)
    assert contents(out) == contents(ingested)

    spoil(*copy.glob("*.mp4"))
    write_mp4(copy / "clip_1a.mp4", scene(9, 17), 8)
    killed_after(6, copy, out)
    shards = ShardSet.open(out)  # still there
    assert [shards.read(i, "mp4") for i in range(7)] == [ShardSet.open(ingested).read(i, "mp4") for i in range(7)]
    assert not (out / "shard-000000.tar.part").exists()  # it is as before
    before = stats(out)["shard-000000.tar"]
    ingest(copy, out, ONE)
    assert stats(out)["shard-000000.tar"] == before

    for name in names:
        shutil.copy2(videos / name, copy)
    ingest(copy, tmp_path / "fresh", ONE)
    assert contents(out) == contents(tmp_path / "fresh") and len(ShardSet.open(out)) == 8


def test_what_a_finished_set_is_good_for(videos: Path, tmp_path: Path) -> None:
    """A dry run takes what it knows, a clip damaged in it is cut anew, and it stays if the new one would be empty."""
    folder, out = tmp_path / "videos", tmp_path / "out"
    folder.mkdir()
    shutil.copy2(videos / "clip_1.mp4", folder)
    ingest(folder, out, ONE)
    good = contents(out)

    spoil(folder / "clip_1.mp4")
    shutil.copy2(videos / "clip_2.mp4", folder)
    assert ingest(folder, out, replace(ONE, dry_run=True)).accepted == 2
    assert contents(out) == good

    shutil.copy2(videos / "clip_1.mp4", folder)
    offset, size = ShardSet.open(out).entries[0].members["mp4"]
    tar = out / "shard-000000.tar"
    tar.write_bytes(good[tar.name][:offset] + bytes(size) + good[tar.name][offset + size :])
    (out / "cuts.jsonl").write_bytes(b'{"cut": 3}\n\xff\n{"cu\n' + good["cuts.jsonl"])
    ingest(folder, out, ONE)
    ingest(folder, tmp_path / "fresh", ONE)
    assert contents(out) == contents(tmp_path / "fresh")

    for path in folder.iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match="stay as they are: see .*rejects.jsonl.part"):
        ingest(folder, out, ONE)
    assert len(ShardSet.open(out)) == 2


def test_clips_of_other_videos_are_not_replaced(ingested: Path, tmp_path: Path) -> None:
    """As a user does who wants to add a second folder."""
    folder, out = tmp_path / "more", tmp_path / "out"
    folder.mkdir()
    write_mp4(folder / "new.mp4", scene(9, 17), 8)
    shutil.copytree(ingested, out)
    for config in (ONE, replace(ONE, dry_run=True)):
        with pytest.raises(UserError, match=r"clips of other videos only, such as clip\.0\.mp4, .*another --out"):
            ingest(folder, out, config)
    assert contents(out) == contents(ingested)


def test_shards_below_the_source_are_not_searched(tmp_path: Path) -> None:
    write_mp4(tmp_path / "0.mp4", scene(0, 17), 8)
    for _ in range(2):
        assert ingest(tmp_path, tmp_path / "shards", ONE).clips == 1


def test_an_earlier_set_of_the_same_videos_is_no_source(tmp_path: Path) -> None:
    """As after "made with other settings: choose another --out"; else every clip would be there twice."""
    (tmp_path / "videos/a").mkdir(parents=True)
    write_mp4(tmp_path / "videos/a/0.mp4", scene(0, 17), 8)
    assert ingest(tmp_path / "videos/a", tmp_path / "videos/a/shards", ONE).clips == 1
    assert ingest(tmp_path / "videos", tmp_path / "videos/shards", ONE).clips == 1
    assert ingest(tmp_path / "videos", tmp_path / "videos/other", replace(ONE, crf=30)).clips == 1
    (tmp_path / "sets").mkdir()
    (tmp_path / "videos/shards").rename(tmp_path / "sets/shards")  # without the videos it is a source as any other
    assert ingest(tmp_path / "sets", tmp_path / "merged", ONE).clips == 1


def filtered(out: Path) -> dict[str, str]:
    """Reasons of clips that filters left out, by key, from rejects.jsonl; the index says the same."""
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    reasons = {reject["key"]: reject["reason"] for reject in rejects if "key" in reject}
    assert reasons == {e.key: e.dropped for e in ShardSet.open(out, dropped=True).entries if e.dropped}
    return reasons


def stats(out: Path) -> dict[str, tuple[int, int]]:
    """Which files the tars are, and when they were written."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in out.glob("*.tar")}


def test_filters_are_changed_without_decoding_again(ingested: Path, videos: Path, tmp_path: Path) -> None:
    """The tars stay the same files; index and rejects become those of a run that had these filters from the start."""
    out = tmp_path / "out"
    strict = replace(ONE, filters=FilterConfig(min_duration_s=5.0, duplicate_bits=12))
    result = ingest(videos, out, strict)
    assert (result.accepted, result.rejected, result.clips) == (5, 2, 3)
    assert {name: stage.clips for name, stage in result.filtered.items()} == {"min_duration_s": 4}
    assert set(filtered(out)) == {e.key for e in ShardSet.open(ingested).entries if e.meta["num_frames"] == 17}
    assert len(ShardSet.open(out)) == 3 and len(ShardSet.open(out, dropped=True)) == 7
    tars = stats(out)

    again = ingest(videos, out, ONE)
    assert (again.clips, again.filtered, again.up_to_date) == (7, {}, False)
    assert contents(out) == contents(ingested)
    assert stats(out) == tars
    ingest(videos, out, strict)
    assert ingest(videos, out, strict).up_to_date
    ingest(videos, tmp_path / "fresh", strict)
    assert contents(out) == contents(tmp_path / "fresh")


def test_duplicates_of_other_sizes_and_encodings(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name, seed, side, crf in (("a", 0, 96, 18), ("b", 1, 96, 18), ("c", 0, 64, 32)):
        colors = np.random.default_rng(seed).integers(0, 256, (9, 9, 3), np.uint8)
        picture = cv2.resize(colors, (96, 96), interpolation=cv2.INTER_CUBIC)
        moved = [np.roll(picture, t, axis=1) for t in range(17)]
        frames = [cv2.resize(frame, (side, side), interpolation=cv2.INTER_AREA) for frame in moved]
        write_mp4(folder / f"{name}.mp4", np.stack(frames), 8, crf=crf)
    result = ingest(folder, tmp_path / "out", replace(ONE, filters=FilterConfig(duplicate_bits=12)))
    assert (result.clips, list(filtered(tmp_path / "out"))) == (2, ["c-0000"])
    assert filtered(tmp_path / "out")["c-0000"].startswith("duplicate of a-0000, ")


def test_dry_run_says_the_same_and_writes_nothing(videos: Path, tmp_path: Path) -> None:
    strict = replace(ONE, filters=FilterConfig(min_duration_s=5.0))
    for out in (tmp_path / "none" / "shards", tmp_path / "shards"):  # the second is ingested already
        if out.parent == tmp_path:
            ingest(videos, out, ONE)
        before = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*"))
        kept = contents(out) if out.exists() else {}
        result = ingest(videos, out, replace(strict, dry_run=True))
        assert (result.accepted, result.rejected, result.clips) == (5, 2, 3)
        assert result.filtered["min_duration_s"].clips == 4
        assert sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*")) == before
        assert (contents(out) if out.exists() else {}) == kept


def test_dry_run_counts_reasons_and_encodes_nothing(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, rules = str(videos / "three-scenes.mp4"), CutRules(17, 10.0, 480, True, 3.0, 18)
    written = cut_source(source, tmp_path / "a", rules)
    scored = cut_source(source, tmp_path / "b", replace(rules, encode=False))
    assert (tmp_path / "b").read_bytes() == b"" != (tmp_path / "a").read_bytes()
    for one, other in zip(written.clips, scored.clips, strict=True):
        assert other == replace(one, offset=0, size=0, sha256=sha256_hex(b""))
    options = ["--dry_run=true", "--workers=1", "--filters.min_duration_s=5"]
    assert main(["ingest", str(videos), "--out", str(tmp_path / "out"), *options]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "1 left out: caption file mute.json",
        "1 left out: cannot be opened",
        "1 left out: 10 frames, shorter than min_frames 17",
        "3 videos without a caption, such as clip.0.mp4: the file's name is read as one",
        f"dry run, nothing is written: 5 videos to 3 clips in {tmp_path / 'out'}; 2 rejected",
    ]


def test_filters_that_leave_nothing_are_an_error_that_can_be_mended(videos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(UserError, match=r"every clip, filters.min_motion most of them \(clip_0-.*: loosen it"):
            ingest(videos, out, replace(ONE, filters=FilterConfig(min_motion=99)))
    with pytest.raises(UserError, match="nothing passed ingest"):
        ShardSet.open(out)
    tars = stats(out)
    assert ingest(videos, out, ONE).clips == 7
    assert stats(out) == tars


def test_sizes(tmp_path: Path) -> None:
    write_mp4(tmp_path / "a.mp4", scene(0, 17, 96, 136), 8)
    ingest(tmp_path / "a.mp4", tmp_path / "out", IngestConfig(workers=1, max_short_side=32))
    shards = ShardSet.open(tmp_path / "out")
    assert read_frames(shards.read(0, "mp4")).shape == (17, 32, 46, 3)


def test_no_usable_video(tmp_path: Path) -> None:
    (tmp_path / "v").mkdir()
    (tmp_path / "v" / "a.mp4").write_bytes(b"nothing")
    with pytest.raises(
        UserError, match="none of the 1 video .*, a.mp4 for one: cannot be opened: .* see .*rejects.jsonl"
    ):
        ingest(tmp_path / "v", tmp_path / "out", ONE)
    assert "cannot be opened" in (tmp_path / "out" / "rejects.jsonl").read_text()


def test_what_is_no_file_and_what_is_no_text(videos: Path, tmp_path: Path) -> None:
    """Pipes and devices in the place of a video or a caption neither hang nor fill the memory; a name in another
    encoding is written as the system has it."""
    folder = tmp_path / "videos"
    folder.mkdir()
    names = [b"caf\xe9.mp4", b"device.mp4", b"pipe.mp4", b"surrogate.mp4", b"vast.mp4"]
    for name in names:
        shutil.copy2(videos / "clip_1.mp4", os.fsencode(folder) + b"/" + name)
    os.mkfifo(folder / "video.mp4")
    os.mkfifo(folder / "pipe.json")
    (folder / "device.txt").symlink_to("/dev/zero")
    (folder / "disk.mp4").symlink_to("/proc/self/mem")  # a regular file that the system cannot read
    (folder / "surrogate.json").write_text('{"caption": "x", "by": ["\\ud800"]}')
    with open(folder / "vast.txt", "wb") as file:
        file.truncate(1 << 34)
    result = ingest(folder, tmp_path / "out", ONE)
    assert (result.accepted, result.rejected) == (1, 6)
    assert ShardSet.open(tmp_path / "out").entries[0].meta["source"] == r"caf\udce9.mp4"
    assert read_record(tmp_path / "out")["not_fetched"] == 1  # the disk may work again the next time
    reasons = {reject["source"]: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    assert reasons == {
        "device.mp4": "caption file device.txt cannot be read: no regular file",
        "disk.mp4": "cannot be read: Input/output error",
        "pipe.mp4": "caption file pipe.json cannot be read: no regular file",
        "surrogate.mp4": r"caption file surrogate.json: text that UTF-8 cannot hold: '\\ud800'",
        "vast.mp4": "caption file vast.txt cannot be read: 17179869184 bytes, more than 16777216",
        "video.mp4": "no regular file",
    }


def write_y4m(path: Path, num_frames: int, height: int, width: int) -> None:
    """A video of any size in no time: a file with holes, which is grey."""
    with open(path, "wb") as file:
        file.write(b"YUV4MPEG2 W%d H%d F8:1 C420\n" % (width, height))
        for _ in range(num_frames):
            file.write(b"FRAME\n")
            file.seek(height * width * 3 // 2, 1)
        file.truncate()


@pytest.mark.slow
def test_limits_on_pixels_memory_time_and_frames(tmp_path: Path) -> None:
    folder = tmp_path / "videos"
    folder.mkdir()
    write_y4m(folder / "pixels.y4m", 1, 10000, 10000)
    write_y4m(folder / "memory.y4m", 20, 8000, 8000)
    write_y4m(folder / "time.y4m", 2000, 2000, 2000)  # minutes
    write_y4m(folder / "frames.y4m", 2001, 16, 16)
    (folder / "header.gif").write_bytes(b"GIF89a" + b"\x20\x4e" * 2 + bytes(200))
    write_mp4(folder / "good.mp4", scene(0, 40), 8)
    config = replace(
        ONE, max_memory_gb=0.8, time_limit_s=20, max_source_frames=2000, max_short_side=0, max_duration_s=60
    )
    ingest(folder, tmp_path / "out", config)
    assert {entry.meta["source"] for entry in ShardSet.open(tmp_path / "out").entries} == {"good.mp4"}
    reasons = {reject["source"]: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    assert reasons == {
        "frames.y4m": "more than 2000 frames",
        "header.gif": "does not decode: Invalid argument",
        "memory.y4m": "needs more than 0.8 GB of memory",
        "pixels.y4m": "frames of 10000x10000 are too large",
        "time.y4m": "took longer than 20 s",
    }


def test_wrong_output_folders(videos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "00000.tar").touch()
    for out, message in [("file", "not a folder"), ("file/below", "not a folder"), ("foreign", "did not write")]:
        with pytest.raises(UserError, match=message):
            ingest(videos, tmp_path / out, ONE)
    with pytest.raises(UserError, match="is the source itself"):
        ingest(videos, videos, ONE)
    with pytest.raises(UserError, match="no such file or folder"):
        ingest(tmp_path / "none", tmp_path / "out", ONE)
    with FolderLock(tmp_path / "busy", "--out") as lock:
        lock.hold_alone()
        with pytest.raises(UserError, match=f"--out {tmp_path / 'busy'} is in use by process {os.getpid()}: wait"):
            ingest(videos, tmp_path / "busy", ONE)


@pytest.mark.parametrize(
    "bad",
    [
        {"min_frames": 0},
        {"max_duration_s": 0},
        {"crf": 60},
        {"max_short_side": 8},
        {"workers": -1},
        {"stall_limit_s": -1},
    ],
)
def test_impossible_settings(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        IngestConfig(**bad)


def test_real_clips_are_ingested(real_clips: Path, tmp_path: Path) -> None:
    result = ingest(real_clips, tmp_path / "out", IngestConfig(max_short_side=128, crf=30))
    assert (result.accepted, result.rejected) == (6, 1)
    shards = ShardSet.open(tmp_path / "out")
    by_source: dict[str, list[dict]] = {}
    for entry in shards.entries:
        by_source.setdefault(entry.meta["source"], []).append(entry.meta)
    starts = [round(meta["start_s"] * 24) for meta in by_source["sintel_trailer_30s.mp4"]]
    for listed in (0, 286, 348, 388, 523, 573):  # the scene from 372 to 388 is shorter than 17 frames
        assert min(abs(start - listed) for start in starts) <= 2
    rotated = by_source["nasa_13013_rotated.mp4"][0]
    assert (rotated["height"], rotated["width"], rotated["num_frames"]) == (228, 128, 17)
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert any(r["source"] == "corrupted.mp4" and r["reason"].startswith("does not decode") for r in rejects)
