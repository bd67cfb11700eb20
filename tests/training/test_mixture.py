"""Two data sets by weight, one of them far away: trained on by the commands that train on one."""

import json
from pathlib import Path

import pytest

from tests import tiny
from tests.training.test_trainers import metrics
from videodit import cli
from videodit.training.checkpoint import load_latest
from videodit.training.run_folder import read_metrics


def run(*words: object) -> int:
    return cli.main([str(word) for word in words])


def test_images_and_videos_have_figures_of_their_own(tmp_path: Path) -> None:
    """An epoch of 8 videos and 8 images at weight 0.5, by 4: two steps and one."""
    clips, vae = tiny.make_shards(tmp_path / "clips"), tiny.make_vae(tmp_path / "vae")
    image = f"1x{tiny.SIZE}x{tiny.SIZE}"
    videos = tiny.make_latents(tmp_path / "videos", clips, vae)
    encode = ["encode", "--data.shards", clips, f"--data.buckets=[{image}]", "--vae", vae, "--device=cpu"]
    assert run(*encode, "--out", tmp_path / "images") == 0
    both = ["--data.shards", f"[{videos},{tmp_path / 'images'}]", "--data.weights=[1,0.5]"]
    dit = ["train", "dit", *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS, "--global_batch_size=4", "--micro_batch_size=2"]
    assert run(*dit, *both, "--run_dir", tmp_path / "run", "--max_steps=6") == 0
    lines = read_metrics(tmp_path / "run")
    assert [sum(line["data/bucket"] == name for line in lines) for name in (tiny.BUCKET, image)] == [4, 2]
    for line in lines:
        own, other = ("image", "video") if line["data/bucket"] == image else ("video", "image")
        assert line[f"train/grad_norm_{own}"] == line["train/grad_norm"] and f"train/grad_norm_{other}" not in line
        assert line[f"perf/step_s/{line['data/bucket']}"] == line["perf/step_s"]
    saved = load_latest(tmp_path / "run")
    assert saved is not None
    assert [saved.state["extra"]["guard"][name] for name in ("applied", "image_applied")] == [4, 2]
    assert run(*dit, "--data.shards", videos, "--run_dir", tmp_path / "one", "--max_steps=1") == 0
    (line,) = read_metrics(tmp_path / "one")
    assert not {"train/grad_norm_video", f"perf/step_s/{tiny.BUCKET}"} & set(line)


@pytest.mark.slow
def test_both_models_train_on_two_sets_one_of_them_remote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    near, far = tiny.make_shards(tmp_path / "near", 4), tiny.make_shards(tmp_path / "far", 6)
    vae = tiny.make_vae(tmp_path / "vae")
    latents = [tiny.make_latents(tmp_path / f"{folder.name}_latents", folder, vae) for folder in (near, far)]
    cache = ["--data.disk_cache", tmp_path / "cache"]
    same = [*cache, "--global_batch_size=3", "--micro_batch_size=3", *tiny.RUN_OPTIONS]
    bucket = f"--data.buckets=[{tiny.BUCKET}]"
    clips = f"[{near},file://{far}]"
    vae_run = ["train", "vae", "--data.shards", clips, "--data.weights=[1,2]", bucket, *tiny.VAE_OPTIONS, *same]
    assert run(*vae_run, "--run_dir", tmp_path / "v", "--max_steps=1") == 0
    assert json.loads((tmp_path / "v/order.json").read_text()) == {"data.streams": 64, "data.weights": [1.0, 2.0]}
    dit = ["train", "dit", "--data.shards", f"[{latents[0]},file://{latents[1]}]", *tiny.DIT_OPTIONS, *same]
    assert run(*dit, "--data.weights=[1,0.5]", "--run_dir", tmp_path / "d", "--max_steps=3") == 0
    assert len({line["data/digest"] for line in metrics(tmp_path / "d")}) == 3  # an epoch: 4 + 3 clips
    encode = ["encode", *cache, bucket, "--vae", vae, "--out", tmp_path / "new", "--device=cpu"]
    capsys.readouterr()
    assert run(*encode, "--data.shards", clips) == 2
    assert "encode takes one folder at a time" in capsys.readouterr().err
    assert run(*encode, "--data.shards", f"file://{far}") == 0
    files = [(folder / "shard-000000.tar").read_bytes() for folder in (latents[1], tmp_path / "new")]
    assert files[0] == files[1]
