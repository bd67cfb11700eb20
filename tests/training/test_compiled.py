"""`compile: true` in the trainer, by inductor: eager's losses, and no graph built anew for a size it knows."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from tests import tiny
from videodit.data.latent_reader import LatentDataConfig
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_trainer import train_dit
from videodit.training.optim import OptimConfig
from videodit.training.run_folder import read_metrics
from videodit.training.tracker import TrackerConfig

pytestmark = pytest.mark.slow  # inductor builds C++ for a minute
LENGTHS = (tiny.FRAMES, 5)
STEPS = 6
FIGURES = ("train/loss", "train/mse", "train/grad_norm")


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled")
    shards = tiny.make_shards(folder / "shards", 8, frames=LENGTHS)
    buckets = [f"{count}x{tiny.SIZE}x{tiny.SIZE}" for count in LENGTHS]
    return tiny.make_latents(folder / "latents", shards, tiny.make_vae(folder / "vae"), buckets)


def train(run_dir: Path, latents: Path, **changes: Any) -> list[dict[str, Any]]:
    config = DiTRunConfig(
        run_dir=str(run_dir),
        data=LatentDataConfig(shards=str(latents)),
        model=replace(tiny.DIT, depth=4),
        text=tiny.TEXT,
        optim=OptimConfig(lr=1e-3, warmup_steps=0),
        sampling=tiny.SAMPLING,
        max_steps=STEPS,
        global_batch_size=4,
        micro_batch_size=2,
        save_every=3,
        sample_every=0,
        device="cpu",
        dtype="fp32",
        tracker=TrackerConfig(mode="disabled"),
    )
    torch._dynamo.reset()
    counters.clear()
    train_dit(replace(config, **changes))
    return read_metrics(run_dir)


@pytest.fixture(scope="module")
def eager(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return train(tmp_path_factory.mktemp("eager") / "run", latents)


def assert_alike(lines: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float) -> None:
    assert len(lines) == len(expected) == STEPS
    for line, other in zip(lines, expected):
        assert line["data/digest"] == other["data/digest"]
        for name in FIGURES:
            assert line[name] == pytest.approx(other[name], rel=rel), (name, line["step"])


@pytest.mark.parametrize(("checkpointing", "zero_stage"), [("none", 1), ("full", 1), ("full", 3)])
def test_losses_are_eagers_in_two_buckets_and_graphs_are_few(
    checkpointing: str, zero_stage: int, latents: Path, eager: list[dict[str, Any]], tmp_path: Path
) -> None:
    lines = train(tmp_path / "run", latents, compile=True, checkpointing=checkpointing, zero_stage=zero_stage)
    buckets = [line["data/bucket"] for line in lines]
    assert min(buckets.count(name) for name in set(buckets)) >= 2 == len(set(buckets))
    assert_alike(lines, eager, rel=1e-4)
    # Two kinds of blocks, each for its first size, then for any size, and for any length of texts: no more for steps.
    assert 0 < counters["stats"]["unique_graphs"] <= 2 * 3


def test_a_stopped_run_goes_on_with_the_same_losses(latents: Path, eager: list[dict[str, Any]], tmp_path: Path) -> None:
    train(tmp_path / "run", latents, compile=True, max_steps=3)
    assert_alike(train(tmp_path / "run", latents, compile=True), eager, rel=1e-4)
