"""The learned error of a noise level: a piecewise linear curve that training brings to the error there is."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from videodit.flow.loss import frame_error, likelihood_loss
from videodit.models.level_error import GAIN, KNOTS, MAX_LOGIT, LevelError


def test_is_zero_at_first_so_that_every_level_counts_as_it_comes() -> None:
    sigma = torch.tensor([[0.0, 1e-9, 0.5], [0.9, 1.0 - 1e-7, 1.0]])
    log_error = LevelError()(sigma)
    assert log_error.shape == sigma.shape and log_error.dtype == torch.float32 and not log_error.any()


@given(st.floats(-MAX_LOGIT, MAX_LOGIT), st.floats(-3, 3), st.floats(-3, 3))
def test_holds_any_line_over_logit_sigma(logit: float, slope: float, offset: float) -> None:
    module = LevelError()
    with torch.no_grad():
        module.knots.copy_((slope * torch.linspace(-MAX_LOGIT, MAX_LOGIT, KNOTS) + offset) / GAIN)
    sigma = torch.sigmoid(torch.tensor([logit], dtype=torch.float64))
    torch.testing.assert_close(
        module(sigma), torch.tensor([slope * logit + offset], dtype=torch.float32), rtol=1e-2, atol=1e-2
    )


def test_finds_the_error_of_each_level() -> None:
    """Predictions that miss by an error which falls with the noise from 1 to 0.05, as a DiT's do."""
    torch.manual_seed(0)
    module = LevelError()
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 5e-3 * (1 - step / 1500)
        sigma = torch.rand(32, 1)
        error = 0.05 + 0.95 * sigma**4
        missed = error.sqrt()[..., None, None, None] * torch.randn(32, 1, 1, 4, 4)
        optimizer.zero_grad()
        likelihood_loss(
            frame_error(missed, torch.zeros_like(missed)), torch.ones(32, 1), module(sigma)
        ).mean().backward()
        optimizer.step()
    sigma = torch.linspace(0.05, 0.95, 19)
    with torch.no_grad():
        assert (module(sigma) - (0.05 + 0.95 * sigma**4).log()).abs().max() < 0.25
