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
from videodit.demo import CONFIGS, DemoConfig, run_demo
from videodit.errors import UserError
from videodit.training.run_folder import read_metrics

STAGES = ["render", "ingest", "vae", "encode", "dit", "generate"]
STEPS = 8  # of each training in a smoke run


@dataclass
class Demo:
    """A demo that was killed while the DiT trained, then finished, then started once more."""

    out: Path
    refused_beside_it: str
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


def refusal(**settings: Any) -> str:
    """What the demo answers to settings that it does not take."""
    with pytest.raises(UserError) as caught:
        run_demo(DemoConfig(**settings))
    return str(caught.value)


def begun(out: Path) -> list[str]:
    """The stages that have begun, in their order."""
    file = out / "stages.json"
    return list(json.loads(file.read_text())["settings"]) if file.exists() else []


def is_within(stage: str, out: Path) -> bool:
    """Whether a stage has begun and made something."""
    made = {
        "render": lambda: any(out.glob("videos/train/*.mp4")),
        "ingest": lambda: any(path.is_file() and path.name != ".lock" for path in out.glob("shards/train/**/*")),
        "vae": lambda: len(read_metrics(out / "vae")) >= 1,
        "encode": lambda: any(path.is_file() and path.name != ".lock" for path in out.glob("latents/**/*")),
        "dit": lambda: len(read_metrics(out / "dit")) >= 2,
        "generate": lambda: any(out.glob("samples/train/*.mp4")),
    }
    return stage in begun(out) and made[stage]()


def interrupt(out: Path, signal_number: int, stage: str) -> int:
    """Starts the demo and stops it within a stage; gives its exit code."""
    with tiny.started(["demo", "--smoke", "--out", out]) as process:
        tiny.wait_until(lambda: is_within(stage, out), process)
        process.send_signal(signal_number)
        code = process.wait(120)
    assert stage not in json.loads((out / "stages.json").read_text())["done"]
    assert not (out / "result.json").exists()
    return code


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    out = tmp_path_factory.mktemp("run") / "demo"
    with tiny.started(["demo", "--smoke", "--out", out]) as process:
        tiny.wait_until(lambda: "render" in begun(out), process)
        answer = refusal(out=str(out), smoke=True).replace(str(process.pid), "PID")
        tiny.wait_until(lambda: is_within("dit", out), process)
    assert not (out / "result.json").exists()
    finished = tiny.videodit("demo", "--smoke", "--out", out)
    before = contents(out)
    return Demo(out, answer, finished, before, tiny.videodit("demo", "--smoke", "--out", out))


def assert_went_on(out: Path, finished: subprocess.CompletedProcess[str], stage: str) -> None:
    """What was done stayed, the interrupted stage and all later ones ran, and no step is missing or there twice."""
    assert finished.returncode == 0, finished.stderr
    before = STAGES.index(stage)
    for name in STAGES[:before]:
        assert f"{name}: done before" in finished.stdout
    for name in STAGES[before:]:
        assert f"\n{name}\n" in f"\n{finished.stdout}"
    for run in ("vae", "dit"):
        steps = [line["step"] for line in read_metrics(out / run) if "train/loss" in line]
        assert steps == list(range(1, STEPS + 1))


def test_a_killed_demo_goes_on_where_it_was(demo: Demo) -> None:
    assert_went_on(demo.out, demo.finished, "dit")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["render", "ingest", "vae", "encode", "generate"])
def test_killed_in_any_stage_it_makes_the_same(demo: Demo, stage: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert interrupt(out, signal.SIGKILL, stage) == -signal.SIGKILL
    assert_went_on(out, tiny.videodit("demo", "--smoke", "--out", out, timeout=600), stage)
    made = {
        path: digest
        for path, digest in contents(out).items()
        if path.endswith((".mp4", ".tar")) or (path.startswith("model/") and path.endswith(".safetensors"))
    }
    assert len(made) > 60 and made.items() <= demo.before.items()


def test_a_second_demo_on_the_same_folder_is_refused(demo: Demo) -> None:
    assert demo.refused_beside_it == (
        f"--out {demo.out} is in use by process PID: wait for it, or choose another --out"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"smoke": False}, "--smoke is false, but the render stage in --out {out} was begun with true: set it back,"),
        ({"num_clips": 5}, "--num_clips is 5, but the render stage in --out {out} was begun with 4000"),
        ({"num_prompts": 5}, "--num_prompts is 5, but the generate stage"),
        ({"seed": 1}, "--seed is 1, but the render stage"),
        ({"dit_config": "deep.yaml"}, "model.depth of --dit_config is 4, but the dit stage"),
    ],
)
def test_a_demo_of_other_settings_is_refused(demo: Demo, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "deep.yaml").write_text((CONFIGS / "dit_demo.yaml").read_text().replace("  depth: 2", "  depth: 4", 1))
    changes = {name: str(tmp_path / value) if value == "deep.yaml" else value for name, value in changes.items()}
    assert message.format(out=demo.out) in refusal(**({"out": str(demo.out), "smoke": True} | changes))
    assert contents(demo.out) == demo.before


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
    parts = [*STAGES, "measure"]
    assert result["seconds"].keys() == {"total", *parts}
    assert all(value >= 0 for value in result["seconds"].values())
    assert result["seconds"]["total"] == pytest.approx(sum(result["seconds"][name] for name in parts), abs=0.5)
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
    assert interrupt(out, signal.SIGTERM, "dit") == 143
    steps = [line["step"] for line in read_metrics(out / "dit") if "train/loss" in line]
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
