"""Steps that must not reach the weights: faults in real data, and what the run makes of them."""

import json
import shutil
import signal
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny
from tests.training.test_trainers import SLOW, check_resume, dit_config, metrics, stop_at, vae_config
from tests.training.toy import assert_same, whole
from videodit.data.loader import ClipLoader, LatentLoader
from videodit.data.randomness import batch_digest
from videodit.errors import UserError
from videodit.training.checkpoint import Checkpoint, load_latest, steps_in
from videodit.training.dit_trainer import train_dit
from videodit.training.guard import Guard, GuardConfig
from videodit.training.optim import OptimConfig
from videodit.training.run import TrainingRun
from videodit.training.vae_trainer import train_vae

BAD = "clip-3"
SOON = GuardConfig(spike_warmup_steps=1)


def spoil(latents: Path, folder: Path, value: float) -> Path:
    """A copy whose sample BAD has this value in all its latents, written over them where they lie in the tar."""
    shutil.copytree(latents, folder)
    (shard,) = folder.glob("*.tar")
    with tarfile.open(shard) as tar:
        place = tar.getmember(f"{BAD}.safetensors").offset_data
    content = bytearray(shard.read_bytes())
    start = place + 8 + int.from_bytes(content[place : place + 8], "little")  # behind the header's length and header
    first, last = json.loads(content[place + 8 : start])["mean"]["data_offsets"]
    content[start + first : start + last] = np.full((last - first) // 2, value, np.float16).tobytes()
    shard.write_bytes(content)
    return folder


def skipped(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "skipped.jsonl").read_text().splitlines()]


def digests(loader: Any, steps: int) -> list[str]:
    """Of data steps 1 … steps."""
    return [batch_digest(loader.keys(plan)) for plan, _ in islice(loader.iterate(), steps)]


def spoil_gradient(monkeypatch: pytest.MonkeyPatch, factor: float, bad: Callable[[int], bool]) -> None:
    """Injects a factor into one weight's gradient whenever the data of a bad step is trained on."""
    start = TrainingRun.start

    def start_and_hook(run: TrainingRun, module: torch.nn.Module) -> None:
        weight = next(p for p in module.parameters() if p.requires_grad and p.ndim > 1)
        weight.register_hook(lambda grad: grad * factor if bad(run.next_data_step) else grad)
        start(run, module)

    monkeypatch.setattr(TrainingRun, "start", start_and_hook)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_sample_that_is_not_finite_never_reaches_the_weights(latents: Path, tmp_path: Path, name: str) -> None:
    data = spoil(latents, tmp_path / "latents", float("nan"))
    optim = OptimConfig(name=name, lr=1e-3)  # type: ignore[arg-type]
    config = dit_config(tmp_path / "run", data, optim=optim, weighting="uniform", save_every=1, keep_last=9)
    with pytest.warns(UserWarning, match=r"step \d is skipped: train/loss is not finite; its samples are in"):
        train_dit(config)
    lines, listed = metrics(tmp_path / "run"), skipped(tmp_path / "run")
    assert [line["step"] for line in listed] == [line["step"] for line in lines if line["train/grad_norm"] is None]
    assert len(listed) == 3 and all(BAD in line["keys"] and len(line["keys"]) == 4 for line in listed)
    assert [batch_digest(line["keys"]) for line in listed] == [
        line["data/digest"] for line in lines if line["train/loss"] is None
    ]
    assert [line["train/skipped"] for line in lines] == [
        sum(other["step"] <= line["step"] for other in listed) for line in lines
    ]
    # Step 6, the last, is one of them: nothing is new in its checkpoint, weights, moments and averages.
    folder = tmp_path / "run/checkpoints"
    assert listed[-1]["step"] == 6 and listed[-2]["step"] < 5
    assert_same(*(whole(Checkpoint.open(folder / f"step-0000000{step}")) for step in (5, 6)))


@pytest.mark.parametrize(("name", "reason"), [("adamw", "train/grad_norm"), ("muon", "train/mse")])
def test_a_spike_is_skipped_before_it_is_applied(latents: Path, tmp_path: Path, name: str, reason: str) -> None:
    """The gradient is finite: AdamW's norm shows it, with Muon the loss."""
    data = spoil(latents, tmp_path / "latents", 20000.0)
    optim = OptimConfig(name=name, lr=1e-3)  # type: ignore[arg-type]
    config = dit_config(tmp_path / "run", data, optim=optim, weighting="uniform", guard=SOON, save_every=1, seed=4)
    with pytest.warns(UserWarning, match=rf"is skipped: {reason} .* is over guard.spike_factor 20 times its average"):
        train_dit(config)
    listed = skipped(tmp_path / "run")
    assert len(listed) == 3 and all(BAD in line["keys"] for line in listed) and listed[0]["step"] > 1
    assert all((line["train/grad_norm"] is not None) == (name == "adamw") for line in listed)
    checkpoint = load_latest(tmp_path / "run")
    assert checkpoint is not None and checkpoint.state["optimizer_step"] == 3


def test_without_the_spike_guard_nothing_finite_is_skipped(latents: Path, tmp_path: Path) -> None:
    data = spoil(latents, tmp_path / "latents", 20000.0)
    train_dit(dit_config(tmp_path / "run", data, max_steps=3, guard=replace(SOON, spike_factor=0), seed=4))
    assert [line["train/skipped"] for line in metrics(tmp_path / "run")] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore:.*skipped")
@pytest.mark.parametrize("zero_stage", [1, pytest.param(2, marks=SLOW), pytest.param(3, marks=SLOW)])
def test_a_run_with_bad_data_resumes_bit_for_bit(latents: Path, tmp_path: Path, zero_stage: int) -> None:
    data = spoil(latents, tmp_path / "latents", float("nan"))
    check_resume(
        lambda folder: train_dit(dit_config(folder, data, zero_stage=zero_stage)), tmp_path, signal.SIGTERM, code=143
    )
    straight, resumed = load_latest(tmp_path / "straight"), load_latest(tmp_path / "resumed")
    assert straight is not None and resumed is not None
    assert straight.state["extra"]["guard"] == resumed.state["extra"]["guard"]
    assert straight.state["extra"]["guard"]["skipped"] == 3


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_train_vae_goes_back_and_past_the_bad_data(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data of steps 4 and 5 is bad: from step 5 back to step 2, and on with the data of step 6.

    Bit for bit so if it was stopped between the two, with a checkpoint.
    """
    spoil_gradient(monkeypatch, float("inf"), lambda data_step: data_step in (4, 5))
    guard = GuardConfig(max_skipped_in_row=2)

    def run(folder: Path) -> Path:
        return train_vae(vae_config(folder, shards, guard=guard, save_every=2))

    check_resume(run, tmp_path, signal.SIGTERM, code=143, at=4)
    loader = ClipLoader(vae_config(tmp_path, shards).data, seed=0, global_batch_size=4, micro_batch_size=2, multiple=8)
    order = digests(loader, 9)
    lines = metrics(tmp_path / "straight")
    assert [line["data/digest"] for line in lines] == [order[step - 1] for step in (1, 2, 6, 7, 8, 9)]
    assert [line["train/skipped"] for line in lines] == [0, 0, 2, 2, 2, 2]
    listed = [(line["step"], line["data_step"]) for line in skipped(tmp_path / "straight")]
    assert listed == [(4, 4), (5, 5)]
    checkpoint = load_latest(tmp_path / "straight")
    assert checkpoint is not None and checkpoint.state["optimizer_step"] == 6


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_run_that_has_gone_back_resumes_bit_for_bit(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The data goes on where it should after a crash before the next checkpoint, and after one behind it.

    Stopped at step 3, the run had a checkpoint that an undisturbed one has not; going back to step 2 drops it.
    """
    spoil_gradient(monkeypatch, float("inf"), lambda data_step: data_step in (4, 5))
    log = TrainingRun.log

    def train(name: str) -> None:
        train_dit(dit_config(tmp_path / name, latents, guard=GuardConfig(max_skipped_in_row=2), save_every=2))

    def train_until(crash_at: int) -> None:
        def log_and_crash(run: TrainingRun, figures: dict[str, Any]) -> None:
            log(run, figures)
            if run.next_data_step == crash_at + 1:
                raise RuntimeError("injected")

        with monkeypatch.context() as injected:
            injected.setattr(TrainingRun, "log", log_and_crash)
            train("crashed")

    train("straight")
    with monkeypatch.context() as injected:
        stop_at(3, signal.SIGTERM, injected)
        with pytest.raises(SystemExit):
            train("crashed")
    assert steps_in(tmp_path / "crashed") == [2, 3]
    for crash_at, left in ((6, [2]), (8, [2, 4])):
        with pytest.raises(RuntimeError, match="injected"):
            train_until(crash_at)
        assert steps_in(tmp_path / "crashed") == left
    train("crashed")
    assert metrics(tmp_path / "crashed") == metrics(tmp_path / "straight")
    straight, crashed = load_latest(tmp_path / "straight"), load_latest(tmp_path / "crashed")
    assert straight is not None and crashed is not None
    for key in ("guard", "scheduled"):
        assert straight.state["extra"][key] == crashed.state["extra"][key]
    assert_same(whole(straight), whole(crashed))


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_train_dit_goes_back_past_a_bad_sample(latents: Path, tmp_path: Path) -> None:
    """With Muon, and a bad sample that comes again in each epoch."""
    data = spoil(latents, tmp_path / "latents", float("nan"))
    config = dit_config(
        tmp_path / "run", data, max_steps=3, guard=GuardConfig(max_skipped_in_row=1), save_every=1, seed=4
    )
    loader = LatentLoader(config.data, seed=4, global_batch_size=4, micro_batch_size=2)
    plans = [loader.keys(plan) for plan, _ in islice(loader.iterate(), 6)]
    good = [batch_digest(keys) for keys in plans if BAD not in keys]
    train_dit(config)
    lines = metrics(tmp_path / "run")
    assert [line["data/digest"] for line in lines] == good[:3] and [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["train/loss"] is not None and line["train/grad_norm"] is not None for line in lines)


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_run_that_gets_no_further_ends_with_one_line(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_gradient(monkeypatch, float("inf"), lambda data_step: data_step > 3)
    guard = GuardConfig(max_skipped_in_row=2)
    message = (
        r"^2 steps in a row were skipped up to step 4, the last one because the gradient is not finite; "
        r"going back from step 5 has led no further \(samples are in .*/skipped.jsonl\): lower optim.lr, .*$"
    )
    with pytest.raises(UserError, match=message):
        train_vae(vae_config(tmp_path / "run", shards, guard=guard, save_every=2))
    assert [line["data_step"] for line in skipped(tmp_path / "run")] == [4, 5, 6, 7]
    with pytest.raises(UserError, match=r"step 5, .*; there is no checkpoint to go back to"):
        train_vae(vae_config(tmp_path / "none", shards, guard=guard))


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_checkpoint_that_falls_on_a_skipped_step_is_written_after_it(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_gradient(monkeypatch, float("inf"), lambda data_step: data_step in (2, 3))
    for every in (2, 3):
        train_vae(vae_config(tmp_path / str(every), shards, save_every=every, keep_last=9, max_steps=5))
        assert [line["step"] for line in skipped(tmp_path / str(every))] == [2, 3]
        assert steps_in(tmp_path / str(every)) == [4, 5]


@pytest.mark.filterwarnings("ignore:.*skipped")
def test_a_stop_that_pushes_the_last_good_checkpoint_out_does_not_end_the_run(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_gradient(monkeypatch, float("inf"), lambda data_step: data_step in (4, 5))
    config = vae_config(tmp_path / "run", shards, save_every=2, keep_last=1, guard=GuardConfig(max_skipped_in_row=2))
    with monkeypatch.context() as injected:
        stop_at(4, signal.SIGTERM, injected)
        with pytest.raises(SystemExit):
            train_vae(config)
    assert steps_in(tmp_path / "run") == [4]
    train_vae(config)
    assert [line["train/skipped"] for line in metrics(tmp_path / "run")] == [0, 0, 0, 1, 2, 2]


@pytest.mark.slow
def test_two_ranks_skip_alike(latents: Path, tmp_path: Path) -> None:
    """Only one rank reads the bad sample; both skip, go back, and end as one rank does."""
    data = spoil(latents, tmp_path / "latents", float("nan"))
    for ranks in (1, 2):
        run = ["train", "dit", "--run_dir", tmp_path / str(ranks), f"--data.shards={data}", "--max_steps=3", "--seed=4"]
        run += ["--global_batch_size=4", "--micro_batch_size=1", "--dtype=fp32", "--optim.name=muon", "--save_every=1"]
        run += ["--guard.max_skipped_in_row=1", *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS]
        done = subprocess.run(tiny.command(run, ranks), capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [line for line in done.stderr.splitlines() if "going back to step" in line]
        assert [line.split(",")[0] for line in lines] == [
            f"warning: 1 steps in a row were skipped up to step {k}" for k in (2, 3)
        ]
    one, two = metrics(tmp_path / "1"), metrics(tmp_path / "2")
    for name in ("step", "data/digest", "train/skipped"):
        assert [line[name] for line in one] == [line[name] for line in two]
    assert [line["train/loss"] for line in two] == pytest.approx([line["train/loss"] for line in one], rel=1e-3)
    assert skipped(tmp_path / "1")[0]["keys"] == skipped(tmp_path / "2")[0]["keys"]


FIGURES = st.lists(st.one_of(st.floats(0, 1e6), st.sampled_from([float("nan"), float("inf")])), max_size=60)


def decide(guard: Guard, figures: list[float]) -> list[str]:
    reasons = []
    for figure in figures:
        reasons.append(guard.check_norm(figure))
        if reasons[-1]:
            guard.skipped()
        else:
            guard.applied({"mse": 0.0}, figure)
    return reasons


@given(FIGURES, FIGURES)
def test_the_guard_decides_the_same_after_its_state_was_saved(before: list[float], after: list[float]) -> None:
    config = GuardConfig(spike_factor=2, spike_length=5, spike_warmup_steps=3)
    guard, again = (Guard(config, watch_norm=True) for _ in range(2))
    decide(guard, before)
    again.load(json.loads(json.dumps(guard.to_dict())))
    assert decide(guard, after) == decide(again, after) and guard.state == again.state


@given(FIGURES)
def test_only_applied_steps_are_averaged(figures: list[float]) -> None:
    """While no step can be a spike, the average is that of the finite figures."""
    guard = Guard(GuardConfig(spike_length=100), watch_norm=True)
    decide(guard, figures)
    finite = [figure for figure in figures if np.isfinite(figure)]
    assert guard.state.applied == len(finite) and guard.state.skipped == len(figures) - len(finite)
    assert guard.state.average == pytest.approx(float(np.mean(finite)) if finite else 0.0, rel=1e-9, abs=1e-9)


@given(st.lists(st.tuples(st.booleans(), st.floats(0, 1e6)), max_size=60), st.booleans())
def test_images_and_videos_are_judged_as_if_the_others_were_not_there(
    steps: list[tuple[bool, float]], watch_norm: bool
) -> None:
    config = GuardConfig(spike_factor=2, spike_length=5, spike_warmup_steps=3)
    mixed, images, videos = (Guard(config, watch_norm=watch_norm) for _ in range(3))

    def reason(guard: Guard, figure: float, image: bool) -> str:
        why = guard.check_losses({"mse": figure}, images=image) or guard.check_norm(figure, images=image)
        if why:
            guard.skipped()
        else:
            guard.applied({"mse": figure}, figure, images=image)
        return why

    for image, figure in steps:
        assert reason(mixed, figure, image) == reason(images if image else videos, figure, image)
    assert mixed.state.applied == videos.state.applied and mixed.state.image_applied == images.state.image_applied


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("watch_norm", [False, True])
def test_a_spike_is_over_the_factor_times_an_average_that_forgets(images: bool, watch_norm: bool) -> None:
    config = GuardConfig(spike_factor=3, spike_length=4, spike_warmup_steps=6)
    guard, average = Guard(config, watch_norm=watch_norm), 0.0

    def is_spike(value: float) -> bool:
        if watch_norm:
            return bool(guard.check_norm(value, images=images))
        return bool(guard.check_losses({"mse": value}, images=images))

    for number in range(20):
        assert is_spike(3.01 * average) == (number >= 6) and not is_spike(2.99 * average)
        value = 100.0 if number < 10 else 1.0
        guard.applied({"mse": value}, value, images=images)
        average += (value - average) / min(number + 1, 4)
    assert 1 < average < 10  # of the last ten mostly: a mean of all would be over 50


def test_a_checkpoint_from_before_images_had_their_own_average_loads() -> None:
    guard = Guard(GuardConfig(), watch_norm=True)
    guard.load({"average": 2.0, "applied": 500, "skipped": 1, "in_row": 0, "data_offset": 3, "failed_at": 9})
    assert guard.check_norm(41.0) == "train/grad_norm 41 is over guard.spike_factor 20 times its average 2"
    assert guard.check_norm(41.0, images=True) == "" and guard.state.data_offset == 3


def test_a_finite_gradient_of_a_loss_that_is_not_is_skipped() -> None:
    guard = Guard(GuardConfig(), watch_norm=True)
    assert guard.check_losses({"loss": 1.0, "mse": float("nan")}) == "train/mse is not finite"
    assert guard.check_losses({"loss": float("-inf"), "mse": 1.0}) == "train/loss is not finite"
    assert guard.check_losses({"loss": -1.0, "mse": 1e9}) == ""


def test_settings_that_make_no_sense_are_refused() -> None:
    for change in ({"spike_factor": 0.5}, {"spike_length": 0}, {"max_skipped_in_row": 0}, {"spike_warmup_steps": 0}):
        (name,) = change
        with pytest.raises(ValueError, match=f"guard.{name}"):
            GuardConfig(**change)  # type: ignore[arg-type]
