"""Samplers against flows whose solution is known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from videodit.flow.noise_level import sampling_levels
from videodit.flow.samplers import RENOISE_ABOVE, SAMPLERS, euler, heun, renoise

ALL = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=list(SAMPLERS))
DETERMINISTIC = pytest.mark.parametrize("sampler", [euler, heun])


def broadcast(sigma: Tensor) -> Tensor:
    return sigma.view(-1, 1, 1, 1, 1)


def noise(b: int = 2) -> Tensor:
    return torch.randn(b, 3, 2, 2, 2, dtype=torch.float64)


@ALL
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_straight_paths_are_exact_in_any_number_of_steps(sampler, num_steps: int, shift: float) -> None:
    x1, x0 = noise(), noise()
    sigmas = sampling_levels(num_steps, shift).double()
    torch.testing.assert_close(sampler(lambda x, sigma: (x - x0) / broadcast(sigma), x1, sigmas, noise), x0)


@DETERMINISTIC
@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_a_constant_velocity_is_integrated_exactly(sampler, num_steps: int, shift: float) -> None:
    x1, x0 = noise(), noise()
    sigmas = sampling_levels(num_steps, shift).double()
    torch.testing.assert_close(sampler(lambda x, sigma: x1 - x0, x1, sigmas, noise), x0)


class Reads(TorchDispatchMode):
    """How often Python asks a tensor for its value."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@ALL
def test_no_step_asks_for_a_value(sampler) -> None:
    """Python would wait there until a GPU has done all that it was given, and the GPU then for Python."""
    x1 = noise()
    with Reads() as reads:
        sampler(lambda x, sigma: x * broadcast(sigma), x1, sampling_levels(20, 3.0).double(), noise)
    assert reads.count == 0


def error(sampler, num_steps: int) -> float:
    """On dx/dsigma = (2 sigma - 1) x + sigma, which an integrating factor solves."""
    x1 = torch.linspace(-2, 2, 24, dtype=torch.float64).view(1, 3, 2, 2, 2)
    # With y = x e^{sigma - sigma^2}: dy/dsigma = sigma e^{sigma - sigma^2}, integrated on a fine grid (Simpson).
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    values = grid * (grid - grid**2).exp()
    simpson = (values[0] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum() + values[-1]) / 6000
    exact = x1 - simpson  # e^{1 - 1} = e^{0} = 1 at both ends
    sigmas = sampling_levels(num_steps, 1.0).double()
    out = sampler(lambda x, s: (2 * broadcast(s) - 1) * x + broadcast(s), x1, sigmas, noise)
    return float((out - exact).abs().max())


def test_orders_of_convergence() -> None:
    for sampler, order in ((euler, 1), (heun, 2)):
        ratios = [error(sampler, n) / error(sampler, 2 * n) for n in (40, 80)]
        assert all(2**order * 0.85 < ratio < 2**order * 1.15 for ratio in ratios), (order, ratios)
    assert error(heun, 40) < 0.1 * error(euler, 40)


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
def test_noise_flows_to_the_gaussian_of_the_data(std: float) -> None:
    """For data N(0, std^2), E[noise - x0 | x] is linear in x and carries noise to std * noise."""

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        s = broadcast(sigma)
        return x * (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)

    x1 = noise()
    out = heun(velocity, x1, sampling_levels(200, 1.0).double(), noise)
    torch.testing.assert_close(out, std * x1, rtol=2e-3, atol=1e-3)
    middle = torch.linspace(1.0, 0.25, 401, dtype=torch.float64)
    scale = math.sqrt(0.75**2 * std**2 + 0.25**2)
    torch.testing.assert_close(heun(velocity, x1, middle, noise), scale * x1, rtol=1e-4, atol=1e-4)


def test_calls_and_levels() -> None:
    sigmas = sampling_levels(5, 3.0)
    for sampler, expected in (
        (euler, sigmas[:-1].tolist()),
        (heun, [s for i in range(4) for s in sigmas[i : i + 2].tolist()] + [float(sigmas[4])]),
    ):
        seen = []

        def velocity(x: Tensor, sigma: Tensor, seen: list = seen) -> Tensor:
            assert sigma.shape == (3,) and (sigma == sigma[0]).all()
            seen.append(float(sigma[0]))
            return x

        sampler(velocity, torch.ones(3, 1, 1, 1, 1), sigmas, noise)
        assert seen == pytest.approx(expected)


@DETERMINISTIC
def test_the_start_is_left_alone_and_rows_do_not_touch(sampler) -> None:
    x1 = noise(3)
    before = x1.clone()
    sigmas = sampling_levels(4, 2.0).double()

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        return x.square() * broadcast(sigma)

    out = sampler(velocity, x1, sigmas, noise)
    assert torch.equal(x1, before)
    torch.testing.assert_close(out[1:2], sampler(velocity, x1[1:2], sigmas, noise))


def test_renoise_keeps_the_clean_prediction_and_no_noise_while_the_level_is_high() -> None:
    sigmas = torch.tensor([1.0, 0.9, 0.85, 0.5, 0.2, 0.0], dtype=torch.float64)
    wanted, drawn, seen = noise(), [], []

    def fresh() -> Tensor:
        drawn.append(noise())
        return drawn[-1]

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        seen.append(x)
        return (x - wanted) / broadcast(sigma)

    torch.testing.assert_close(renoise(velocity, noise(), sigmas, fresh), wanted)
    high = sigmas[1:4]  # what the steps from above RENOISE_ABOVE reach
    assert len(drawn) == len(high) == int((sigmas > RENOISE_ABOVE).sum())
    for x, level, new in zip(seen[1:], high, drawn):
        torch.testing.assert_close(x, (1 - level) * wanted + level * new)
    torch.testing.assert_close(seen[4], 0.8 * wanted + 0.2 * drawn[-1])  # Euler: the noise stays


def test_renoise_leans_towards_the_mean() -> None:
    """For data N(0, std^2) the prediction shrinks what it sees, and fresh noise does not stretch it again."""
    x1, std = torch.randn(64, 8, 2, 4, 4, dtype=torch.float64), 4.0

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        s = broadcast(sigma)
        return x * (s - (1 - s) * std**2) / ((1 - s) ** 2 * std**2 + s**2)

    sigmas = sampling_levels(200, 3.0).double()
    plain, leaning = (f(velocity, x1, sigmas, lambda: torch.randn_like(x1)) for f in (euler, renoise))
    assert 0.95 * std < plain.std() < 1.05 * std and leaning.std() < 0.85 * std
