"""Fields that are no video, by the real commands: a simulated flow is ingested, learned and generated in its units."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from tests.training.test_trainers import metrics
from videodit import VideoVAE, cli
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.filters import FilterConfig
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.ingest_record import read_statistics
from videodit.data.video_io import probe

FRAMES, SIZE, BUCKET = 9, 32, "9x32x32"
LOWEST = slice(1, 5)  # wavenumbers, periods a side
UNITS = np.array([3e-3, 12.0]), np.array([1e-3, 285.0])  # scale and offset: a tracer, and a temperature in K


def advection_diffusion(seed: int, frames: int = FRAMES) -> np.ndarray:
    """(t, h, w, 2) float64: two smooth periodic fields, each carried along and spread at a rate of its own.

    Each Fourier mode k of du/dt = -v.grad(u) + nu lap(u) is multiplied by exp(-(i v.k + nu k^2) t): exact.
    """
    rng = np.random.default_rng(seed)
    k = 2 * np.pi * np.fft.fftfreq(SIZE)
    ky, kx = k[:, None], k[None, :]
    squared = ky**2 + kx**2
    time = np.arange(frames)[:, None, None]
    fields = []
    for diffusivity in (0.3, 0.1):
        start = np.fft.fft2(rng.standard_normal((SIZE, SIZE))) * np.exp(-4 * squared)
        velocity = rng.uniform(-1, 1, 2)  # pixels a frame
        modes = start * np.exp(-(1j * (velocity[0] * ky + velocity[1] * kx) + diffusivity * squared) * time)
        fields.append(np.fft.ifft2(modes).real)
    return np.stack(fields, axis=-1) * UNITS[0] + UNITS[1]


def spectrum(clips: np.ndarray) -> np.ndarray:
    """(n, t, h, w, c) -> (c, h/2) mean power by radial wavenumber, of what is left without the mean."""
    centred = clips - clips.mean(axis=(0, 1, 2, 3))
    power = np.square(np.abs(np.fft.fft2(centred, axes=(2, 3)))).mean(axis=(0, 1))
    cycles = SIZE * np.fft.fftfreq(SIZE)
    shell = np.rint(np.hypot(cycles[:, None], cycles[None, :])).astype(int)
    return np.array([[power[..., c][shell == k].mean() for k in range(SIZE // 2)] for c in range(clips.shape[-1])])


def run(*commands: list) -> None:
    for command in commands:
        assert cli.main([str(word) for word in command]) == 0, command


def test_fields_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, shards, vae, latents, dit, model, out = (
        tmp_path / name for name in ("raw", "shards", "vae", "latents", "dit", "model", "out")
    )
    raw.mkdir()
    fields = np.stack([advection_diffusion(seed) for seed in range(24)]).astype(np.float32)
    for seed, field in enumerate(fields):
        np.save(raw / f"flow{seed:02d}.npy", field)
        (raw / f"flow{seed:02d}.json").write_text(json.dumps({"caption": "a periodic flow", "fps": 4}))
    steps = [
        "--global_batch_size=8",
        "--micro_batch_size=8",
        "--optim.warmup_steps=0",
        "--dtype=fp32",
        *tiny.RUN_OPTIONS,
    ]
    train_vae = ["train", "vae", "--data.shards", shards, "--data.buckets", f"[{BUCKET}]", "--run_dir", vae]
    train_vae += ["--model.latent_channels=32", "--model.channels=[8,16,16]", "--optim.lr=0.002", *steps]
    train_vae += ["--eval_shards", shards, "--eval_clips=4", "--sample_every=50"]
    run(
        ["ingest", raw, "--out", shards, "--min_frames", FRAMES, "--workers", "1"],
        [*train_vae, "--max_steps=25"],
        [*train_vae, "--max_steps=50"],  # goes on: the statistics in config.yaml are still the same
        ["encode", "--data.shards", shards, "--data.buckets", f"[{BUCKET}]", "--vae", vae / "model", "--out", latents]
        + ["--device=cpu"],
        ["train", "dit", "--data.shards", latents, "--run_dir", dit, "--max_steps=150", "--optim.lr=0.01", *steps]
        + [
            *tiny.DIT_OPTIONS,
            "--sample_every=150",
            "--sampling.num_steps=10",
            "--sampling.guidance_scale=1",
            "--prompts=[a periodic flow]",
        ],
        ["export", dit, "--out", model],
        ["generate", "--model", model, "--prompt", "a periodic flow", "--out", out, "--device=cpu", "--seed=3"],
    )

    # The statistics are those of the data, and arrive in the model to the last bit.
    measured = read_statistics(shards)
    wide = fields.astype(np.float64).reshape(-1, 2)
    np.testing.assert_allclose(measured.mean, wide.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(measured.std, wide.std(axis=0), rtol=1e-10)
    exported = VideoVAE.from_pretrained(model / "vae")
    assert ChannelStatistics.of_vae(exported.config) == measured
    assert exported.config.in_channels == 2

    # Reconstructions, in the units of the data.
    seen = torch.from_numpy(measured.standardise(fields)).permute(0, 4, 1, 2, 3)
    assert seen.std(dim=(0, 2, 3, 4)).tolist() == pytest.approx([1 / 3, 1 / 3], rel=1e-3)
    with torch.no_grad():
        made = measured.restore(exported.decode(exported.encode(seen))).numpy().astype(np.float64)
    assert made.shape == fields.shape
    spread = wide.std(axis=0)
    assert (np.abs(made.mean(axis=(0, 1, 2, 3)) - wide.mean(axis=0)) < 0.05 * spread).all()
    np.testing.assert_allclose(made.var(axis=(0, 1, 2, 3)), spread**2, rtol=0.1)
    ratio = spectrum(made)[:, LOWEST] / spectrum(fields.astype(np.float64))[:, LOWEST]
    assert (ratio > 0.8).all() and (ratio < 1.25).all(), ratio
    error = np.square(made - fields).mean(axis=(0, 1, 2, 3))
    assert (error < 0.02 * spread**2).all()  # and they are these fields, not others with the same statistics

    # Training got better, and shows what it does.
    for folder, name in ((vae, "train/mse"), (dit, "train/mse")):
        values = [line[name] for line in metrics(folder)]
        assert np.mean(values[-3:]) < np.mean(values[:3]), folder
    lines = [json.loads(line) for line in (vae / "metrics.jsonl").read_text().splitlines()]
    assert [line["eval/psnr_db"] for line in lines if "eval/psnr_db" in line][0] > 10
    tiled = probe(vae / "samples" / "step-00000050.mp4")
    assert (tiled.height, tiled.width, tiled.num_frames) == (2 * SIZE, 4 * SIZE, FRAMES)
    assert probe(dit / "samples" / "step-00000150" / "00.mp4").num_frames == FRAMES

    # A generated field: an array in the data's units, a video to look at, and what reproduces it.
    (path,) = out.glob("*.npy")
    field = np.load(path, allow_pickle=False)
    assert (field.shape, field.dtype) == ((FRAMES, SIZE, SIZE, 2), np.float32)
    assert (np.abs(field.mean(axis=(0, 1, 2)) - wide.mean(axis=0)) < 0.5 * spread).all()
    assert (field.std(axis=(0, 1, 2)) > 0.5 * spread).all() and (field.std(axis=(0, 1, 2)) < 2 * spread).all()
    look = probe(path.with_suffix(".mp4"))
    assert (look.num_frames, look.height, look.width) == (FRAMES, SIZE, SIZE)
    assert json.loads(path.with_suffix(".json").read_text())["seed"] == 3

    # inspect shows fields, and the same commands go on from where they were.
    run(["inspect", shards, "--data.buckets", f"[{BUCKET}]"])
    assert "data:video/mp4" in (shards / "inspect.html").read_text()
    assert ingest(raw, shards, IngestConfig(min_frames=FRAMES, workers=1)).up_to_date
    filters = FilterConfig(min_duration_s=2.0)  # 9 frames at 4 a second are longer
    assert ingest(raw, shards, IngestConfig(min_frames=FRAMES, workers=1, filters=filters)).clips == len(fields)
    assert read_statistics(shards) == measured

    # What fields are not for.
    tiny.make_vae(tmp_path / "rgb")
    encode = f"encode --data.shards {shards} --data.buckets [{BUCKET}] --vae {tmp_path}/rgb --out {tmp_path}/new"
    refusals = {
        f"{encode} --device cpu": "holds fields of 2 channels, the model reads videos",
        f"evaluate --model {model}": "makes fields",
        f"train vae --data.shards {shards} --data.buckets [9x40x40] --run_dir {tmp_path}/new {' '.join(steps)}": (
            "a field of 32x32 is smaller than data.buckets 9x40x40"
        ),
    }
    for command, words in refusals.items():
        capsys.readouterr()
        assert cli.main(command.split()) == 2
        assert words in capsys.readouterr().err
