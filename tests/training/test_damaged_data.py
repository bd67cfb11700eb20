"""Data that breaks, or is replaced, under a training."""

import shutil
from dataclasses import replace
from pathlib import Path

from tests.training.test_trainers import dit_config
from videodit.data.shards import ShardSet
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
