"""`videodit demo --smoke`: the whole way by the command line; killed on the way, started again, and again when done."""

import base64
import hashlib
import json
import re
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from videodit.data.video_io import read_frames
from videodit.training.run_folder import read_metrics

STAGES = ["render", "ingest", "vae", "encode", "dit", "generate"]
STEPS = 8  # of each training in a smoke run


@dataclass
class Demo:
    """A demo that was killed while the DiT trained, then finished, then started once more."""

    out: Path
    finished: subprocess.CompletedProcess[str]
    before: dict[str, str]
    again: subprocess.CompletedProcess[str]


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file, by path, but for what tells the time or the progress."""
    files = [path for path in folder.rglob("*") if path.is_file() and not {"wandb"} & set(path.parts)]
    skipped = {"stages.json", "result.json", "report.html", ".lock"}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.name not in skipped
    }


def interrupt(out: Path, signal_number: int, min_steps: int) -> tuple[int, list[int]]:
    """Starts the demo and stops it after some steps of the DiT: (exit code, steps in metrics.jsonl)."""

    def trained() -> bool:
        return len(read_metrics(out / "dit")) >= min_steps

    with tiny.started(["demo", "--smoke", "--out", out]) as process:
        tiny.wait_until(trained, process)
        process.send_signal(signal_number)
        code = process.wait(120)
    return code, [line["step"] for line in read_metrics(out / "dit")]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("run") / "demo"
    code, steps = interrupt(out, signal.SIGKILL, min_steps=1)
    assert code == -signal.SIGKILL and steps
    assert not (out / "result.json").exists()
    finished = tiny.videodit("demo", "--smoke", "--out", out)
    before = contents(out)
    return Demo(out, finished, before, tiny.videodit("demo", "--smoke", "--out", out))


def test_a_killed_demo_goes_on_where_it_was(demo: Demo) -> None:
    assert demo.finished.returncode == 0, demo.finished.stderr
    for stage in STAGES[:4]:
        assert f"{stage}: done before" in demo.finished.stdout
    assert "\ndit\n" in demo.finished.stdout and "\ngenerate\n" in demo.finished.stdout
    for run in ("vae", "dit"):
        steps = [line["step"] for line in read_metrics(demo.out / run) if "train/loss" in line]
        assert steps == list(range(1, STEPS + 1))


def test_a_finished_demo_does_nothing_again(demo: Demo) -> None:
    assert demo.again.returncode == 0, demo.again.stderr
    for stage in STAGES:
        assert f"{stage}: done before" in demo.again.stdout
    assert contents(demo.out) == demo.before


def test_it_ends_with_the_path_of_the_report(demo: Demo) -> None:
    for done in (demo.finished, demo.again):
        last = done.stdout.rstrip().splitlines()[-1]
        assert last == f"report: {demo.out / 'report.html'}"
    assert "Traceback" not in demo.finished.stderr + demo.again.stderr


def test_result_has_the_promised_keys(demo: Demo) -> None:
    result: dict[str, Any] = json.loads((demo.out / "result.json").read_text())
    assert result.keys() >= {
        "seconds", "vae_psnr_db", "oracle_on_real", "oracle_on_reconstructed", "accuracy", "held_out_accuracy",
        "dit_steps", "device",
    }  # fmt: skip
    assert result["seconds"].keys() == {"total", *STAGES}
    assert all(value >= 0 for value in result["seconds"].values())
    assert result["seconds"]["total"] == pytest.approx(sum(result["seconds"][name] for name in STAGES), abs=0.5)
    for name in ("accuracy", "held_out_accuracy", "oracle_on_real", "oracle_on_reconstructed"):
        assert result[name].keys() >= {"color", "shape", "motion", "all", "n"}
        assert result[name]["n"] == 8
        assert all(0 <= result[name][key] <= 1 for key in ("color", "shape", "motion", "all"))
    assert result["dit_steps"] == STEPS
    assert result["vae_psnr_db"] > 10
    assert min(result["oracle_on_real"][key] for key in ("color", "shape", "motion")) == 1.0


def test_the_report_is_one_file_that_plays(demo: Demo) -> None:
    page = (demo.out / "report.html").read_text(encoding="utf-8")
    links = re.findall(r"""(?:src|href|poster)\s*=\s*["']?([^"'\s>]+)""", page) + re.findall(r"url\(([^)]+)\)", page)
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert "@import" not in page and "<link" not in page
    videos = re.findall(r"data:video/mp4;base64,([A-Za-z0-9+/=]+)", page)
    assert len(videos) >= 16  # the generated clips; reconstructions beside them
    for video in videos:
        assert read_frames(base64.b64decode(video)).shape == (17, 64, 64, 3)
    for shown in ("smoke run", "VAE training loss", "DiT, error of the prediction"):
        assert shown in page


def test_the_folders_are_those_of_the_design(demo: Demo) -> None:
    for name in ("videos", "shards", "vae", "latents", "dit", "model", "samples"):
        assert (demo.out / name).is_dir()
    for name in ("model_index.json", "README.md", "dit/model.safetensors", "vae/model.safetensors"):
        assert (demo.out / "model" / name).is_file()
    for split in ("train", "held_out"):
        clips = sorted((demo.out / "samples" / split).glob("*.mp4"))
        records = [json.loads(clip.with_suffix(".json").read_text()) for clip in clips]
        assert [record["seed"] for record in records] == list(range(8))
        assert len({record["prompt"] for record in records}) == 8


@pytest.mark.slow
def test_sigterm_leaves_a_checkpoint_and_143(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    code, steps = interrupt(out, signal.SIGTERM, min_steps=2)
    assert code == 143
    assert (out / f"dit/checkpoints/step-{steps[-1]:08d}/manifest.json").is_file()
    assert "dit" in json.loads((out / "stages.json").read_text())["seconds"]
    assert tiny.videodit("demo", "--smoke", "--out", out).returncode == 0
    lines = [line for line in read_metrics(out / "dit") if "train/loss" in line]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_evaluate_measures_a_model_and_compares_folders(demo: Demo, tmp_path: Path) -> None:
    done = tiny.videodit("evaluate", "--model", demo.out / "model", "--num-prompts", "4", "--out", tmp_path / "clips")
    assert done.returncode == 0, done.stderr
    for name in ("color", "shape", "motion", "all", "95%"):
        assert name in done.stdout
    same = demo.out / "samples/train"
    done = tiny.videodit("evaluate", "--videos", same, "--reference", same)
    assert done.returncode == 0 and "psnr_db" in done.stdout, done.stderr
