"""Progressive stages: one run over latents of several sizes, its own order, noise and batch in each."""

import dataclasses
import json
import multiprocessing
import signal
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.forked_ranks import wait_until
from tests.training.test_guard import spoil_gradient
from tests.training.test_trainers import check_resume, dit_config, metrics, stop_at
from videodit import cli
from videodit.config import load_yaml
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.loader import LatentLoader
from videodit.data.randomness import batch_digest
from videodit.errors import UserError
from videodit.flow.noise_level import NoiseLevelConfig
from videodit.training.dit_config import DiTRunConfig, follow_latents
from videodit.training.dit_trainer import train_dit
from videodit.training.guard import GuardConfig
from videodit.training.stages import stages_of

SMALL, LARGE = "1x16x16", tiny.BUCKET


def encode(clips: Path, vae: Path, out: Path, bucket: str) -> Path:
    words = ["encode", "--data.shards", clips, f"--data.buckets=[{bucket}]", "--vae", vae, "--out", out, "--device=cpu"]
    assert cli.main([str(word) for word in words]) == 0
    return out


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of the same clips: small images, and videos; and images by another VAE."""
    root = tmp_path_factory.mktemp("stages")
    clips, vae = tiny.make_shards(root / "clips"), tiny.make_vae(root / "vae")
    sets = {name: encode(clips, vae, root / name, name) for name in (SMALL, LARGE)}
    other = root / "other"
    vae_run = ["train", "vae", "--run_dir", other, "--data.shards", clips, f"--data.buckets=[{LARGE}]", "--max_steps=1"]
    vae_run += ["--global_batch_size=2", "--micro_batch_size=2", *tiny.VAE_OPTIONS, *tiny.RUN_OPTIONS]
    assert cli.main([str(word) for word in vae_run]) == 0
    return sets | {"other": encode(clips, other / "model", root / "of_other", SMALL)}


def stages(latents: dict[str, Path], *changes: dict[str, Any]) -> tuple[dict[str, Any], ...]:
    """Two steps of images, two of images and videos, two of videos."""
    small, large = str(latents[SMALL]), str(latents[LARGE])
    made: tuple[dict[str, Any], ...] = (
        {"steps": 2, "data": {"shards": small}, "noise": {"shift": 1.0}, "global_batch_size": 6},
        {"steps": 2, "data": {"shards": [small, large], "weights": [1.0, 2.0]}, "crop": {"size": [2, 2], "share": 0.5}},
        {"steps": 2, "data": {"shards": large}, "noise": {"shift": 5.0}, "micro_batch_size": 1},
    )
    return tuple({**stage, **change} for stage, change in zip(made, changes or ({},) * 3, strict=True))


def staged(run_dir: Path, latents: dict[str, Path], **changes: Any) -> DiTRunConfig:
    config = dit_config(run_dir, latents[SMALL], noise=NoiseLevelConfig(mean=0.5), max_steps=1000)
    return dataclasses.replace(config, **{"data": LatentDataConfig(), "stages": stages(latents), **changes})


def digests(config: DiTRunConfig, first: int, count: int) -> list[str]:
    """Of the steps from the first one on of the order that a run of this config alone would have."""
    sizes = {"global_batch_size": config.global_batch_size, "micro_batch_size": config.micro_batch_size}
    loader = LatentLoader(config.data, seed=config.seed, **sizes)
    return [batch_digest(loader.keys(plan)) for plan, _ in islice(loader.iterate(first), count)]


def test_a_stage_is_the_run_with_what_it_sets(tmp_path: Path, latents: dict[str, Path]) -> None:
    config = staged(tmp_path / "run", latents)
    assert config.max_steps == 6
    parts = [stage.config for stage in stages_of(config)]
    assert [part.noise for part in parts] == [NoiseLevelConfig(mean=0.5, shift=shift) for shift in (1.0, 3.0, 5.0)]
    assert [(part.max_steps, part.global_batch_size, part.micro_batch_size) for part in parts] == [
        (2, 6, 2),
        (2, 4, 2),
        (2, 4, 1),
    ]
    assert [part.crop_steps for part in parts] == [0, 1, 0] and [part.seed for part in parts] == [0, 1, 2]
    config = dataclasses.replace(
        config, data=LatentDataConfig(cache_gib=0.0, num_workers=1)
    )  # of a stage its worker ends with it
    train_dit(config)
    wait_until(lambda: not multiprocessing.active_children())
    lines = metrics(tmp_path / "run")
    expected = [digest for part in parts for digest in digests(part, 1, 2)]
    assert [line["data/digest"] for line in lines] == expected and len(set(expected)) == 6
    buckets = [line["data/bucket"] for line in lines]
    assert buckets[:2] == [SMALL] * 2 and buckets[4:] == [LARGE] * 2
    frozen = json.loads((tmp_path / "run" / "batches.json").read_text())
    both = {f"{SMALL} (stage 2)": 4, f"{LARGE} (stage 2)": 4}
    assert frozen == {SMALL: 6, **both, f"{LARGE} (stage 3)": 4}
    again = load_yaml(DiTRunConfig, tmp_path / "run" / "config.yaml")
    sampling = again.sampling
    assert again.stages == config.stages and (sampling.num_frames, sampling.height) == (tiny.FRAMES, tiny.SIZE)


@pytest.mark.parametrize("at", [2, *(pytest.param(at, marks=pytest.mark.slow) for at in (1, 3, 4, 5))])
def test_stops_inside_stages_and_at_their_borders_change_nothing(
    tmp_path: Path, latents: dict[str, Path], at: int
) -> None:
    check_resume(lambda folder: train_dit(staged(folder, latents)), tmp_path, signal.SIGTERM, code=143, at=at)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_rollback_over_a_border_leaves_the_data_out_in_both_stages(
    tmp_path: Path, latents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 2 and 3 fail: back to 1, and on with the fourth step's data of stage 1, then from the third of stage 2."""
    spoil_gradient(monkeypatch, float("inf"), lambda data_step: data_step in (2, 3))
    guard = GuardConfig(max_skipped_in_row=2)

    def run(folder: Path) -> Path:
        return train_dit(staged(folder, latents, guard=guard, save_every=1))

    check_resume(run, tmp_path, signal.SIGTERM, code=143, at=4)
    first, second, third = (stage.config for stage in stages_of(staged(tmp_path, latents)))
    expected = digests(first, 1, 1) + digests(first, 4, 1) + digests(second, 3, 2) + digests(third, 3, 2)
    assert [line["data/digest"] for line in metrics(tmp_path / "straight")] == expected


@pytest.mark.slow
def test_only_what_has_not_begun_may_change(
    tmp_path: Path, latents: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that had no stages when it began takes them on as one whose first stage it was."""
    small = LatentDataConfig(shards=str(latents[SMALL]))
    train_dit(staged(tmp_path / "run", latents, stages=(), data=small, max_steps=2, global_batch_size=6))
    with monkeypatch.context() as injected, pytest.raises(SystemExit):
        stop_at(3, signal.SIGTERM, injected)
        train_dit(staged(tmp_path / "run", latents))
    for changes, message in (
        (({}, {"global_batch_size": 3}, {}), r"clips a step of .* \(stage 2\): 3, but .* was trained with 4: set"),
        (({"steps": 1}, {}, {}), r"steps before \(stage 2\): 1, but .* was trained with 2: set it back"),
    ):
        with pytest.raises(UserError, match=message):
            train_dit(staged(tmp_path / "run", latents, stages=stages(latents, *changes)))
    train_dit(staged(tmp_path / "run", latents, stages=stages(latents, {}, {"steps": 3}, {"global_batch_size": 2})))
    assert len(metrics(tmp_path / "run")) == 7


def test_what_cannot_be_is_refused_in_one_line(tmp_path: Path, latents: dict[str, Path]) -> None:
    def refusal(*changes: dict[str, Any], **settings: Any) -> str:
        with pytest.raises((UserError, ValueError)) as error:
            follow_latents(staged(tmp_path / "run", latents, stages=stages(latents, *changes), **settings))
        assert "\n" not in str(error.value)
        return str(error.value)

    assert refusal({"steps": 0}, {}, {}) == "stage 1: steps 0 is not a number of steps: give for example steps: 1000"
    assert refusal({}, {"optim": {"lr": 1}}, {}).startswith(
        "stage 2: optim is not a setting of stages: these are steps,"
    )
    assert "did you mean noise.shift" in refusal({}, {}, {"noise": {"shfit": 5.0}})
    assert refusal({}, {}, {"noise": {"shift": 0.0}}).startswith(
        "stage 3: shift 0.0 of the noise levels is not positive"
    )
    assert refusal({}, {"data": {}}, {}).startswith("stage 2: data.shards is not set")
    assert refusal(max_steps=7) == "max_steps 7 is not the 6 of all stages: leave it out"
    assert refusal(late_share=0.5).startswith("late_share 0.5 does not go with stages: leave it out")
    assert "was made by another VAE than" in refusal({}, {}, {"data": {"shards": str(latents["other"])}})
    patch = dataclasses.replace(tiny.DIT, patch_size=(1, 4, 4))
    assert f"bucket {SMALL}: change the patch" in refusal({}, {"crop": {}}, {}, model=patch)


def test_plan_shows_each_stage(tmp_path: Path, latents: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """From a YAML file, as a user writes it."""
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: {{hidden_size: 32, depth: 2, num_heads: 2}}\nglobal_batch_size: 4\nmicro_batch_size: 2\nstages:\n"
        f"- {{steps: 20, data: {{shards: {latents[SMALL]}}}, noise: {{shift: 3}}}}\n"
        f"- {{steps: 10, data: {{shards: {latents[LARGE]}}}, noise: {{shift: 5}}, global_batch_size: 8}}\n"
    )
    assert cli.main(["plan", "--config", str(file), "--gpu", "h100"]) == 0
    shown = capsys.readouterr().out
    assert "stage 1 of 2" in shown and "stage 2 of 2" in shown and "all stages, 30 steps" in shown
    assert SMALL in shown and LARGE in shown and "20 steps:" in shown and "10 steps:" in shown
    assert cli.main(["plan", "--config", str(file), "--gpus", "5"]) == 2
    assert "stage 1: global_batch_size 4 leaves 1 of 5 GPUs without a clip" in capsys.readouterr().err
