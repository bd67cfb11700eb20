"""Two data sets by weight, one of them far away: trained on by the commands that train on one."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.training.test_trainers import metrics
from videodit import cli


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_both_models_train_on_two_sets_one_of_them_remote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near, far = tiny.make_shards(tmp_path / "near", 4), tiny.make_shards(tmp_path / "far", 6)
    vae = tiny.make_vae(tmp_path / "vae")
    latents = [tiny.make_latents(tmp_path / f"{folder.name}_latents", folder, vae) for folder in (near, far)]
    same = ["--data.weights", "[1,0.5]", "--data.disk_cache", tmp_path / "cache", *tiny.RUN_OPTIONS]
    same += ["--global_batch_size=3", "--micro_batch_size=3"]
    bucket = f"--data.buckets=[{tiny.BUCKET}]"
    clips = f"[{near},file://{far}]"
    assert run("train", "vae", "--data.shards", clips, bucket, "--run_dir", tmp_path / "v", "--max_steps=3", *same,
               *tiny.VAE_OPTIONS) == 0  # fmt: skip
    assert json.loads((tmp_path / "v/order.json").read_text()) == {"data.streams": 64, "data.weights": [1.0, 0.5]}
    dit = ["train", "dit", "--data.shards", f"[{latents[0]},file://{latents[1]}]", *tiny.DIT_OPTIONS, *same]
    assert run(*dit, "--run_dir", tmp_path / "once", "--max_steps=6") == 0
    assert run(*dit, "--run_dir", tmp_path / "twice", "--max_steps=4") == 0
    assert run(*dit, "--run_dir", tmp_path / "twice", "--max_steps=6") == 0
    digests = [[line["data/digest"] for line in metrics(tmp_path / name)] for name in ("once", "twice")]
    assert digests[0] == digests[1] and len(set(digests[0])) == 6  # two epochs of 3 steps: 4 + 3 clips
    capsys.readouterr()
    for change, words in (
        ("--data.weights=[1,1]", "data.weights: [1.0, 1.0], but run_dir"),
        ("--data.streams=8", "data.streams: 8, but run_dir"),
    ):
        assert run(*dit, "--run_dir", tmp_path / "twice", "--max_steps=8", change) == 2
        assert words in capsys.readouterr().err
    assert run("encode", "--data.shards", clips, "--data.disk_cache", tmp_path / "cache", bucket, "--vae", vae, "--out",
               tmp_path / "new") == 2  # fmt: skip
    assert "encode takes one folder at a time" in capsys.readouterr().err
    assert run("encode", "--data.shards", f"file://{far}", "--data.disk_cache", tmp_path / "cache", bucket, "--vae",
               vae, "--out", tmp_path / "new", "--device=cpu") == 0  # fmt: skip
    files = [(folder / "shard-000000.tar").read_bytes() for folder in (latents[1], tmp_path / "new")]
    assert files[0] == files[1]
