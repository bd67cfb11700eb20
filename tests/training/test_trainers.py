"""The two trainers: a run that was stopped goes on bit for bit, whatever stopped it; samples and exports come out."""

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange

from tests import tiny
from tests.training import wandb_files
from tests.training.toy import assert_same, whole
from videodit import TextToVideo, VideoVAE
from videodit.data.batches import LatentBatch
from videodit.data.buckets import parse_bucket
from videodit.data.clip_reader import DataConfig
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.loader import ClipLoader, clips_in_order
from videodit.data.mixture import open_shards
from videodit.data.mp4 import encode_mp4
from videodit.data.transforms import to_pixels
from videodit.data.video_io import read_frames
from videodit.errors import UserError
from videodit.flow.noise_level import GIVEN_BELOW, NoiseLevelConfig
from videodit.flow.path import Parameterization
from videodit.generation.encode import EncodeConfig, encode_clips
from videodit.generation.generate import GenerateConfig, generate
from videodit.generation.pipeline import RowNoise, read_parameterization
from videodit.models.level_error import KNOTS
from videodit.planning.workload import DiTWorkload
from videodit.training import checkpoint_writer, vae_trainer
from videodit.training import tracker as tracker_module
from videodit.training.checkpoint import Checkpoint, folder_of, load_latest, read_full, steps_in
from videodit.training.dit_config import DiTRunConfig, RunSampling, follow_latents
from videodit.training.dit_model import build_model
from videodit.training.dit_trainer import make_noisy, train_dit
from videodit.training.ema import beta_of, gamma_of
from videodit.training.export import export_run
from videodit.training.meters import PEAK_FLOPS
from videodit.training.optim import OptimConfig
from videodit.training.run import TrainingRun
from videodit.training.run_folder import read_metrics
from videodit.training.tracker import TrackerConfig
from videodit.training.vae_config import VAERunConfig
from videodit.training.vae_objective import VAEObjective
from videodit.training.vae_trainer import measure_latent_statistics, train_vae

ROOT = Path(__file__).parents[2]
SLOW = pytest.mark.slow
STEPS = 6
RUN: dict[str, Any] = {
    "max_steps": STEPS,
    "global_batch_size": 4,
    "micro_batch_size": 2,
    "device": "cpu",
    "dtype": "fp32",
    "tracker": TrackerConfig(mode="disabled"),
}
PEAK = 1e12  # FLOP/s
# What may differ between two runs of the same thing: times.
TIMES = ("perf/", "data/wait_s")


def vae_config(run_dir: Path, shards: Path, **changes: Any) -> VAERunConfig:
    data = DataConfig(shards=str(shards), buckets=[tiny.BUCKET])
    config = VAERunConfig(run_dir=str(run_dir), data=data, model=tiny.VAE, optim=OptimConfig(lr=1e-3), **RUN)
    return replace(config, **changes)


def dit_config(run_dir: Path, latents: Path, **changes: Any) -> DiTRunConfig:
    data = LatentDataConfig(shards=str(latents))
    optim = OptimConfig(name="muon", lr=1e-3, schedule="linear")
    sampling = replace(tiny.SAMPLING, num_frames=17)  # the latents decide
    config = DiTRunConfig(
        run_dir=str(run_dir),
        data=data,
        model=tiny.DIT,
        text=tiny.TEXT,
        optim=optim,
        weighting="learned",
        sampling=sampling,
        **RUN,
    )
    return replace(config, **changes)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, one a step, without times."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    return [{name: value for name, value in line.items() if not name.startswith(TIMES)} for line in lines]


def stop_at(step: int, signal_number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Injects a signal to this process right after a step's figures were logged."""
    log = TrainingRun.log

    def log_and_signal(run: TrainingRun, figures: dict[str, Any]) -> None:
        log(run, figures)
        if run.step == step:
            os.kill(os.getpid(), signal_number)

    monkeypatch.setattr(TrainingRun, "log", log_and_signal)


def check_resume(
    run: Callable[[Path], Any], tmp_path: Path, *signals: int, code: int | None, at: int = STEPS // 2 + 1
) -> None:
    """Runs straight, and again with a stop on the way: same figures and same bits in the end."""
    run(tmp_path / "straight")
    with pytest.MonkeyPatch.context() as monkeypatch:
        for number in signals:
            stop_at(at, number, monkeypatch)
        with pytest.raises(KeyboardInterrupt if code is None else SystemExit) as stopped:
            run(tmp_path / "resumed")
    assert code is None or stopped.value.code == code  # type: ignore[attr-defined]
    run(tmp_path / "resumed")
    assert [line["step"] for line in metrics(tmp_path / "resumed")] == list(range(1, STEPS + 1))
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "straight")
    straight, resumed = load_latest(tmp_path / "straight"), load_latest(tmp_path / "resumed")
    assert straight is not None and resumed is not None and straight.step == resumed.step == STEPS
    assert_same(whole(straight), whole(resumed))


def stages(*quick: tuple[int, str]) -> pytest.MarkDecorator:
    """Every ZeRO stage and number format that go together; those that are not named are slow."""
    cases = [(0, "fp32"), *itertools.product((1, 2, 3), ("fp32", "bf16"))]
    marked = [pytest.param(*case, marks=() if case in quick else SLOW) for case in cases]
    return pytest.mark.parametrize(("zero_stage", "dtype"), marked)


@stages((1, "fp32"), (2, "bf16"))
def test_train_vae_stopped_by_sigterm_goes_on_bit_for_bit(
    shards: Path, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    def run(folder: Path) -> Path:
        return train_vae(vae_config(folder, shards, zero_stage=zero_stage, dtype=dtype))

    check_resume(run, tmp_path, signal.SIGTERM, code=143)
    straight, resumed = (VideoVAE.from_pretrained(tmp_path / name / "model") for name in ("straight", "resumed"))
    assert_same(straight.state_dict(), resumed.state_dict())  # the latents' statistics too


@stages((1, "fp32"), (3, "bf16"))
def test_train_dit_stopped_by_sigterm_goes_on_bit_for_bit(
    latents: Path, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    def run(folder: Path) -> Path:
        noise = NoiseLevelConfig(frame_slope=2.0)
        levels = {"noise": noise, "late_noise": NoiseLevelConfig(mean=1.0), "late_share": 0.5}
        windows = LatentCropConfig(size=(2, 4), share=0.8)
        optim = OptimConfig(name="muon" if zero_stage else "adamw", lr=1e-3, schedule="linear")
        stage = {"zero_stage": zero_stage, "dtype": dtype, "optim": optim}
        return train_dit(dit_config(folder, latents, condition_rate=0.5, crop=windows, **levels, **stage))

    check_resume(run, tmp_path, signal.SIGTERM, code=143)


@SLOW
@pytest.mark.parametrize("changes", [{"offload_optimizer": True, "zero_stage": 2}, {"optim": OptimConfig("adamw8bit")}])
def test_train_dit_with_other_moments_goes_on_bit_for_bit(
    latents: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """In host memory, or in 8 bits."""

    def run(folder: Path) -> Path:
        return train_dit(dit_config(folder, latents, **{"optim": OptimConfig(lr=1e-3), **changes}))

    check_resume(run, tmp_path, signal.SIGTERM, code=143)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Python's own handler: a shell that starts the tests in the background has them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_train_dit_stopped_by_ctrl_c_loses_no_step(
    latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    check_resume(lambda folder: train_dit(dit_config(folder, latents)), tmp_path, signal.SIGINT, code=130)
    assert "Ctrl-C again stops at once" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_train_dit_cut_off_goes_on_from_the_last_checkpoint(
    latents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second Ctrl-C leaves no checkpoint: steps since the last one are run again, with the same figures."""
    interrupts = (signal.SIGINT, signal.SIGINT)
    check_resume(lambda folder: train_dit(dit_config(folder, latents, save_every=2)), tmp_path, *interrupts, code=None)
    said = [line for line in capfd.readouterr().err.splitlines() if "goes on" in line]
    assert said == ["train resumed: goes on from step 2 of 6; 2 later steps are made again"]


def test_the_time_of_a_run_goes_on_over_its_starts(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """perf/wall_s counts steps that a crash has cost too, and is part of a checkpoint."""
    config = vae_config(tmp_path / "run", shards, save_every=3)
    figures = tmp_path / "run/metrics.jsonl"

    def crash_at(step: int) -> None:
        def log_and_crash(run: TrainingRun, line: dict[str, Any]) -> None:
            log(run, line)
            if run.step == step:
                raise RuntimeError("injected")

        with monkeypatch.context() as injected, pytest.raises(RuntimeError, match="injected"):
            injected.setattr(TrainingRun, "log", log_and_crash)
            train_vae(config)

    def seconds() -> list[float]:
        return [line["perf/wall_s"] for line in read_metrics(tmp_path / "run")]

    log = TrainingRun.log
    crash_at(2)  # before there is a checkpoint
    assert 0 < seconds()[0] < seconds()[1]
    *first, last = read_metrics(tmp_path / "run")
    figures.write_text("".join(f"{json.dumps(line)}\n" for line in (*first, last | {"perf/wall_s": 1000.0})))
    capfd.readouterr()
    crash_at(5)
    said = "train run: no checkpoint was written yet, so it starts from step 0; 2 steps are made again\n"
    assert said in capfd.readouterr().err
    assert seconds() == sorted(seconds()) and len(seconds()) == 5 and seconds()[0] > 1000
    saved = load_latest(tmp_path / "run")
    assert saved is not None and seconds()[2] < saved.state["extra"]["wall_s"] < seconds()[3]
    figures.unlink()
    train_vae(config)
    assert seconds() == sorted(seconds()) and len(seconds()) == 3 and seconds()[0] > saved.state["extra"]["wall_s"]


def test_ctrl_c_is_ignored_where_it_was(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        stop_at(1, signal.SIGINT, monkeypatch)
        train_dit(dit_config(tmp_path / "run", latents, max_steps=2))
        assert len(metrics(tmp_path / "run")) == 2
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_sigterm_in_the_last_step_is_heard(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = vae_config(tmp_path / "run", shards)
    with monkeypatch.context() as injected:
        stop_at(STEPS, signal.SIGTERM, injected)
        with pytest.raises(SystemExit) as stopped:
            train_vae(config)
    assert stopped.value.code == 143
    assert not (tmp_path / "run/model").exists()
    train_vae(config)
    assert len(metrics(tmp_path / "run")) == STEPS
    VideoVAE.from_pretrained(tmp_path / "run/model")


def test_a_stop_while_sampling_breaks_it_off(latents: Path, tmp_path: Path) -> None:
    """The checkpoint then has the training weights, not the averages that samples are drawn with."""
    config = dit_config(tmp_path / "run", latents, prompts=["a"], sample_every=STEPS // 2)
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw = RowNoise.__call__

        def draw_and_signal(noise: RowNoise) -> torch.Tensor:
            os.kill(os.getpid(), signal.SIGUSR1)
            return draw(noise)

        monkeypatch.setattr(RowNoise, "__call__", draw_and_signal)
        with pytest.raises(SystemExit) as stopped:
            train_dit(config)
    assert stopped.value.code == 143
    assert len(metrics(tmp_path / "run")) == STEPS // 2
    train_dit(config)
    train_dit(replace(config, run_dir=str(tmp_path / "straight")))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    samples = [sorted(path.parent.name for path in run.glob("samples/*/*.mp4")) for run in tmp_path.iterdir()]
    assert samples == [["step-00000003", "step-00000006"]] * 2  # those that were broken off came first
    straight, resumed = load_latest(tmp_path / "straight"), load_latest(tmp_path / "run")
    assert straight is not None and resumed is not None
    assert_same(whole(straight), whole(resumed))


@pytest.mark.parametrize("during", ["evaluation", "data", "setup", "first forward pass"])
def test_a_stop_between_steps_comes_before_the_next(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, during: str
) -> None:
    """SIGUSR1 while held-out clips are measured, and before the first step is done, which is then broken off."""
    calls: dict[str, tuple[Any, str]] = {"evaluation": (vae_trainer, "psnr"), "data": (ClipLoader, "iterate")}
    calls |= {"setup": (TrainingRun, "start"), "first forward pass": (VAEObjective, "forward")}
    owner, name = calls[during]
    original = getattr(owner, name)

    def signal_and_call(*args: Any) -> Any:
        os.kill(os.getpid(), signal.SIGUSR1)
        return original(*args)

    monkeypatch.setattr(owner, name, signal_and_call)
    with pytest.raises(SystemExit) as stopped:
        train_vae(vae_config(tmp_path / "run", shards, eval_shards=str(shards), sample_every=2))
    assert stopped.value.code == 143
    assert steps_in(tmp_path / "run") == {"evaluation": [2]}.get(during, [])
    assert not (tmp_path / "run/model").exists()


def test_held_out_figures_that_were_cut_are_measured_again(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = vae_config(tmp_path / "run", shards, eval_shards=str(shards), sample_every=2, save_every=2)

    def cut(*_: object) -> None:
        raise KeyboardInterrupt

    # After the figures' line, before the clips beside them.
    for owner, name in ((vae_trainer, "write_mp4"), (vae_trainer, "psnr")):
        with monkeypatch.context() as injected, pytest.raises(KeyboardInterrupt):
            injected.setattr(owner, name, cut)
            train_vae(config)
        assert len(metrics(tmp_path / "run")) == 2
    train_vae(config)
    measured = [line["step"] for line in read_metrics(tmp_path / "run") if "eval/psnr_db" in line]
    assert measured == [2, 4, 6]
    assert sorted(path.name for path in (tmp_path / "run/samples").glob("*.mp4")) == [
        f"step-0000000{step}.mp4" for step in measured
    ]


def test_a_full_disk_does_not_stop_training(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = dit_config(tmp_path / "run", latents, max_steps=5, save_every=1, keep_last=2, keep_every=2)
    write = checkpoint_writer.save_file
    fails = iter([False, False, True, False, False])

    def full_now_and_then(*args: Any) -> None:
        if next(fails):
            raise OSError(28, "No space left on device")
        write(*args)

    monkeypatch.setattr(checkpoint_writer, "save_file", full_now_and_then)
    with pytest.warns(UserWarning, match="no checkpoint at step 3: .*No space left.* training goes on"):
        train_dit(config)
    assert steps_in(tmp_path / "run") == [2, 4, 5]
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    for line in lines[1:]:
        assert line["perf/save_s"] >= line["perf/save_wait_s"] >= 0


@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_deterministic_runs_are_identical(
    shards: Path, latents: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    enabled: list[bool] = []
    random: list[torch.Tensor] = []
    log = TrainingRun.log

    def see(run: TrainingRun, figures: dict[str, Any]) -> None:
        enabled.append(torch.are_deterministic_algorithms_enabled())
        random.append(torch.get_rng_state())
        log(run, figures)

    monkeypatch.setattr(TrainingRun, "log", see)
    for name in ("one", "two"):
        changes = {"max_steps": 2, "deterministic": True}
        if kind == "vae":
            train_vae(vae_config(tmp_path / name, shards, **changes))
        else:
            train_dit(dit_config(tmp_path / name, latents, **changes))
    assert all(enabled) and len(enabled) >= 4 and not torch.are_deterministic_algorithms_enabled()
    assert all(torch.equal(state, random[0]) for state in random)  # a step draws nothing from the global generator
    assert metrics(tmp_path / "one") == metrics(tmp_path / "two")
    one, two = (load_latest(tmp_path / name) for name in ("one", "two"))
    assert one is not None and two is not None
    for name, weight in read_full(one, "weight").items():
        assert torch.equal(weight, read_full(two, "weight")[name]), name


def test_checkpointing_changes_nothing(latents: Path, tmp_path: Path) -> None:
    for policy in ("none", "attention", "full"):
        train_dit(dit_config(tmp_path / policy, latents, max_steps=2, checkpointing=policy))
    assert metrics(tmp_path / "none") == metrics(tmp_path / "attention") == metrics(tmp_path / "full")
    ends = [load_latest(tmp_path / policy) for policy in ("none", "attention", "full")]
    states = [whole(end) for end in ends if end is not None]
    assert_same(states[0], states[1])
    assert_same(states[0], states[2])


def test_a_sharded_run_leaves_torch_as_it_was(latents: Path, tmp_path: Path) -> None:
    linear = torch.nn.functional.linear
    train_dit(dit_config(tmp_path / "run", latents, max_steps=1, zero_stage=3))
    assert torch.nn.functional.linear is linear


def test_a_finished_run_is_left_alone(latents: Path, tmp_path: Path) -> None:
    config = dit_config(tmp_path / "run", latents, max_steps=2)
    train_dit(config)
    (tmp_path / "kept").write_text((tmp_path / "run/metrics.jsonl").read_text())
    checkpoint = load_latest(tmp_path / "run")
    train_dit(config)
    again = load_latest(tmp_path / "run")
    assert (tmp_path / "kept").read_text() == (tmp_path / "run/metrics.jsonl").read_text()
    assert checkpoint is not None and again is not None
    assert_same(whole(checkpoint), whole(again))


def test_a_longer_run_goes_on_in_wandb_and_log_too(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracker_module, "FINISH_LIMIT_S", 240.0)  # it has to start and write, however slowly
    run, tracker = tmp_path / "run", TrackerConfig(mode="offline")
    for steps in (2, 3):
        train_dit(dit_config(run, latents, max_steps=steps, tracker=tracker))
    assert [line["step"] for line in metrics(run)] == [1, 2, 3]
    sent = wandb_files.history(run)
    assert [row["step"] for row in sent] == [1, 2, 3]
    for line, row in zip(read_metrics(run), sent):
        assert {key: value for key, value in line.items() if isinstance(value, int | float)}.items() <= row.items()
    shown = wandb_files.config(run)
    assert shown["model"]["hidden_size"] == tiny.DIT.hidden_size and shown["vae"]  # the resolved config
    assert set(shown["code"]) == {"videodit", "videodit_commit", "git_commit"}
    if (ROOT / ".git").exists():  # not in an archive of the sources
        head = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
        commit = shown["code"]["videodit_commit"].removesuffix("+changes")
        assert len(commit) >= 12 and head.startswith(commit)
    text = (run / "train.log").read_text()
    assert re.findall(r"from step (\d) of (\d)", text) == [("0", "2"), ("2", "3")]
    assert text.count("INFO checkpoint of step") == text.count("INFO done") == 2


def test_another_model_in_the_same_folder_is_refused(latents: Path, tmp_path: Path) -> None:
    config = dit_config(tmp_path / "run", latents, max_steps=1)
    train_dit(config)
    with pytest.raises(UserError, match=r"model.depth is 4.*trained with 2"):
        train_dit(replace(config, model=replace(tiny.DIT, depth=4)))


def test_a_refused_resume_leaves_the_config_as_it_was(latents: Path, tmp_path: Path) -> None:
    """Export reads it: it must be that of the checkpoints."""
    config = dit_config(tmp_path / "run", latents, max_steps=1)
    train_dit(config)
    before = (tmp_path / "run/config.yaml").read_text()
    for change, words in (
        ({"ema_profiles": (0.1,)}, "set ema_profiles back"),
        ({"global_batch_size": 1}, "clips a step"),
        (
            {"data": replace(config.data, streams=32, weights=[2.0])},
            "data.streams: 32, but run_dir .* was trained with 64",
        ),
    ):
        with pytest.raises(UserError, match=words):
            train_dit(replace(config, max_steps=2, **change))
        assert (tmp_path / "run/config.yaml").read_text() == before
    train_dit(replace(config, max_steps=2))
    assert "max_steps: 2" in (tmp_path / "run/config.yaml").read_text()


def test_other_batches_in_the_same_folder_are_refused(latents: Path, tmp_path: Path) -> None:
    config = dit_config(tmp_path / "run", latents, max_steps=1)
    train_dit(config)
    size = json.loads((tmp_path / "run/batches.json").read_text())
    assert size == {tiny.BUCKET: config.global_batch_size}
    other = replace(config, max_steps=2, global_batch_size=config.global_batch_size - 1)
    with pytest.raises(
        UserError, match=rf"clips a step of {tiny.BUCKET}: {other.global_batch_size}, but run_dir .* with"
    ):
        train_dit(other)
    train_dit(replace(config, max_steps=2, batch_by="tokens"))  # one bucket: the same batches


def test_metrics_have_what_users_compare(latents: Path, tmp_path: Path) -> None:
    train_dit(dit_config(tmp_path / "run", latents, max_steps=1, communication_every=1))
    (line,) = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert {
        "step",
        "train/loss",
        "train/mse",
        "train/grad_norm",
        "perf/step_s",
        "data/wait_s",
        "data/digest",
    } <= line.keys()
    phases = ("data/wait_s", *(f"perf/{name}_s" for name in ("ranks", "forward", "backward", "optimizer", "other")))
    assert sum(line[name] for name in phases) == pytest.approx(line["perf/step_s"])
    assert min(line[name] for name in phases) > 0
    assert "perf/communication_s" not in line  # there is nobody


def test_flops_are_those_of_the_steps_shape(latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: steps on windows of a quarter have fewer than those on whole latents."""
    monkeypatch.setattr(TrainingRun, "counts_flops", True)
    monkeypatch.setitem(PEAK_FLOPS, "", PEAK)  # a CPU has no name
    config = dit_config(tmp_path / "run", latents, max_steps=2, crop=LatentCropConfig(size=(2, 2), share=0.5))
    workload = DiTWorkload(follow_latents(config))
    window, whole_clip = (workload.shape_flops((4, 3, size, size), "none") for size in (2, 4))
    assert window < whole_clip
    train_dit(config)
    done = [1e12 * line["perf/tflops_per_rank"] * line["perf/step_s"] for line in read_metrics(tmp_path / "run")]
    assert done == pytest.approx([config.global_batch_size * flops for flops in (window, whole_clip)])
    for line, flops in zip(read_metrics(tmp_path / "run"), done):
        assert line["perf/mfu"] == pytest.approx(flops / line["perf/step_s"] / PEAK)


@SLOW
def test_each_bucket_has_an_mfu_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainingRun, "counts_flops", True)
    monkeypatch.setitem(PEAK_FLOPS, "", PEAK)
    shards, buckets = tiny.make_shards(tmp_path / "clips", 8, frames=(9, 5)), ("9x32x32", "5x32x32")
    latents = tiny.make_latents(tmp_path / "latents", shards, tiny.make_vae(tmp_path / "vae"), buckets)
    config = dit_config(tmp_path / "run", latents, max_steps=4)
    workload = DiTWorkload(follow_latents(config))
    train_dit(config)
    lines = read_metrics(tmp_path / "run")
    assert {line["data/bucket"] for line in lines} == set(buckets)
    for line in lines:
        bucket = line["data/bucket"]
        flops = config.global_batch_size * workload.shape_flops((4, {"9": 3, "5": 2}[bucket[0]], 4, 4), "none")
        assert line["perf/mfu"] == pytest.approx(flops / line["perf/step_s"] / PEAK)
        own = {name for name in line if name.startswith(("perf/mfu/", "perf/step_s/"))}
        assert own == {f"perf/mfu/{bucket}", f"perf/step_s/{bucket}"}
        assert all(line[name] == line[name.rsplit("/", 1)[0]] for name in own)


def latent_batch(mean: torch.Tensor) -> LatentBatch:
    """Clips with these latents, and next to no spread around them."""
    rows = len(mean)
    return LatentBatch(
        bucket=parse_bucket(tiny.BUCKET, multiple=1),
        captions=[""] * rows,
        ids=list(range(rows)),
        keys=[f"clip-{row}" for row in range(rows)],
        weight=torch.ones(rows),
        epochs=[0] * rows,
        mean=mean,
        logvar=torch.full_like(mean, -60.0),
    )


def test_frames_have_levels_of_their_own_and_those_given_have_no_weight(latents: Path, tmp_path: Path) -> None:
    noise = NoiseLevelConfig(mean=1.0, std=0.5, frame_slope=6.0)
    config = follow_latents(dit_config(tmp_path / "run", latents, noise=noise))
    batch = latent_batch(torch.zeros(64, 4, 5, 2, 2))
    noisy = make_noisy(batch, config, noise)
    assert (noisy.sigma.diff(dim=1) >= 0).all() and (noisy.sigma.diff(dim=1) > 0.1).any()
    assert torch.equal(noisy.weight > 0, noisy.sigma >= GIVEN_BELOW) and 0 < (noisy.weight == 0).sum() < 160
    # The latents are zero: what the model sees is the frame's own level of noise.
    seen = noisy.latents.square().mean(dim=(1, 3, 4)).sqrt() / noisy.sigma
    assert 0.9 < seen.mean() < 1.1
    batch.keys, batch.epochs, batch.mean, batch.logvar = batch.keys[9:], [0] * 55, batch.mean[9:], batch.logvar[9:]
    # A clip's levels do not hang on the others.
    assert torch.equal(make_noisy(batch, config, noise).sigma, noisy.sigma[9:])


@pytest.mark.parametrize(("frames", "patch"), [(5, 1), (6, 2), (6, 3), (1, 1), (2, 2)])
def test_whole_patches_are_given_and_something_is_left_to_learn(
    frames: int, patch: int, latents: Path, tmp_path: Path
) -> None:
    noise = NoiseLevelConfig(mean=1.0, frame_slope=6.0)
    model = replace(tiny.DIT, patch_size=(patch, 2, 2))
    config = dit_config(tmp_path / "run", latents, noise=noise, condition_rate=0.5, model=model)
    noisy = make_noisy(latent_batch(torch.zeros(64, 4, frames, 2, 2)), config, noise)
    levels = noisy.sigma.unflatten(1, (-1, patch))
    assert torch.equal(levels, levels[..., :1].expand_as(levels))  # the model is told the first of a patch
    given = (levels[..., 0] == 0).sum(dim=1)
    assert set(given.tolist()) == set(range(max(frames // patch, 1)))  # none, some, never all: an image never
    assert noisy.weight.unflatten(1, (-1, patch))[levels == 0].sum() == 0 < noisy.weight.sum(dim=1).min()


def test_the_model_is_told_where_its_window_lies(latents: Path, tmp_path: Path) -> None:
    config = follow_latents(dit_config(tmp_path / "run", latents, crop=LatentCropConfig((4, 2), share=0.5)))
    assert config.crop_steps == STEPS // 2
    batch = latent_batch(torch.randn(8, 4, 5, 4, 2, generator=torch.Generator().manual_seed(0)))
    batch.origin = torch.arange(16).view(8, 2)
    noisy = make_noisy(batch, config, config.noise)
    assert noisy.origin is not None and torch.equal(noisy.origin, batch.origin)
    # The velocity's noise is what was mixed in: at every level x = (1 - sigma) x0 + sigma (x0 + velocity).
    torch.testing.assert_close(noisy.latents, batch.mean + noisy.sigma[:, None, :, None, None] * noisy.target)
    message = r"crop.size \[3, 2\] is not divided by the 2x2 of model.patch_size: use for example \[2, 2\]"
    with pytest.raises(ValueError, match=message):
        replace(config, crop=LatentCropConfig((3, 2)))


def test_the_first_steps_alone_train_on_windows_and_the_dit_is_told_of_each(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[torch.Tensor | None] = []
    start = TrainingRun.start

    def start_and_listen(run: TrainingRun, module: torch.nn.Module) -> None:
        dit = module.get_submodule("dit")
        dit.register_forward_pre_hook(lambda _, args, given: told.append(given["origin"]), with_kwargs=True)
        start(run, module)

    monkeypatch.setattr(TrainingRun, "start", start_and_listen)
    windows = LatentCropConfig((2, 2), share=0.5)
    train_dit(dit_config(tmp_path / "run", latents, crop=windows, max_steps=4, micro_batch_size=4))
    assert [origin is None for origin in told] == [False, False, True, True]
    places = {tuple(place) for origin in told if origin is not None for place in origin.tolist()}
    assert len(places) > 1 and places <= set(itertools.product((0, 2), (0, 2)))  # of latents of 4x4


def test_latents_of_another_vae_are_refused(shards: Path, latents: Path, tmp_path: Path) -> None:
    """Encoded anew into the same folder, say, after the VAE was trained on."""
    run = train_dit(dit_config(tmp_path / "run", latents, max_steps=1))
    other = VideoVAE(tiny.VAE)
    other.save_pretrained(tmp_path / "vae")
    again = tiny.make_latents(tmp_path / "latents", shards, tmp_path / "vae")
    with pytest.raises(UserError, match="VAE of data.shards: .*, but run_dir .*: give it the latents that it began"):
        train_dit(dit_config(run, again, max_steps=2))


def test_samples_play_as_fast_as_the_latents(tmp_path: Path) -> None:
    shards = tiny.make_shards(tmp_path / "shards", num_clips=2, frames=(33,))
    clips = DataConfig(shards=str(shards), buckets=[tiny.BUCKET], fps=2.0)
    latents, vae = tmp_path / "latents", tiny.make_vae(tmp_path / "vae")
    encode_clips(EncodeConfig(str(vae), str(latents), clips, device="cpu"))
    config = DiTRunConfig(run_dir="unused", data=LatentDataConfig(shards=str(latents)))
    assert follow_latents(config).sampling.fps == 2.0
    assert follow_latents(replace(config, sampling=RunSampling(fps=12.0))).sampling.fps == 12.0


def test_the_last_share_of_the_steps_draws_late_noise(latents: Path, tmp_path: Path) -> None:
    early, late = NoiseLevelConfig(mean=1.0), NoiseLevelConfig(mean=-2.0)
    whole_run = dit_config(tmp_path / "early", latents, max_steps=4, noise=early, late_noise=late)
    half_run = replace(whole_run, run_dir=str(tmp_path / "late"), late_share=0.5)
    assert [half_run.noise_at(step) for step in range(1, 5)] == [early, early, late, late]
    assert [replace(half_run, late_share=1.0).noise_at(step) for step in (1, 4)] == [late, late]
    for config in (whole_run, half_run):
        train_dit(config)
    same = [one == other for one, other in zip(metrics(tmp_path / "early"), metrics(tmp_path / "late"), strict=True)]
    assert same == [True, True, False, False]
    with pytest.raises(ValueError, match="late_share 1.5 is no share: use a number from 0 to 1"):
        replace(whole_run, late_share=1.5)


def test_micro_batches_and_rows_of_padding_change_nothing_but_rounding(shards: Path, tmp_path: Path) -> None:
    """Three clips a step in one micro batch of four rows, or in three of one; at an epoch's end there are two."""
    for name, micro in (("whole", 4), ("parts", 1)):
        config = vae_config(tmp_path / name, shards, max_steps=3, global_batch_size=3, micro_batch_size=micro)
        train_vae(config)
    for whole_line, parts_line in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "parts"), strict=True):
        assert whole_line["data/digest"] == parts_line["data/digest"]
        for name in ("train/loss", "train/mse", "train/grad_norm"):
            assert whole_line[name] == pytest.approx(parts_line[name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("zero_stage", [0, 3])
@pytest.mark.parametrize("kind", ["vae", "dit"])
def test_two_ranks_train_as_one(shards: Path, latents: Path, tmp_path: Path, kind: str, zero_stage: int) -> None:
    """Five clips a step: three on the one rank, two and a row of padding on the other, in two micro batches each."""
    data = {"vae": ["--data.shards", shards, f"--data.buckets={tiny.BUCKET}"], "dit": ["--data.shards", latents]}[kind]
    options = {"vae": tiny.VAE_OPTIONS, "dit": tiny.DIT_OPTIONS}[kind]
    options = [*options, "--max_steps=4", "--global_batch_size=5", "--micro_batch_size=2", "--optim.warmup_steps=0"]
    for ranks, stage in ((1, 1), (2, zero_stage)):
        run = ["train", kind, "--run_dir", tmp_path / str(ranks), f"--zero_stage={stage}", "--dtype=fp32"]
        run += tiny.RUN_OPTIONS
        done = subprocess.run(tiny.command([*run, *data, *options], ranks), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
    for one, two in zip(metrics(tmp_path / "1"), metrics(tmp_path / "2"), strict=True):
        assert one["data/digest"] == two["data/digest"]
        assert one["train/loss"] == pytest.approx(two["train/loss"], rel=1e-4)
        assert one["train/grad_norm"] == pytest.approx(two["train/grad_norm"], rel=1e-3)


def test_held_out_clips_are_measured_and_shown(shards: Path, tmp_path: Path) -> None:
    train_vae(vae_config(tmp_path / "run", shards, max_steps=2, sample_every=2, eval_shards=str(shards), eval_clips=4))
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval/psnr_db" in line] == [2]
    frames = read_frames(tmp_path / "run/samples/step-00000002.mp4")
    assert frames.shape == (tiny.FRAMES, 2 * tiny.SIZE, 4 * tiny.SIZE, 3)
    # Above the clips, below what the exported weights make of them.
    data = DataConfig(shards=str(shards), buckets=[tiny.BUCKET])
    clips = next(iter(clips_in_order(data, open_shards(data), 4, multiple=4))).clip()
    vae = VideoVAE.from_pretrained(tmp_path / "run/model")
    with torch.no_grad():
        made = vae.decode(vae.encode(clips)).clamp(-1, 1)
    wanted = to_pixels(rearrange([clips, made], "v b c t h w -> 1 c t (v h) (b w)"))[0]
    shown = [half.astype(float) for half in np.split(frames, 2, axis=1)]
    halves = [half.astype(float) for half in np.split(wanted.numpy(), 2, axis=1)]
    # H.264 is off by less than the reconstruction is.
    off = [[np.abs(one - other).mean() for other in halves] for one in shown]
    assert off[0][0] < off[0][1] / 1.5 and off[1][1] < off[1][0] / 1.5, off


def test_clips_that_came_since_the_last_start_are_told(tmp_path: Path) -> None:
    sets = {count: tiny.make_shards(tmp_path / f"clips{count}", count) for count in (8, 9)}
    for steps, (count, told) in enumerate([(8, False), (8, False), (9, True), (9, False)], 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_vae(vae_config(tmp_path / "run", sets[count], max_steps=steps))
        said = [str(each.message) for each in caught if "clips" in str(each.message)]
        assert [text.startswith(f"{tiny.BUCKET} has 9 clips, 8 when") for text in said] == [True] * told
    (tmp_path / "run/clips.json").write_text("{")  # a damaged note is no reason to stop
    train_vae(vae_config(tmp_path / "run", sets[9], max_steps=5))
    assert json.loads((tmp_path / "run/clips.json").read_text()) == {tiny.BUCKET: 9}


def test_another_vae_than_that_of_the_latents_is_told(shards: Path, tmp_path: Path) -> None:
    """As after more training of it; a copy elsewhere is the same."""
    torch.manual_seed(0)
    vae = VideoVAE(tiny.VAE)
    vae.save_pretrained(tmp_path / "vae")
    tiny.make_latents(tmp_path / "latents", shards, tmp_path / "vae")
    shutil.move(tmp_path / "vae", tmp_path / "copy")
    vae.latent_mean += 1
    vae.save_pretrained(tmp_path / "vae")
    for name in ("copy", "vae"):
        config = dit_config(tmp_path / f"run_{name}", tmp_path / "latents", max_steps=1, vae=str(tmp_path / name))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            train_dit(config)
        told = [str(each.message) for each in caught if "the one that encoded" in str(each.message)]
        assert [str(tmp_path / "vae") in text for text in told] == ([True] if name == "vae" else [])


def test_a_file_given_as_a_prompt_is_no_prompt(tmp_path: Path) -> None:
    """As `videodit generate --prompts FILE` takes one."""
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n")
    with pytest.raises(UserError, match=f"prompts has {file}, which is a file: give what is in it"):
        follow_latents(dit_config(tmp_path / "run", tmp_path / "latents", prompts=("a" * 300, str(file))))


def test_prompts_are_sampled_without_touching_the_training(shards: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = VideoVAE(tiny.VAE)
    for weight in vae.parameters():
        if not bool(weight.any()):  # a fresh one decodes everything to grey
            torch.nn.init.normal_(weight, std=0.1)
    vae.save_pretrained(tmp_path / "vae")
    latents = tiny.make_latents(tmp_path / "latents", shards, tmp_path / "vae")
    prompts = ("a small red circle moves left", "a star")
    sampled = {"prompts": prompts, "sample_every": 2, "sample_raw": True}
    optim = OptimConfig(lr=0.03, warmup_steps=0)  # enough for the average to look different
    for name, changes in (("with", sampled), ("without", {})):
        train_dit(dit_config(tmp_path / name, latents, max_steps=4, optim=optim, **changes))  # type: ignore[arg-type]
    assert metrics(tmp_path / "with") == metrics(tmp_path / "without")
    clips = [read_frames(tmp_path / f"with/samples/step-0000000{step}/01.mp4") for step in (2, 4)]
    assert clips[0].shape == clips[1].shape == (tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
    files = {name: f"samples/step-00000002/{name}.mp4" for name in ("00", "01", "raw-00", "raw-01")}
    assert all((tmp_path / "with" / file).is_file() for file in files.values())
    logged = [line for line in read_metrics(tmp_path / "with") if line["step"] == 2 and "train/loss" not in line]
    assert logged == [
        {"step": 2, "samples/ema": dict(zip(prompts, (files["00"], files["01"])))},
        {"step": 2, "samples/raw": dict(zip(prompts, (files["raw-00"], files["raw-01"])))},
    ]
    check_samples(tmp_path / "with", prompts)


def check_samples(run: Path, prompts: Sequence[str]) -> None:
    """Those of the last step are what the pipeline draws with the run's seed, with averaged and with raw weights."""
    export_run(run, run / "exported")
    pipe, checkpoint = TextToVideo.from_pretrained(run / "exported"), load_latest(run)
    assert checkpoint is not None
    raw = read_full(checkpoint, "weight")
    del raw["level_error.knots"]
    for start, weights in (("", None), ("raw-", raw)):
        if weights is not None:
            pipe.model.load_state_dict(weights, strict=False)
        clips = pipe(prompts, seed=0)
        for row, clip in enumerate(clips):
            file = run / f"samples/step-{checkpoint.step:08d}/{start}{row:02d}.mp4"
            assert file.read_bytes() == encode_mp4(clip, pipe.defaults.fps), file.name
    averaged, plain = (run / f"samples/step-{checkpoint.step:08d}/{name}" for name in ("00.mp4", "raw-00.mp4"))
    assert averaged.read_bytes() != plain.read_bytes()


def test_exports_hold_the_average_and_the_statistics(shards: Path, latents: Path, tmp_path: Path) -> None:
    folder = train_vae(vae_config(tmp_path / "vae", shards, max_steps=4))
    vae = VideoVAE.from_pretrained(folder)
    loader = ClipLoader(
        DataConfig(shards=str(shards), buckets=[tiny.BUCKET], random_crop=False),
        seed=0, global_batch_size=8, micro_batch_size=8, multiple=8,
    )  # fmt: skip
    _, (batch,) = next(loader.iterate(1))
    with torch.no_grad():
        codes = vae.encode(batch.clip())
    axes = (0, 2, 3, 4)
    torch.testing.assert_close(codes.mean(axes), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(codes.std(axes, correction=0), torch.ones(4), rtol=1e-3, atol=0)
    fitted = VideoVAE(tiny.VAE)
    fitted.fit_shortcut(batch.clip())  # on the eight clips, without the padding of a larger batch
    torch.testing.assert_close(vae.code_center, fitted.code_center)
    measured = vae.latent_mean.clone(), vae.latent_std.clone()
    measure_latent_statistics(vae, vae_config(tmp_path, shards).data, batch_size=3)  # the last batch has a padded row
    torch.testing.assert_close((vae.latent_mean, vae.latent_std), measured)

    config = dit_config(tmp_path / "dit", latents, max_steps=4)
    run = train_dit(config)
    export_run(run, tmp_path / "model")
    pipe = TextToVideo.from_pretrained(tmp_path / "model")
    checkpoint = load_latest(run)
    assert checkpoint is not None
    average, exported = read_full(checkpoint, "ema0"), dict(pipe.model.named_parameters())
    assert set(build_model(follow_latents(config)).state_dict()) >= set(average)
    assert average.pop("level_error.knots").shape == (KNOTS,)  # weights the loss only
    assert_same(average, {name: value.detach() for name, value in exported.items()})
    trained = read_full(checkpoint, "weight")
    assert any(not torch.equal(average[name], weight) for name, weight in trained.items())
    torch.manual_seed(config.seed)
    started = build_model(follow_latents(config)).state_dict()
    text = [name for name in trained if name.startswith("text_encoder.")]
    assert len(text) == len(list(pipe.text_encoder.parameters()))
    assert [name for name in text if torch.equal(trained[name], started[name])] == []  # trained jointly
    grams = "text_encoder.gram_embedding.weight"
    assert (trained[grams] == started[grams]).all(1).any()  # those of n-grams that no caption has
    assert pipe(["a circle"]).shape == (1, tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)


def test_a_run_s_averages_are_of_the_weights_after_each_step(shards: Path, tmp_path: Path) -> None:
    optim = OptimConfig(lr=1e-2, warmup_steps=0)
    config = vae_config(tmp_path / "run", shards, max_steps=4, save_every=1, keep_last=9, optim=optim)
    train_vae(config)
    states = [whole(Checkpoint.open(folder_of(config.run_dir, step))) for step in range(1, 5)]
    for number, sigma_rel in enumerate(config.ema_profiles):
        for name in [key.removeprefix("weight/") for key in states[0] if key.startswith("weight/")]:
            average = torch.zeros(())
            for step, state in enumerate(states, 1):
                average = torch.lerp(state[f"weight/{name}"], average, beta_of(gamma_of(sigma_rel), step))
                torch.testing.assert_close(state[f"ema{number}/{name}"], average, msg=name)


def test_the_vae_trains_on_new_noise_for_each_clip_and_epoch(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []
    forward = VAEObjective.forward

    def see(objective: VAEObjective, clip: torch.Tensor, noise: torch.Tensor) -> Any:
        seen.append(noise.flatten(1))
        return forward(objective, clip, noise)

    monkeypatch.setattr(VAEObjective, "forward", see)
    train_vae(vae_config(tmp_path / "run", shards, max_steps=4))  # two epochs of eight clips
    noise = torch.cat(seen)
    assert len(noise) == 16 and (torch.cdist(noise, noise) + 100 * torch.eye(16)).min() > 1


def test_an_export_says_what_is_no_longer_where_the_run_had_it(latents: Path, tmp_path: Path) -> None:
    """As from another folder, if the paths were relative ones, or on another machine."""
    config = train_dit(dit_config(tmp_path / "run", latents, max_steps=1)) / "config.yaml"
    lines = config.read_text().splitlines()
    config.write_text("\n".join("vae: my/vae" if line.startswith("vae: ") else line for line in lines))
    message = rf"vae my/vae of this run is not there, seen from {Path.cwd()}: .* or set vae in {config}"
    with pytest.raises(UserError, match=message):
        export_run(tmp_path / "run", tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("prediction", "weighting", "least", "most"),
    [("noise", "min_snr", 0.8, 1.2), ("v", "uniform", 0.0, 0.2)],
)
def test_ddpm_is_trained_exported_and_sampled(
    latents: Path, tmp_path: Path, prediction: Any, weighting: Any, least: float, most: float
) -> None:
    """A fresh model predicts zero, so the first error is the target's mean square: of the noise, or of v, which at
    DDPM's levels, most of them high, is nearly -x0, and these latents are small.
    """
    flow, noise = Parameterization("variance_preserving", prediction), NoiseLevelConfig(density="ddpm")
    run = train_dit(dit_config(tmp_path / "run", latents, max_steps=3, flow=flow, weighting=weighting, noise=noise))
    assert least < read_metrics(run)[0]["train/mse"] < most
    export_run(run, tmp_path / "model")
    assert read_parameterization(tmp_path / "model") == flow
    options = GenerateConfig(str(tmp_path / "model"), ["a star"], out=str(tmp_path / "clips"), device="cpu")
    (clip,) = generate(options)
    assert read_frames(clip).shape == (tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
