"""The path's identities: its ends, its derivative, and that every parameterization says the same velocity."""

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from videodit.flow.path import Parameterization, coefficients, interpolate, target, to_velocity

PATHS = ["rectified", "variance_preserving"]
PARAMETERIZATIONS = [
    Parameterization("rectified", "velocity"),
    Parameterization("rectified", "x0"),
    Parameterization("rectified", "noise"),
    Parameterization("variance_preserving", "velocity"),
    Parameterization("variance_preserving", "x0"),
    Parameterization("variance_preserving", "noise"),
    Parameterization("variance_preserving", "v"),
]
inner = st.floats(0.01, 0.99)


def pair() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3, 4, 2, 2, dtype=torch.float64), torch.randn(2, 3, 4, 2, 2, dtype=torch.float64)


def slope(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """By central differences in float64."""
    return (function(at + 1e-5) - function(at - 1e-5)) / 2e-5


@pytest.mark.parametrize("path", PATHS)
def test_ends_are_data_and_noise(path: str) -> None:
    x0, noise = pair()
    assert torch.equal(interpolate(path, x0, noise, torch.zeros(2, 1, 1, 1, 1)), x0)
    assert torch.equal(interpolate(path, x0, noise, torch.ones(2, 1, 1, 1, 1)), noise)


@given(inner)
def test_the_two_paths_are_one_path_rescaled(level: float) -> None:
    sigma = torch.tensor(level, dtype=torch.float64)
    straight, curved = coefficients("rectified", sigma), coefficients("variance_preserving", sigma)
    assert float(straight[0] + straight[1]) == pytest.approx(1.0)
    assert float(curved[0] ** 2 + curved[1] ** 2) == pytest.approx(1.0)
    assert float(straight[0] / straight[1]) == pytest.approx(float(curved[0] / curved[1]))  # signal-to-noise ratio
    x0, noise = pair()
    norm = math.hypot(1 - level, level)
    torch.testing.assert_close(
        interpolate("variance_preserving", x0, noise, sigma) * norm, interpolate("rectified", x0, noise, sigma)
    )


@given(inner)
def test_velocity_is_the_rectified_paths_derivative(level: float) -> None:
    x0, noise = pair()
    sigma = torch.tensor(level, dtype=torch.float64)
    derivative = slope(lambda s: interpolate("rectified", x0, noise, s), sigma)
    torch.testing.assert_close(derivative, target(Parameterization(), x0, noise, sigma), rtol=1e-6, atol=1e-6)


@given(inner)
def test_v_is_the_variance_preserving_paths_derivative_by_its_angle(level: float) -> None:
    x0, noise = pair()
    angle = torch.atan2(torch.tensor(level).double(), torch.tensor(1 - level).double())

    def point(angle: Tensor) -> Tensor:
        return angle.cos() * x0 + angle.sin() * noise

    sigma = torch.tensor(level, dtype=torch.float64)
    torch.testing.assert_close(point(angle), interpolate("variance_preserving", x0, noise, sigma), rtol=1e-6, atol=1e-6)
    derivative = slope(point, angle)
    v = target(Parameterization("variance_preserving", "v"), x0, noise, sigma)
    torch.testing.assert_close(derivative, v, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=str)
@given(levels=st.lists(inner, min_size=4, max_size=4))
def test_to_velocity_inverts_target(parameterization: Parameterization, levels: list[float]) -> None:
    x0, noise = pair()
    sigma = torch.tensor(levels, dtype=torch.float64).view(1, 1, 4, 1, 1)  # a level for each frame
    x = interpolate(parameterization.path, x0, noise, sigma)
    prediction = target(parameterization, x0, noise, sigma)
    torch.testing.assert_close(to_velocity(parameterization, prediction, x, sigma), noise - x0)


@pytest.mark.parametrize("parameterization", PARAMETERIZATIONS, ids=str)
def test_to_velocity_at_pure_data_and_pure_noise(parameterization: Parameterization) -> None:
    x0, noise = pair()
    for level in (0.0, 1.0):
        sigma = torch.full((2, 1, 1, 1, 1), level, dtype=torch.float64)
        x = interpolate(parameterization.path, x0, noise, sigma)
        velocity = to_velocity(parameterization, target(parameterization, x0, noise, sigma), x, sigma)
        assert velocity.isfinite().all()
        # Noise alone says nothing of x0, and x0 nothing of the noise.
        lost = {"noise": 1.0, "x0": 0.0}.get(parameterization.prediction)
        if level != lost:
            torch.testing.assert_close(velocity, noise - x0)


@pytest.mark.parametrize(
    ("path", "prediction", "message"),
    [
        ("straight", "velocity", "flow.path 'straight' is not one of rectified, variance_preserving"),
        ("rectified", "x", "flow.prediction 'x' is not one of velocity, x0, noise, v"),
        ("rectified", "v", "'v' belongs to flow.path variance_preserving"),
    ],
)
def test_what_cannot_be_is_refused(path: str, prediction: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Parameterization(path, prediction)
