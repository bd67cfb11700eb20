"""Fine-tuning with LoRA by the trainer: what is trained, saved, refused, exported."""

import dataclasses
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import tiny
from tests.training.test_trainers import dit_config, metrics
from videodit import TextToVideo, cli
from videodit.errors import UserError
from videodit.models.lora import LoRAConfig
from videodit.training.checkpoint import load_latest, read_full
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_trainer import train_dit
from videodit.training.optim import OptimConfig

LORA = LoRAConfig(rank=2, alpha=4)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    return tiny.make_latents(folder / "latents", tiny.make_shards(folder / "shards"), tiny.make_vae(folder / "vae"))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return tiny.make_model(tmp_path / "model")


def tuning(run_dir: Path, latents: Path, model: Path, **changes: Any) -> DiTRunConfig:
    optim = OptimConfig(lr=1e-2, warmup_steps=0)
    return dit_config(run_dir, latents, **{"init": str(model), "lora": LORA, "optim": optim, **changes})


def test_only_the_updates_learn_and_the_export_has_them(latents: Path, model: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    train_dit(tuning(run, latents, model))
    checkpoint = load_latest(run)
    assert checkpoint is not None
    saved = set(checkpoint.state["shapes"])
    assert saved and all(".down." in name or ".up." in name or name.startswith("level_error") for name in saved)
    assert cli.main(["export", str(run), "--out", str(out)]) == 0
    before, after = (TextToVideo.from_pretrained(folder).model for folder in (model, out))
    average, changed = read_full(checkpoint, "ema0"), 0
    for (name, old), (same, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert name == same
        layer = name.removesuffix(".weight")
        if f"{layer}.up.weight" not in average:
            assert torch.equal(old, new), name
            continue
        update = average[f"{layer}.up.weight"] @ average[f"{layer}.down.weight"]
        torch.testing.assert_close(new, old + LORA.alpha / LORA.rank * update, msg=name)
        changed += not torch.equal(old, new)
    assert changed == 2 * 6 + 4  # both blocks' attention and MLP, and the cross-attention of the spatial one


def test_a_run_that_goes_on_is_one_that_was_not_stopped(latents: Path, model: Path, tmp_path: Path) -> None:
    train_dit(tuning(tmp_path / "straight", latents, model))
    train_dit(tuning(tmp_path / "halves", latents, model, max_steps=3))
    train_dit(tuning(tmp_path / "halves", latents, model))
    assert metrics(tmp_path / "straight") == metrics(tmp_path / "halves")
    one, two = (load_latest(tmp_path / name) for name in ("straight", "halves"))
    assert one is not None and two is not None
    for name, weight in read_full(one, "weight").items():
        assert torch.equal(weight, read_full(two, "weight")[name]), name


def test_other_frozen_weights_are_refused(latents: Path, model: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    train_dit(tuning(run, latents, model, max_steps=1))
    with pytest.raises(UserError, match="lora.alpha: 8, but run_dir .* was trained with 4: set it back"):
        train_dit(tuning(run, latents, model, lora=dataclasses.replace(LORA, alpha=8)))
    other = tmp_path / "other"
    shutil.copytree(model, other)
    train_dit(tuning(tmp_path / "longer", latents, model, max_steps=2))
    assert cli.main(["export", str(tmp_path / "longer"), "--out", str(other)]) == 0
    with pytest.raises(UserError, match="init/dit: .*, but run_dir"):
        train_dit(tuning(run, latents, other))
    with pytest.raises(UserError, match="lora.rank 64 is above the 32 of a layer"):
        train_dit(tuning(tmp_path / "new", latents, model, lora=LoRAConfig(rank=64)))
    with pytest.raises(ValueError, match="lora.rank 2 needs a model to fine-tune: give --init MODEL"):
        dit_config(tmp_path / "new", latents, lora=LORA)


@pytest.mark.parametrize("dtype", ["fp32", pytest.param("bf16", marks=pytest.mark.slow)])
def test_two_ranks_at_zero_3_agree_with_one_at_zero_1(latents: Path, model: Path, tmp_path: Path, dtype: str) -> None:
    losses = []
    for ranks, stage in ((1, 1), (2, 3)):
        run = tmp_path / f"stage-{stage}"
        command = ["train", "dit", "--data.shards", latents, "--init", model, "--run_dir", run, "--lora.rank=2"]
        command += ["--max_steps=4", f"--zero_stage={stage}", f"--dtype={dtype}", "--optim.lr=0.01"]
        command += ["--global_batch_size=4", "--micro_batch_size=2", "--optim.warmup_steps=0", *tiny.RUN_OPTIONS]
        done = subprocess.run(tiny.command(command, ranks=ranks), capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        losses.append([line["train/loss"] for line in metrics(run)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5 if dtype == "fp32" else 1e-2)
    assert losses[0][-1] != losses[0][0]
