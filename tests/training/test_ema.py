"""Power-function averages against their closed form."""

from dataclasses import dataclass

import pytest
import torch

from videodit.training.ema import PowerEMA, beta_of, gamma_of


@dataclass
class Piece:
    weight: torch.Tensor


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.10, 0.25])
def test_gamma_gives_the_relative_width(sigma_rel: float) -> None:
    gamma = gamma_of(sigma_rel)
    assert ((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3))) ** 0.5 == pytest.approx(sigma_rel, rel=1e-9)


def test_gamma_of_known_profiles() -> None:
    assert gamma_of(0.05) == pytest.approx(16.97, abs=0.005)  # Karras et al. (2024), section 3.1
    assert gamma_of(0.10) == pytest.approx(6.94, abs=0.005)


def test_average_of_a_ramp_is_the_closed_form() -> None:
    """With weights theta_t = t/T the average tends to (gamma + 1)/(gamma + 2), the mean of the profile."""
    piece, steps = Piece(torch.zeros(3)), 4000
    ema = PowerEMA([piece], (0.05, 0.10))
    for step in range(1, steps + 1):
        piece.weight.fill_(step / steps)
        ema.update(step)
    for gamma, (average,) in zip(ema.gammas, ema.averages, strict=True):
        torch.testing.assert_close(average, torch.full((3,), (gamma + 1) / (gamma + 2)), rtol=0, atol=1e-3)


def test_recursion_is_the_sum_with_its_weights() -> None:
    values = torch.randn(20, 4)
    piece = Piece(torch.zeros(4))
    ema = PowerEMA([piece], (0.10,))
    for step, value in enumerate(values, start=1):
        piece.weight.copy_(value)
        ema.update(step)
    weights = torch.zeros(20)
    for step in range(1, 21):
        weights *= beta_of(ema.gammas[0], step)
        weights[step - 1] = 1 - beta_of(ema.gammas[0], step)
    assert float(weights.sum()) == pytest.approx(1)
    torch.testing.assert_close(ema.averages[0][0], weights @ values)


def test_first_step_forgets_the_initialisation() -> None:
    piece = Piece(torch.full((2,), 9.0))
    ema = PowerEMA([piece])
    piece.weight.fill_(1)
    ema.update(1)
    assert all(torch.equal(average, torch.ones(2)) for (average,) in ema.averages)


@pytest.mark.parametrize("sigma_rel", [0, -1, 0.3])
def test_impossible_profile(sigma_rel: float) -> None:
    with pytest.raises(ValueError, match="outside"):
        gamma_of(sigma_rel)
