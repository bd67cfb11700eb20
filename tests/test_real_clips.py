"""Real videos through the command line: ingest, both trainings on two ranks with ZeRO-2, export, a clip that plays."""

import json
import subprocess
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

from tests import tiny
from videodit.data.latents import read_manifest
from videodit.data.shards import ShardSet
from videodit.data.video_io import probe, read_frames
from videodit.training.run_folder import read_metrics

BUCKET = "9x48x48"
# Scene starts on which both detectors agree, from the README beside the clips; and where they do not, for fades.
SINTEL_CUTS = (286, 348, 372, 388, 523, 573, 610)
SINTEL_FADES = (468, 478, 631, 671)
SIZES = {  # height and width as shown, before scaling down to 480
    "av1_video.mkv": (360, 640),
    "h265_10bits.mp4": (200, 200),
    "nasa_13013.mp4": (270, 480),
    "nasa_13013_rotated.mp4": (480, 270),
    "sintel_trailer_30s.mp4": (480, 854),
    "testsrc2_mpeg4.avi": (480, 854),
}
STEPS = 24
RUN = ["--zero_stage=2", f"--max_steps={STEPS}", "--optim.lr=5e-3", "--optim.warmup_steps=4"]
# All 14 clips in each step, 7 and a row of padding on each rank.
RUN += ["--global_batch_size=14", "--micro_batch_size=8", *tiny.RUN_OPTIONS]
PROMPTS = ["a dragon flies over a city in snow", "a rocket"]


def run(*arguments: str | Path, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    """`videodit ARGUMENTS`, which has to succeed."""
    command = tiny.command(arguments, ranks)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("real")


@pytest.fixture(scope="module")
def shards(root: Path, real_clips: Path) -> Path:
    done = run("ingest", real_clips, "--out", root / "shards")
    assert "6 videos to" in done.stdout and "1 rejected" in done.stdout
    return root / "shards"


@pytest.fixture(scope="module")
def vae_run(root: Path, shards: Path) -> Path:
    # Clips are read in part: decoding them whole, once a rank, would take longer than the training.
    data = ["--data.shards", shards, f"--data.buckets={BUCKET}", "--data.cache_decoded=false"]
    run("train", "vae", "--run_dir", root / "vae", *data, *tiny.VAE_OPTIONS, *RUN, ranks=2)
    return root / "vae"


@pytest.fixture(scope="module")
def dit_run(root: Path, shards: Path, vae_run: Path) -> Path:
    data = ["--data.shards", shards, f"--data.buckets={BUCKET}"]
    done = run("encode", "--vae", vae_run / "model", *data, "--out", root / "latents")
    assert f"{len(ShardSet.open(shards))} clips encoded" in done.stdout
    latents = ["--data.shards", root / "latents"]
    run("train", "dit", "--run_dir", root / "dit", *latents, *tiny.DIT_OPTIONS, *RUN, ranks=2)
    return root / "dit"


@pytest.fixture(scope="module")
def model(root: Path, dit_run: Path) -> Path:
    run("export", dit_run, "--out", root / "model")
    return root / "model"


def test_readable_clips_are_accepted_as_they_are_shown(shards: Path) -> None:
    entries = ShardSet.open(shards).entries
    assert {entry.meta["source"] for entry in entries} == set(SIZES)
    for entry in entries:
        assert (entry.meta["height"], entry.meta["width"]) == SIZES[entry.meta["source"]], entry.key


def test_the_clips_are_plain_video_of_the_length_that_the_index_says(shards: Path, tmp_path: Path) -> None:
    opened = ShardSet.open(shards)
    for index, entry in enumerate(opened.entries):
        (tmp_path / "clip.mp4").write_bytes(opened.read(index, "mp4"))
        info = probe(tmp_path / "clip.mp4")
        assert (info.codec, info.pix_fmt, info.rotation) == ("h264", "yuv420p", 0), entry.key
        assert (info.num_frames, info.height, info.width) == (
            entry.meta["num_frames"],
            entry.meta["height"],
            entry.meta["width"],
        )


def test_the_corrupted_file_is_listed_with_the_reason(shards: Path) -> None:
    rejects = [json.loads(line) for line in (shards / "rejects.jsonl").read_text().splitlines()]
    (whole,) = [reject for reject in rejects if "start_s" not in reject]
    assert whole["source"] == "corrupted.mp4" and "does not decode" in whole["reason"]
    assert all("shorter than min_frames 17" in reject["reason"] for reject in rejects if reject is not whole)


def test_the_trailer_is_cut_at_its_cuts(shards: Path) -> None:
    # Scenes shorter than 17 frames, such as the one from 372 to 388, are among the rejects.
    entries = [entry.meta for entry in ShardSet.open(shards).entries]
    rejects = [json.loads(line) for line in (shards / "rejects.jsonl").read_text().splitlines()]
    pieces = [piece for piece in entries + rejects if piece["source"] == "sintel_trailer_30s.mp4"]
    spans = sorted((round(piece["start_s"] * 24), round(piece["end_s"] * 24)) for piece in pieces)
    assert spans[0][0] == 0 and spans[-1][1] == 720
    assert all(end == start for (_, end), (start, _) in zip(spans, spans[1:])), spans
    starts = [start for start, _ in spans[1:]]
    for cut in SINTEL_CUTS:
        assert min(abs(start - cut) for start in starts) <= 2, (cut, starts)
    limit = 240  # frames: a longer scene is cut into clips of 10 s
    for start in starts:
        known = min(abs(start - cut) for cut in SINTEL_CUTS + SINTEL_FADES) <= 8
        assert known or (start % limit == 0), (start, starts)


def check_falling(run_dir: Path) -> None:
    lines = [line for line in read_metrics(run_dir) if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses = [line["train/loss"] for line in lines]
    quarter = STEPS // 4
    assert fmean(losses[-quarter:]) < 0.95 * fmean(losses[:quarter]), losses


def test_the_vae_learns_on_two_ranks(vae_run: Path) -> None:
    check_falling(vae_run)
    state = json.loads((vae_run / f"checkpoints/step-{STEPS:08d}/state.json").read_text())
    assert (state["world_size"], state["zero_stage"]) == (2, 2)


def test_latents_come_with_what_was_said_of_the_clips(dit_run: Path, shards: Path, root: Path) -> None:
    clips, latents = ShardSet.open(shards), ShardSet.open(root / "latents")
    manifest = read_manifest(root / "latents")
    assert manifest is not None and manifest["num_clips"] == len(clips) == len(latents)
    said = defaultdict(list)
    for index, entry in enumerate(clips.entries):
        said[entry.key] = clips.captions(index)
    for index in range(len(latents)):
        assert latents.captions(index) == said[latents.read_json(index)["clip"]] != [""]


def test_the_dit_learns_on_two_ranks(dit_run: Path) -> None:
    check_falling(dit_run)
    state = json.loads((dit_run / f"checkpoints/step-{STEPS:08d}/state.json").read_text())
    assert (state["world_size"], state["zero_stage"]) == (2, 2)


def test_generated_clips_play_and_their_json_makes_them_again(model: Path, tmp_path: Path) -> None:
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    done = run("generate", "--model", model, *prompts, "--seed=7", "--fps=12", "--out", tmp_path / "first")
    clips = [Path(line) for line in done.stdout.splitlines()]
    assert [clip.parent for clip in clips] == [tmp_path / "first"] * len(PROMPTS)
    for clip in clips:
        info = probe(clip)
        assert (info.num_frames, info.height, info.width, info.fps) == (9, 48, 48, 12.0)
        frames = read_frames(clip)
        assert frames.shape == (9, 48, 48, 3) and frames.std() > 1

    record = json.loads(clips[1].with_suffix(".json").read_text())
    assert (record["prompt"], record["seed"]) == (PROMPTS[1], 8)
    done = run("generate", "--model", model, *prompts, "--seed=7", "--fps=12", "--out", tmp_path / "second")
    assert [Path(line).read_bytes() for line in done.stdout.splitlines()] == [clip.read_bytes() for clip in clips]

    # Alone, the clip goes through kernels of another shape, which round differently.
    settings = ("prompt", "seed", "fps", "num_frames", "height", "width", "num_steps", "guidance_scale", "sampler")
    again = [f"--{name}={record[name]}" for name in (*settings, "model", "dtype", "device")]
    done = run("generate", *again, "--out", tmp_path / "again")
    alone, together, other = (
        read_frames(path).astype(float) for path in (Path(done.stdout.strip()), clips[1], clips[0])
    )
    difference = abs(alone - together).mean()
    assert difference < 1 < abs(other - together).mean()
