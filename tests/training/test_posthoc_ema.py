"""Averages of any length made afterwards, against those that a run would have kept."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.training import toy
from videodit.errors import UserError
from videodit.parallel.mesh import World, init_process, shutdown
from videodit.training.checkpoint import Checkpoint, load_latest, read_full
from videodit.training.ema import PowerEMA, beta_of, gamma_of
from videodit.training.posthoc_ema import Mixture, PosthocEMA, StoredAverage, mix, profile

PROFILES = (0.05, 0.10)


def stored_at(*steps: int) -> list[StoredAverage]:
    return [StoredAverage(step, width, f"ema{k}") for step in steps for k, width in enumerate(PROFILES)]


def average(values: np.ndarray, sigma_rel: float, step: int) -> float:
    """What the recursion of PowerEMA makes of a scalar trajectory."""
    kept = 0.0
    for number, value in enumerate(values[:step], start=1):
        beta = beta_of(gamma_of(sigma_rel), number)
        kept = beta * kept + (1 - beta) * value
    return kept


def test_the_profile_is_that_of_the_recursion() -> None:
    steps = 50
    for sigma_rel in (0.03, 0.1, 0.25):
        shares = profile(sigma_rel, steps, np.arange(61))
        impulses = [average(np.eye(60)[k], sigma_rel, steps) for k in range(60)]
        np.testing.assert_allclose(shares, impulses, rtol=1e-9, atol=1e-15)
        assert shares.sum() == pytest.approx(1)


@given(st.lists(st.integers(2, 400), min_size=1, max_size=6, unique=True), st.sampled_from(PROFILES))
def test_a_stored_length_is_itself_exactly(steps: list[int], sigma_rel: float) -> None:
    stored = stored_at(*sorted(steps))
    mixture = mix(stored, sigma_rel, max(steps))
    assert mixture.error == 0
    at = stored.index(next(s for s in stored if s.step == max(steps) and s.sigma_rel == sigma_rel))
    assert mixture.weights.tolist() == np.eye(len(stored))[at].tolist()


@settings(max_examples=40)
@given(st.floats(0.01, 0.28), st.lists(st.integers(1, 120), min_size=1, max_size=6, unique=True))
def test_the_error_is_that_of_the_average(sigma_rel: float, steps: list[int]) -> None:
    """The mixed average is off by no more than the error says, for any trajectory; a constant one is kept."""
    stored, last = stored_at(*sorted(steps)), max(steps)
    mixture = mix(stored, sigma_rel, last)
    assert mixture.weights.sum() == pytest.approx(1)
    values = np.random.default_rng(last).standard_normal(last)
    made = sum(weight * average(values, s.sigma_rel, s.step) for weight, s in zip(mixture.weights, stored))
    wanted = profile(sigma_rel, last, np.arange(last + 1))
    off = abs(made - average(values, sigma_rel, last))
    assert off <= mixture.error * np.linalg.norm(wanted) * np.linalg.norm(values) + 1e-9


def test_more_checkpoints_reach_more_lengths() -> None:
    for width in (0.03, 0.08, 0.2):
        errors = [mix(stored_at(*range(800 // n, 801, 800 // n)), width, 800).error for n in (1, 2, 4, 8)]
        assert errors == sorted(errors, reverse=True), errors
    twenty = stored_at(*range(10_000, 200_001, 10_000))  # steps are put together in intervals
    assert all(mix(twenty, width, 200_000).error < 0.05 for width in (0.03, 0.06, 0.08, 0.12, 0.2))


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_process("cpu")
    shutdown()


@pytest.fixture(scope="module")
def run(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A run of 12 steps with a checkpoint at every third, and the average of width 0.08 that it did not keep."""
    folder = tmp_path_factory.mktemp("run")
    engine = toy.make_engine(world, 1)
    ema, third = PowerEMA(engine.slices(), PROFILES), PowerEMA(engine.slices(), (0.08,))
    for step in range(1, 13):
        toy.train(engine, world, step, step, ema=ema)
        third.update(step)
        if step % 3 == 0:
            assert not toy.save(folder, step, engine, ema, keep_last=0)
    wanted = {part.name: kept for part, kept in zip(engine.slices(), third.averages[0], strict=True)}
    return folder, wanted


def newest(folder: Path) -> Checkpoint:
    checkpoint = load_latest(folder)
    assert checkpoint is not None
    return checkpoint


def mixed(folder: Path, sigma_rel: float) -> tuple[Mixture, dict[str, torch.Tensor]]:
    averages = PosthocEMA(folder, newest(folder))
    mixture = averages.mix(sigma_rel)
    return mixture, averages.read(mixture)


def test_a_run_gives_the_average_that_it_did_not_keep(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, wanted = run
    mixture, made = mixed(folder, 0.08)
    kept, weights = read_full(newest(folder), "ema1"), read_full(newest(folder), "weight")
    assert mixture.error < 0.02
    for name, value in wanted.items():
        # Off by a small part of how far averages of other lengths, and the weights themselves, are from it.
        off, spread = ((x.flatten() - value).norm() for x in (made[name], weights[name]))
        assert off < 0.05 * spread, name
        assert off < 0.2 * (kept[name].flatten() - value).norm(), name


def test_a_kept_length_comes_out_bit_for_bit(run: tuple[Path, dict[str, torch.Tensor]]) -> None:
    folder, _ = run
    for k, width in enumerate(PROFILES):
        mixture, made = mixed(folder, width)
        assert mixture.error == 0
        toy.assert_same(made, read_full(newest(folder), f"ema{k}"))


@pytest.mark.parametrize(("width", "words"), [(0.01, "can be made"), (0.28, "can be made"), (0.5, "outside")])
def test_a_length_that_cannot_be_had_is_refused(
    run: tuple[Path, dict[str, torch.Tensor]], width: float, words: str, tmp_path: Path
) -> None:
    shutil.copytree(run[0] / "checkpoints/step-00000012", tmp_path / "checkpoints/step-00000012")
    with pytest.raises(UserError, match=words) as refused:
        mixed(tmp_path, width)
    assert f"--ema_length {width}" in str(refused.value) and "\n" not in str(refused.value)


def test_a_damaged_checkpoint_is_left_out(run: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder)
    damage: Callable[[Path], object] = lambda file: file.write_bytes(file.read_bytes()[:-1])  # noqa: E731
    damage(folder / "checkpoints/step-00000006/rank-00000.safetensors")
    with pytest.warns(UserWarning, match="step-00000006 cannot be used: .*; the average is made without it"):
        mixture, _ = mixed(folder, 0.08)
    assert len(mixture.weights) == 2 * 3
