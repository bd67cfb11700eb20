"""The same config with one frame is an image model: encoded, trained and sampled by the same commands."""

from pathlib import Path

import numpy as np

from tests import tiny
from tests.training.test_trainers import metrics
from videodit import cli
from videodit.data.mp4 import encode_mp4
from videodit.data.shapes.render import render
from videodit.data.shapes.world import captions, sample_spec
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import json_bytes
from videodit.data.video_io import probe


def test_one_frame_is_an_image_model(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "shards") as writer:
        for index in range(8):
            spec = sample_spec(np.random.default_rng(index))
            clip = encode_mp4(render(spec, num_frames=1, size=tiny.SIZE), 8.0)
            facts = {"fps": 8.0, "num_frames": 1, "height": tiny.SIZE, "width": tiny.SIZE, "captions": captions(spec)}
            writer.write(f"image-{index}", {"mp4": clip, "json": json_bytes(facts)})
    vae, latents, run, model = (tmp_path / name for name in ("vae", "latents", "run", "model"))
    tiny.make_vae(vae)
    commands = [
        ["encode", "--data.shards", tmp_path / "shards", "--data.buckets", f"[1x{tiny.SIZE}x{tiny.SIZE}]"]
        + ["--vae", vae, "--out", latents, "--device", "cpu"],
        ["train", "dit", "--data.shards", latents, "--run_dir", run, "--max_steps", "8", "--optim.lr", "0.01"]
        + ["--global_batch_size=8", "--micro_batch_size=8", "--optim.warmup_steps=0", *tiny.DIT_OPTIONS]
        + ["--checkpointing=auto", "--condition_rate=0.5"]
        + tiny.RUN_OPTIONS,
        ["export", run, "--out", model],
        ["generate", "--model", model, "--prompt", "a red circle", "--out", tmp_path / "out", "--device", "cpu"],
    ]
    for command in commands:
        assert cli.main([str(word) for word in command]) == 0, command
    losses = [line["train/mse"] for line in metrics(run)]
    assert losses[-1] < losses[0]
    (image,) = (tmp_path / "out").glob("*.mp4")  # its size follows the latents
    info = probe(image)
    assert (info.num_frames, info.height, info.width) == (1, tiny.SIZE, tiny.SIZE)
