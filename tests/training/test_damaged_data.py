"""Data that breaks, or is replaced, under a training."""

import shutil
from dataclasses import replace
from pathlib import Path

import torch

from tests import tiny
from tests.forked_ranks import Ranks, steps_of, wait_until
from tests.training.test_trainers import dit_config
from videodit.data.shards import ShardSet
from videodit.models.vae import VideoVAE
from videodit.training.dit_trainer import train_dit
from videodit.training.run_folder import read_metrics


def test_samples_that_cannot_be_read_are_counted_over_the_run(latents: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "latents"
    shutil.copytree(latents, damaged)
    entry = ShardSet.open(damaged).entries[3]
    with open(damaged / entry.shard, "r+b") as shard:
        shard.seek(entry.members["safetensors"][0])
        shard.write(b"\xff" * 8)
    config = dit_config(tmp_path / "run", damaged, global_batch_size=4, save_every=3)  # two steps an epoch
    for steps in (3, 6):  # the second one goes on in the middle of an epoch
        train_dit(replace(config, max_steps=steps))
    counts = [line["data/failed"] for line in read_metrics(tmp_path / "run")]
    assert counts[1::2] == [1, 2, 3] and counts == sorted(counts)
    log = (tmp_path / "run/train.log").read_text()
    assert log.count(f"sample {entry.key} is left out") == 3
    assert "3 times in this run a sample could not be read" in log


def test_latents_that_another_vae_replaces_end_the_run(ranks: Ranks, shards: Path, tmp_path: Path) -> None:
    """The tars keep their names and sizes; a run that reads them from the disk must not go on with other latents."""
    latents = tiny.make_latents(tmp_path / "latents", shards, tiny.make_vae(tmp_path / "vae"))
    torch.manual_seed(1)
    VideoVAE(tiny.VAE).save_pretrained(tmp_path / "other")
    options = ["--max_steps=100000", "--save_every=100000", "--sample_every=0", "--global_batch_size=4"]
    data = [f"--data.shards={latents}", "--data.cache_gib=0", "--data.num_workers=1", "--micro_batch_size=2"]
    argv = ["train", "dit", f"--run_dir={tmp_path / 'run'}", *data, *options, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS]
    (rank,) = ranks.start(argv, 1)
    wait_until(lambda: steps_of(tmp_path / "run") > 0, lambda: rank.stderr)
    sizes = {path.name: path.stat().st_size for path in latents.glob("*.tar")}
    tiny.make_latents(latents, shards, tmp_path / "other")
    assert {path.name: path.stat().st_size for path in latents.glob("*.tar")} == sizes
    assert rank.wait() == 2, rank.stderr
    (line,) = rank.lines
    assert "was written anew while it was in use: run the same command again" in line
    assert "Traceback" not in rank.stderr
