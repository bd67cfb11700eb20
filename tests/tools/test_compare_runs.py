"""tools/compare_runs.py on real runs: what is the same, what is not, and since when."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from tools.compare_runs import main, relative_difference
from videodit.data.latent_reader import LatentDataConfig
from videodit.training.checkpoint import digest_of, steps_in
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_trainer import train_dit
from videodit.training.optim import OptimConfig
from videodit.training.tracker import TrackerConfig

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DiTRunConfig:
    root = tmp_path_factory.mktemp("encoded")
    latents = tiny.make_latents(root / "latents", tiny.make_shards(root / "shards"), tiny.make_vae(root / "vae"))
    return DiTRunConfig(
        run_dir=str(root / "run"),
        max_steps=3,
        global_batch_size=4,
        micro_batch_size=2,
        device="cpu",
        dtype="fp32",
        optim=OptimConfig(warmup_steps=0),  # else the first step changes no weight
        tracker=TrackerConfig(mode="disabled"),
        data=LatentDataConfig(shards=str(latents)),
        model=tiny.DIT,
        text=tiny.TEXT,
        sampling=tiny.SAMPLING,
    )


@pytest.fixture(scope="module")
def run(config: DiTRunConfig) -> Path:
    return train_dit(config)


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "copy")


def change_line(run_dir: Path, step: int, change: Callable[[dict], object]) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["step"] == step:
            change(line)
    (run_dir / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines if line))


def nudge_weight(run_dir: Path, factor: float) -> float:
    """Scales one weight of the last checkpoint, its manifest too; returns the change over the norm of all weights."""
    folder = run_dir / f"checkpoints/step-{steps_in(run_dir)[-1]:08d}"
    file = folder / "rank-00000.safetensors"
    tensors = load_file(file)
    weights = {key: tensor for key, tensor in tensors.items() if key.startswith("weight/")}
    norm = float(torch.cat(list(weights.values())).norm())
    key = max(weights, key=lambda key: float(weights[key].abs().max()))
    element = int(tensors[key].abs().argmax())
    change = abs(float(tensors[key][element]) * (factor - 1))
    tensors[key][element] *= factor
    save_file(tensors, file)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][file.name] = digest_of(file)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return change / norm


def test_two_equal_runs_are_identical(
    config: DiTRunConfig, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = train_dit(replace(config, run_dir=str(tmp_path / "again")))
    assert main([str(run), str(again)]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "identical"
    assert "setting" not in said
    count = len(json.loads((run / "checkpoints/step-00000003/state.json").read_text())["shapes"])
    assert f"weights of step 3: {count} of {count} parameters are bit-equal" in said


def test_another_seed_differs_from_the_first_step(
    config: DiTRunConfig, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = train_dit(replace(config, run_dir=str(tmp_path / "other"), seed=1, max_steps=2, save_every=1))
    assert main([str(run), str(other), "--rtol", "1e-6"]) == 1
    said = capsys.readouterr().out
    names = "train/loss, train/mse, train/grad_norm, data/digest"
    assert said.splitlines()[-1] == f"they differ: first at step 1, in {names}"
    assert "setting seed: A 0, B 1" in said and "setting max_steps: A 3, B 2" in said
    assert "A ends at step 3, B at step 2" in said
    assert "no step has a checkpoint in both" in said  # 3, and 1 and 2


def test_rounding_passes_with_a_tolerance_only(
    config: DiTRunConfig, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One micro batch a step instead of two: the same sums in another order."""
    other = train_dit(replace(config, run_dir=str(tmp_path / "other"), micro_batch_size=4))
    assert main([str(run), str(other)]) == 1
    assert "setting micro_batch_size: A 2, B 4" in capsys.readouterr().out
    assert main([str(run), str(other), "--rtol", "1e-2"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("alike within rtol 0.01: the largest difference is ")


@pytest.mark.parametrize("name", ["train/loss", "train/mse", "train/grad_norm", "data/digest"])
def test_the_first_step_and_figure_that_differ_are_named(
    run: Path, copy: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {"data/digest": "0" * 64}
    change_line(copy, 2, lambda line: line.update({name: change.get(name, None)}))  # null: it was not finite
    assert main([str(run), str(copy), "--rtol", "1e9"]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == f"they differ: first at step 2, in {name}"


def test_a_difference_counts_from_the_tolerance_on(run: Path, copy: Path) -> None:
    change_line(copy, 3, lambda line: line.update({"train/loss": line["train/loss"] * 1.001}))
    assert main([str(run), str(copy), "--rtol", "0.0011"]) == 0
    assert main([str(run), str(copy), "--rtol", "0.0009"]) == 1


def test_a_step_that_is_missing_in_the_middle_counts_and_one_at_the_end_does_not(
    run: Path, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_line(copy, 3, dict.clear)
    assert main([str(run), str(copy)]) == 0
    assert "A ends at step 3, B at step 2" in capsys.readouterr().out
    change_line(copy, 1, dict.clear)
    assert main([str(run), str(copy)]) == 1
    assert "first at step 1, in train/loss, train/mse" in capsys.readouterr().out


def test_one_weight_that_differs_is_found(run: Path, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    apart = nudge_weight(copy, 1.01)
    assert main([str(run), str(copy), "--rtol", str(0.99 * apart)]) == 1
    said = capsys.readouterr().out
    assert said.splitlines()[-1] == "they differ: first at step 3, in weights"
    assert re.search(r"│ 1 +│ 0\.0099 ", said)  # one element differs, by 0.01 / 1.01 of the parameter's largest
    assert main([str(run), str(copy), "--rtol", str(1.01 * apart)]) == 0


def test_a_weight_that_is_no_number_is_no_tolerance(run: Path, copy: Path) -> None:
    nudge_weight(copy, float("nan"))
    assert main([str(run), str(copy), "--rtol", "1e9"]) == 1


def test_other_models_differ_in_their_shapes(
    run: Path, config: DiTRunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = replace(tiny.DIT, depth=4)
    other = train_dit(replace(config, run_dir=str(tmp_path / "other"), model=model))
    assert main([str(run), str(other), "--rtol", "1e9"]) == 1
    said = capsys.readouterr().out
    assert "setting model.depth: A 2, B 4" in said
    assert said.splitlines()[-1] == "they differ: first at step 3, in weights"


def damage_checkpoint(folder: Path) -> None:
    file = folder / "checkpoints/step-00000003/rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))


BAD_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "gone": (shutil.rmtree, "is not a folder"),
    "no metrics": (lambda folder: (folder / "metrics.jsonl").unlink(), "has no steps in metrics.jsonl"),
    "torn metrics": (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 1, "tr'), "has no steps"),
    "binary metrics": (lambda folder: (folder / "metrics.jsonl").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "no config": (lambda folder: (folder / "config.yaml").unlink(), "config.yaml cannot be read"),
    "torn config": (lambda folder: (folder / "config.yaml").write_text("a: ["), "config.yaml cannot be read"),
    "empty config": (lambda folder: (folder / "config.yaml").write_text(""), "config.yaml has no settings"),
    "other kind": (lambda folder: (folder / "config.yaml").write_text("model: 1"), "give two of one kind"),
    "damaged checkpoint": (damage_checkpoint, "rank-00000.safetensors is damaged"),
    "other steps": (lambda folder: (folder / "metrics.jsonl").write_text('{"step": 9, "train/loss": 1}'), "no step is"),
}


@pytest.mark.parametrize("damage, message", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_a_folder_that_cannot_be_compared_is_one_line(
    run: Path, copy: Path, damage: Callable[[Path], object], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    for pair in ([run, copy], [copy, run]):
        assert main([str(folder) for folder in pair]) == 2
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.count("\n") == 1 and message in line


def test_the_command_line(run: Path, tmp_path: Path) -> None:
    for arguments, code in (([run, run], 0), ([run, tmp_path / "none"], 2), ([run, run, "--rtol=-1"], 2)):
        done = subprocess.run(
            [sys.executable, ROOT / "tools/compare_runs.py", *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == code, done.stderr
        assert "Traceback" not in done.stderr


def test_relative_difference() -> None:
    assert relative_difference(2.0, 1.0) == relative_difference(-1.0, -2.0) == 0.5
    assert relative_difference(1.0, -1.0) == 2.0
    assert relative_difference(None, None) == relative_difference(0, 0.0) == 0.0
    assert relative_difference(None, 1.0) == relative_difference("a", "b") == float("inf")
    assert relative_difference(0.0, 1e-30) == 1.0
