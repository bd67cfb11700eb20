"""Noise-level densities against their closed forms."""

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videodit.flow.noise_level import (
    NoiseLevelConfig,
    ddpm_sigma,
    frame_levels,
    sampling_levels,
    shift_sigma,
    sigma_from_uniform,
)

levels = st.floats(0.001, 0.999)
shifts = st.floats(0.2, 12.0)


def logit(p: float) -> float:
    return math.log(p / (1 - p))


@given(levels, shifts)
def test_shift_adds_its_logarithm_to_the_logit(sigma: float, shift: float) -> None:
    shifted = float(shift_sigma(torch.tensor(sigma, dtype=torch.float64), shift))
    assert logit(shifted) == pytest.approx(logit(sigma) + math.log(shift), abs=1e-9)


@given(levels, shifts)
def test_shift_is_undone_by_its_inverse(sigma: float, shift: float) -> None:
    there = shift_sigma(torch.tensor(sigma, dtype=torch.float64), shift)
    assert float(shift_sigma(there, 1 / shift)) == pytest.approx(sigma)


@given(shifts)
def test_shift_keeps_the_ends_and_the_order(shift: float) -> None:
    out = shift_sigma(torch.linspace(0, 1, 50, dtype=torch.float64), shift)
    assert out[0] == 0 and out[-1] == pytest.approx(1.0) and (out.diff() > 0).all()


def test_shift_of_the_published_formula() -> None:
    assert float(shift_sigma(torch.tensor(0.5), 3.0)) == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    assert torch.equal(shift_sigma(torch.tensor([0.2, 0.7]), 1.0), torch.tensor([0.2, 0.7]))


@given(u=st.floats(1e-4, 1 - 1e-4), mean=st.floats(-2, 2), std=st.floats(0.2, 2), shift=shifts)
def test_logit_normal_quantiles(u: float, mean: float, std: float, shift: float) -> None:
    config = NoiseLevelConfig(mean=mean, std=std, shift=shift)
    sigma = float(sigma_from_uniform(torch.tensor([u], dtype=torch.float64), config))
    expected = 1 / (1 + math.exp(-(NormalDist(mean, std).inv_cdf(u) + math.log(shift))))
    assert sigma == pytest.approx(expected, abs=1e-6)


def test_logit_normal_moments() -> None:
    uniform = (torch.arange(100_000) + 0.5) / 100_000
    logits = torch.logit(sigma_from_uniform(uniform, NoiseLevelConfig(mean=0.3, std=1.2, shift=1.0)).double())
    assert float(logits.mean()) == pytest.approx(0.3, abs=1e-3) and float(logits.std()) == pytest.approx(1.2, abs=1e-2)


@given(st.floats(0.001, 0.999), shifts)
def test_uniform_density(u: float, shift: float) -> None:
    config = NoiseLevelConfig(density="uniform", shift=shift)
    uniform = torch.tensor([u], dtype=torch.float64)
    assert torch.equal(sigma_from_uniform(uniform, config), shift_sigma(uniform, shift))


def test_ddpm_schedule_is_that_of_the_paper() -> None:
    alpha_bar, expected = 1.0, []
    for step in range(1000):
        alpha_bar *= 1.0 - (1e-4 + (0.02 - 1e-4) * step / 999)
        signal, noise = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        expected.append(noise / (signal + noise))
    sigma = ddpm_sigma(torch.arange(1000))
    torch.testing.assert_close(sigma, torch.tensor(expected))
    assert (sigma.diff() > 0).all() and sigma[0] > 0 and sigma[-1] < 1


def test_ddpm_density_visits_every_step_alike() -> None:
    config = NoiseLevelConfig(density="ddpm", shift=1.0)
    uniform = (torch.arange(5000) + 0.5) / 5000
    assert torch.equal(sigma_from_uniform(uniform, config), ddpm_sigma(torch.arange(1000)).repeat_interleave(5))
    assert sigma_from_uniform(torch.tensor([1.0]), config) == ddpm_sigma(torch.tensor([999]))


@given(st.integers(1, 50), shifts)
def test_sampling_levels(num_steps: int, shift: float) -> None:
    out = sampling_levels(num_steps, shift)
    assert out.shape == (num_steps + 1,) and out[0] == pytest.approx(1.0) and out[-1] == 0.0 and (out.diff() < 0).all()
    even = shift_sigma(out, 1 / shift)
    torch.testing.assert_close(even, torch.linspace(1, 0, num_steps + 1), rtol=1e-4, atol=1e-5)


@given(
    sigma=st.floats(0.05, 0.95),
    frames=st.integers(1, 7),
    u=st.floats(0.0, 0.999),
    focus=st.floats(0.0, 0.999),
    slope=st.floats(0.0, 1.5),
)
def test_a_frame_has_the_clips_level_and_the_logit_rises_evenly_around_it(
    sigma: float, frames: int, u: float, focus: float, slope: float
) -> None:
    row = (torch.tensor([value], dtype=torch.float64) for value in (sigma, u, focus))
    clip, uniform, place = row
    levels = frame_levels(clip, frames, uniform, place, NoiseLevelConfig(frame_slope=slope))
    assert levels.shape == (1, frames)
    logits = [logit(float(level)) for level in levels[0]]
    assert logits[int(focus * frames)] == pytest.approx(logit(sigma), abs=1e-6)
    for before, after in zip(logits[:-1], logits[1:]):
        assert after - before == pytest.approx(slope * u * u, abs=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"density": "cosine"}, "density 'cosine' of the noise levels is not one of"),
        ({"std": 0.0}, "std 0.0 of the noise levels is not positive"),
        ({"shift": -1.0}, "shift -1.0 of the noise levels is not positive"),
        ({"frame_slope": -0.5}, "frame_slope -0.5 of the noise levels is negative: 0 gives all frames one level"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NoiseLevelConfig(**changes)
