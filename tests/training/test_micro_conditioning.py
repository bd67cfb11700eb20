"""Training and sampling with micro-conditions, on latents whose content nothing else tells."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests import tiny
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import write_latent_sample, write_manifest
from videodit.data.shard_writer import ShardWriter
from videodit.flow.noise_level import NoiseLevelConfig
from videodit.flow.path import Parameterization
from videodit.generation.generate import GenerateConfig, generate
from videodit.generation.pipeline import TextToVideo
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_trainer import train_dit
from videodit.training.export import export_run
from videodit.training.optim import OptimConfig
from videodit.training.tracker import TrackerConfig

FAST, SLOW = 24.0, 8.0


def write_latents(folder: Path, vae: Path, first: int) -> Path:
    """One caption for all; latents are 1 everywhere in fast clips and -1 in slow ones."""
    with ShardWriter(folder) as writer:
        for number in range(first, first + 8):
            fps = (SLOW, FAST)[number % 2]
            mean = torch.full((4, 3, 4, 4), 1.0 if fps == FAST else -1.0)
            meta = {"bucket": tiny.BUCKET, "captions": ["a clip"], "fps": fps}
            meta |= {"original_height": 48, "original_width": 96, "crop_top": 0, "crop_left": 16}
            write_latent_sample(writer, f"clip-{number}", mean, torch.full_like(mean, -60.0), meta)
    parts = {"vae": "the same", "text_encoder": None}
    write_manifest(folder, {"clips": str(folder), "buckets": [tiny.BUCKET], **parts}, 8, "clips", vae=str(vae))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """Run folders without and with micro-conditions."""
    root = tmp_path_factory.mktemp("micro")
    vae = tiny.make_vae(root / "vae")
    config = DiTRunConfig(
        run_dir="unused",
        data=LatentDataConfig(shards=str(write_latents(root / "train", vae, 0))),
        eval_shards=str(write_latents(root / "eval", vae, 100)),
        eval_every=40,
        model=replace(tiny.DIT, local_width=0),
        text=tiny.TEXT,
        flow=Parameterization(prediction="x0"),
        noise=NoiseLevelConfig(mean=5.0, std=0.1),  # almost all noise: the latents themselves say next to nothing
        sampling=replace(tiny.SAMPLING, original_height=48, original_width=96, crop_left=16, guidance_scale=1.0),
        optim=OptimConfig(lr=5e-3, warmup_steps=0),
        max_steps=40,
        global_batch_size=8,
        micro_batch_size=8,
        device="cpu",
        dtype="fp32",
        tracker=TrackerConfig(mode="disabled"),
    )
    made = {}
    for told in (False, True):
        model = replace(config.model, micro_conditioning=told)
        made[told] = train_dit(replace(config, run_dir=str(root / f"told-{told}"), model=model))
    return made


def last_metrics(run: Path) -> dict[str, float]:
    """The newest of each figure."""
    figures: dict[str, float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        figures |= json.loads(line)
    return figures


def test_what_only_the_conditions_tell_is_learned(runs: dict[bool, Path]) -> None:
    # Without them the best prediction is 0 for latents of 1 and -1: an error of 1.
    without, told = last_metrics(runs[False]), last_metrics(runs[True])
    for name in ("train/loss", "eval/loss"):
        assert without[name] > 0.9 and told[name] < 0.1, name


def test_samples_follow_the_conditions(runs: dict[bool, Path], tmp_path: Path) -> None:
    export_run(runs[True], tmp_path / "model")
    pipe = TextToVideo.from_pretrained(tmp_path / "model")
    assert pipe.defaults.fps == SLOW
    slow, fast = (pipe.sample_latents(["a clip"], conditions={"fps": fps}).mean() for fps in (SLOW, FAST))
    assert slow < -0.5 and fast > 0.5
    assert torch.equal(pipe.sample_latents(["a clip"]), pipe.sample_latents(["a clip"], conditions={"fps": SLOW}))
    options = {"model": str(tmp_path / "model"), "prompt": ["a clip"], "device": "cpu", "out": str(tmp_path / "out")}
    (path,) = generate(GenerateConfig(**options, fps=FAST, crop_top=4))
    record = json.loads(path.with_suffix(".json").read_text())
    seen = {"original_height": 48, "original_width": 96, "crop_top": 4, "crop_left": 16, "fps": FAST}
    assert seen.items() <= record.items()
