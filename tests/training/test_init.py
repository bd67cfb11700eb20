"""Training that starts from a model folder: one of ours, and an imported Wan made factorized."""

import dataclasses
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import tiny
from tests.generation.test_import_wan import PROMPT, SIZE
from tests.generation.test_import_wan import source as _source
from tests.training.test_trainers import dit_config, metrics
from videodit import TextToVideo, VideoDiT, cli
from videodit.errors import UserError
from videodit.models.dit import DiTConfig
from videodit.models.text import ByteTextEncoder
from videodit.training.dit_config import follow_latents
from videodit.training.dit_model import build_model, load_init
from videodit.training.dit_trainer import train_dit
from videodit.training.optim import OptimConfig

source = _source  # the fixture: a tiny Wan as diffusers writes it


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_shards(tmp_path_factory.mktemp("clips") / "shards")


@pytest.fixture(scope="module")
def latents(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoded")
    return tiny.make_latents(folder / "latents", shards, tiny.make_vae(folder / "vae"))


def replace_parameterization(model: Path, folder: Path, prediction: str) -> Path:
    shutil.copytree(model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index["parameterization"]["prediction"] = prediction
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_the_first_step_is_taken_from_the_folder_s_weights(latents: Path, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    other = dataclasses.replace(tiny.DIT, hidden_size=64)  # the folder's shape is what counts
    still = OptimConfig(name="adamw", lr=1e-12, weight_decay=0.0)  # a step that moves nothing
    config = dit_config(tmp_path / "run", latents, init=str(model), model=other, max_steps=1, optim=still)
    assert follow_latents(config).model == tiny.DIT
    clean = replace_parameterization(model, tmp_path / "clean", "x0")
    assert follow_latents(dataclasses.replace(config, init=str(clean))).flow.prediction == "x0"
    train_dit(config)
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    before, after = TextToVideo.from_pretrained(model).model, TextToVideo.from_pretrained(tmp_path / "again").model
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6, msg=name)
    fresh = build_model(follow_latents(config))
    assert not torch.equal(fresh.dit.patch_out.weight, before.dit.patch_out.weight)
    load_init(fresh, str(model))
    assert torch.equal(fresh.dit.patch_out.weight, before.dit.patch_out.weight)


def test_two_ranks_at_zero_3_start_from_the_folder_too(latents: Path, tmp_path: Path) -> None:
    model = tiny.make_model(tmp_path / "model")
    command = ["train", "dit", "--data.shards", latents, "--init", model, "--run_dir", tmp_path / "run"]
    command += [
        "--max_steps=1",
        "--zero_stage=3",
        "--global_batch_size=4",
        "--micro_batch_size=2",
        "--optim.lr=1e-12",
        "--dtype=fp32",
    ]
    done = subprocess.run(tiny.command([*command, *tiny.RUN_OPTIONS], ranks=2), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "again")]) == 0
    before, after = (TextToVideo.from_pretrained(folder).model for folder in (model, tmp_path / "again"))
    for (name, old), new in zip(before.named_parameters(), after.parameters()):
        torch.testing.assert_close(new, old, rtol=0, atol=1e-6, msg=name)


def test_a_folder_that_does_not_fit_is_one_line(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a model folder"):
        train_dit(dit_config(tmp_path / "run", latents, init=str(tmp_path)))
    model = tiny.make_model(tmp_path / "model")
    VideoDiT(DiTConfig(**{**dataclasses.asdict(tiny.DIT), "in_channels": 6})).save_pretrained(model / "dit")
    with pytest.raises(UserError, match="for 6 latent channels, but .* has 4: encode the clips with the VAE"):
        train_dit(dit_config(tmp_path / "run", latents, init=str(model)))
    ByteTextEncoder(tiny.TEXT).save_pretrained(model / "text_encoder")
    (model / "text_encoder" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="frozen text encoder, but .* has no embeddings"):
        train_dit(dit_config(tmp_path / "run", latents, init=str(model)))


def test_an_imported_wan_is_trained_on_factorized_and_sampled(
    source: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """import, encode, train, export, generate: the commands that a user types."""
    model, latents, run = tmp_path / "wan", tmp_path / "latents", tmp_path / "run"
    commands = [
        ["import", "wan", source, "--out", model, "--pattern", "st"],
        ["encode", "--data.shards", shards, "--data.buckets", f"[{tiny.BUCKET}]", "--vae", model / "vae"]
        + ["--text_encoder", source / "text_encoder", "--multiple", "16", "--out", latents, "--device", "cpu"],
        ["train", "dit", "--data.shards", latents, "--init", model, "--run_dir", run, "--max_steps", "6"]
        + ["--global_batch_size", "8", "--micro_batch_size", "8", "--optim.lr", "0.003", "--optim.warmup_steps", "0"]
        + ["--sampling.num_steps", "2", *tiny.RUN_OPTIONS],
        ["export", run, "--out", tmp_path / "out"],
        ["generate", "--model", tmp_path / "out", "--prompt", PROMPT, "--out", tmp_path / "clips", *SIZE],
    ]
    for command in commands:
        assert cli.main([str(word) for word in command]) == 0, capsys.readouterr().err
    losses = [line["train/loss"] for line in metrics(run)]
    assert len(losses) == 6 and losses[-1] < losses[0]
    config = json.loads((tmp_path / "out" / "dit" / "config.json").read_text())
    assert (config["pattern"], config["qk_norm"], config["mask_text"]) == ("st", "all", False)
    assert len(list((tmp_path / "clips").glob("*.mp4"))) == 1
