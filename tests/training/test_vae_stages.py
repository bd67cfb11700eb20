"""The VAE's progressive stages, and its figures by bucket: of a run from images over clips to several sizes."""

import dataclasses
import json
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import tiny
from tests.training.test_trainers import check_resume, metrics, vae_config
from videodit import VideoVAE, cli
from videodit.data.clip_reader import DataConfig
from videodit.data.loader import ClipLoader
from videodit.data.randomness import batch_digest
from videodit.errors import UserError
from videodit.planning.workload import VAEWorkload
from videodit.training.checkpoint import load_latest
from videodit.training.run import TrainingRun
from videodit.training.run_folder import read_metrics
from videodit.training.stages import stages_of
from videodit.training.vae_config import VAERunConfig, follow_clips
from videodit.training.vae_trainer import export_vae, train_vae

SMALL, MIDDLE, LARGE = "1x16x16", "5x16x16", tiny.BUCKET


def stages(*changes: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    made: tuple[dict[str, Any], ...] = (
        {"steps": 2, "data": {"buckets": [SMALL]}, "global_batch_size": 6},
        {"steps": 2, "data": {"buckets": [MIDDLE], "random_crop": False}},
        {"steps": 2, "micro_batch_size": 1},
    )
    return tuple({**stage, **change} for stage, change in zip(made, changes or ({},) * 3, strict=True))


def staged(run_dir: Path, shards: Path, **changes: Any) -> VAERunConfig:
    config = vae_config(run_dir, shards, max_steps=1000)
    return dataclasses.replace(config, **{"stages": stages(), "eval_shards": str(shards), "eval_clips": 2, **changes})


def digests(config: VAERunConfig, count: int) -> list[str]:
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": config.micro_batch_size}
    loader = ClipLoader(config.data, seed=config.seed, **sizes)
    return [batch_digest(loader.keys(plan)) for plan, _ in islice(loader.iterate(), count)]


@pytest.mark.slow
@pytest.mark.parametrize("at", [2, 3])
def test_stops_inside_stages_and_at_their_borders_change_nothing(tmp_path: Path, shards: Path, at: int) -> None:
    check_resume(lambda folder: train_vae(staged(folder, shards)), tmp_path, signal.SIGTERM, code=143, at=at)


def test_a_run_goes_through_its_stages_and_counts_their_operations(
    tmp_path: Path, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, which counts: each step has the operations of its own bucket and stage."""
    monkeypatch.setattr(TrainingRun, "counts_flops", True)
    config = staged(tmp_path / "run", shards)
    train_vae(config)
    assert config.max_steps == 6
    parts = [stage.config for stage in stages_of(config)]
    assert [part.data.buckets for part in parts] == [[SMALL], [MIDDLE], [LARGE]]
    lines = metrics(tmp_path / "run")
    expected = [digest for part in parts for digest in digests(part, 2)]
    assert [line["data/digest"] for line in lines] == expected and len(set(expected)) == 6
    buckets = [bucket for bucket in (SMALL, MIDDLE, LARGE) for _ in range(2)]
    assert [line["data/bucket"] for line in lines] == buckets
    frozen = json.loads((tmp_path / "run" / "batches.json").read_text())
    assert frozen == {SMALL: 6, f"{MIDDLE} (stage 2)": 4, f"{LARGE} (stage 3)": 4}
    workload = VAEWorkload(config, [SMALL, MIDDLE, LARGE])
    flops = {bucket.name: workload.flops(bucket, "none") for bucket in workload.buckets}
    assert 0 < flops[SMALL] < flops[MIDDLE] < flops[LARGE]
    steps = [line for line in read_metrics(tmp_path / "run") if "train/loss" in line]
    done = [1e12 * line["perf/tflops_per_rank"] * line["perf/step_s"] for line in steps]
    assert done == pytest.approx([flops[SMALL] * 6] * 2 + [flops[MIDDLE] * 4] * 2 + [flops[LARGE] * 4] * 2)
    for line, bucket in zip(steps, buckets, strict=True):  # several buckets: each has a curve of its own
        assert line[f"perf/step_s/{bucket}"] == line["perf/step_s"]
    newest = load_latest(tmp_path / "run")
    assert newest is not None
    # A VAE's latents are measured on the clips of the last stage, which is what they will be made of.
    last = dataclasses.replace(config, stages=(), max_steps=6)
    export_vae(follow_clips(last), newest, tmp_path / "of_last")
    models = [VideoVAE.from_pretrained(folder) for folder in (tmp_path / "run" / "model", tmp_path / "of_last")]
    assert (models[0].latent_std == models[1].latent_std).all()


def make_fields(root: Path) -> Path:
    (root / "fields").mkdir()
    np.save(root / "fields" / "a.npy", np.random.default_rng(0).normal(size=(17, 32, 32, 2)).astype(np.float32))
    out = root / "field_shards"
    assert cli.main(["ingest", str(root / "fields"), "--out", str(out), "--workers=1"]) == 0
    return out


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, shards: Path) -> None:
    def refusal(*changes: dict[str, Any], **settings: Any) -> str:
        with pytest.raises((UserError, ValueError)) as error:
            follow_clips(staged(tmp_path / "run", shards, stages=stages(*changes), **settings))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refusal({}, {"noise": {"shift": 3}}, {}) == (
        "stage 2: noise is not a setting of stages: "
        "these are steps, data, global_batch_size, micro_batch_size, batch_by"
    )
    assert refusal({}, {}, {"data": {"buckets": ["8x32x32"]}}).startswith("stage 3: ")
    assert refusal(max_steps=7) == "max_steps 7 is not the 6 of all stages: leave it out"
    assert refusal(data=DataConfig()).startswith("stage 1: data.shards is not set")
    fields = make_fields(tmp_path)
    assert refusal({}, {"data": {"shards": str(fields)}}, {}).startswith(
        f"stage 2: {fields} has other channels, or other statistics of them, than {shards} of stage 1"
    )


def test_plan_shows_each_stage(tmp_path: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {{latent_channels: 4, channels: [8, 16, 16]}}\nglobal_batch_size: 4\nmicro_batch_size: 2\n"
        f"data: {{shards: {shards}}}\nstages:\n"
        f"- {{steps: 20, data: {{buckets: [{SMALL}]}}}}\n"
        f"- {{steps: 10, global_batch_size: 8, data: {{buckets: [{LARGE}]}}}}\n"
    )
    assert cli.main(["plan", "--config", str(file), "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "stage 1 of 2" in shown and "all stages, 30 steps" in shown and SMALL in shown and LARGE in shown
