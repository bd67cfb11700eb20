"""The loss: a mean over what is to be predicted, and the published weights."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videodit.flow.loss import flow_loss, frame_error, level_weight, likelihood_loss


def test_is_the_mean_squared_error_when_all_frames_count() -> None:
    prediction, target = torch.randn(3, 2, 4, 5, 5), torch.randn(3, 2, 4, 5, 5)
    expected = torch.stack([torch.nn.functional.mse_loss(p, t) for p, t in zip(prediction, target)])
    torch.testing.assert_close(flow_loss(frame_error(prediction, target), torch.ones(3, 4)), expected)


def test_given_frames_do_not_count() -> None:
    prediction, target = torch.randn(1, 2, 4, 3, 3), torch.randn(1, 2, 4, 3, 3)
    weight = torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    expected = (prediction - target)[:, :, [1, 3]].square().mean()
    torch.testing.assert_close(flow_loss(frame_error(prediction, target), weight)[0], expected)
    prediction[:, :, 0] = 1e6
    torch.testing.assert_close(flow_loss(frame_error(prediction, target), weight)[0], expected)


def test_a_clip_of_conditions_alone_costs_nothing() -> None:
    prediction = torch.randn(2, 2, 3, 2, 2, requires_grad=True)
    loss = flow_loss(frame_error(prediction, torch.randn(2, 2, 3, 2, 2)), torch.tensor([[0.0, 0, 0], [1, 1, 1]]))
    assert loss[0] == 0 and loss[1] > 0
    loss.sum().backward()
    assert prediction.grad is not None and (prediction.grad[0] == 0).all() and (prediction.grad[1] != 0).any()


def test_weights_scale_frames() -> None:
    prediction, target, weight = torch.randn(2, 2, 3, 2, 2), torch.randn(2, 2, 3, 2, 2), torch.rand(2, 3) + 0.1
    per_frame = (prediction - target).square().mean(dim=(1, 3, 4))
    torch.testing.assert_close(flow_loss(frame_error(prediction, target), weight), (per_frame * weight).mean(dim=1))


def test_is_float32_for_half_precision_predictions() -> None:
    prediction, target = torch.randn(1, 1, 2, 2, 2).bfloat16(), torch.randn(1, 1, 2, 2, 2)
    loss = flow_loss(frame_error(prediction, target), torch.ones(1, 2))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss[0], (prediction.float() - target).square().mean())


@given(st.floats(0.001, 0.999), st.floats(0.5, 20.0))
def test_min_snr_is_the_published_weight(sigma: float, gamma: float) -> None:
    snr = ((1 - sigma) / sigma) ** 2
    weight = float(level_weight(torch.tensor(sigma, dtype=torch.float64), "min_snr", gamma))
    assert weight == pytest.approx(min(snr, gamma) / snr, rel=1e-6)


def test_weights_at_the_ends() -> None:
    ends = torch.tensor([0.0, 1.0])
    weight = level_weight(ends, "min_snr")
    assert weight[0] < 1e-6 and weight[1] == 1.0
    assert level_weight(ends, "uniform").tolist() == [1.0, 1.0]


def test_min_snr_of_noise_prediction_bounds_the_weight_of_x0() -> None:
    """Noise error weighted by w is x0 error weighted by w * snr, which min-SNR caps at gamma."""
    sigma = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    snr = ((1 - sigma) / sigma).square()
    torch.testing.assert_close(level_weight(sigma, "min_snr", 5.0) * snr, snr.clamp(max=5.0))


def test_velocity_weight_turns_an_error_of_x0_into_one_of_the_velocity() -> None:
    sigma = torch.tensor([0.06, 0.3, 1.0])
    x0, guess, noise = torch.randn(3, 3, 7).unbind(1)
    level = sigma[:, None]
    x = (1 - level) * x0 + level * noise
    velocity_error = ((x - (1 - level) * guess) / level - guess - (noise - x0)).square().mean(dim=1)
    weighted = level_weight(sigma, "velocity") * (guess - x0).square().mean(dim=1)
    torch.testing.assert_close(weighted, velocity_error, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(level_weight(torch.tensor(0.0), "velocity"), torch.tensor(400.0))


def test_likelihood_loss_is_least_at_the_mean_error_and_at_zero_the_flow_loss() -> None:
    prediction, target = torch.randn(64, 2, 3, 4, 4), torch.randn(64, 2, 3, 4, 4)
    weight = torch.ones(64, 3)
    torch.testing.assert_close(
        likelihood_loss(frame_error(prediction, target), weight, torch.zeros(64, 3)),
        flow_loss(frame_error(prediction, target), weight),
    )
    mean = flow_loss(frame_error(prediction, target), weight).mean().log()
    best = likelihood_loss(frame_error(prediction, target), weight, mean.expand(64, 3)).mean()
    torch.testing.assert_close(best, 1 + mean)
    for off in (-0.1, 0.1):
        assert likelihood_loss(frame_error(prediction, target), weight, (mean + off).expand(64, 3)).mean() > best


def test_likelihood_loss_leaves_conditions_out() -> None:
    prediction, target = torch.randn(2, 2, 3, 4, 4), torch.randn(2, 2, 3, 4, 4)
    weight = torch.tensor([[0.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    log_error = torch.randn(2, 3)
    loss = likelihood_loss(frame_error(prediction, target), weight, log_error)
    error = (prediction - target)[0].square().mean(dim=(0, 2, 3))[1:]
    torch.testing.assert_close(loss[0], (error / log_error[0, 1:].exp() + log_error[0, 1:]).mean())
    assert loss[1] == 0
