"""Classifier-free guidance: its line through two predictions, and which rows it puts together."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from videodit.flow.guidance import guided, guided_velocity


def test_one_is_conditional_and_zero_is_unconditional() -> None:
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)


@given(st.floats(-2, 10))
def test_closed_form(scale: float) -> None:
    conditional, unconditional = torch.randn(4, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    published = (1 + (scale - 1)) * conditional - (scale - 1) * unconditional  # Eq. 6 with w = g - 1
    torch.testing.assert_close(guided(conditional, unconditional, scale), published)
    assert torch.allclose(guided(conditional, conditional, scale), conditional)


def test_conditional_rows_come_first() -> None:
    text = torch.tensor([10.0, 20.0, 0.0, 0.0]).view(-1, 1)  # two prompts, then twice the empty one

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        assert x.shape == (4, 5) and sigma.tolist() == [0.25, 0.75, 0.25, 0.75]
        return text + x * sigma[:, None]

    x, sigma = torch.randn(2, 5), torch.tensor([0.25, 0.75])
    out = guided_velocity(velocity, 3.0)(x, sigma)
    torch.testing.assert_close(out, 3 * text[:2] + x * sigma[:, None])
