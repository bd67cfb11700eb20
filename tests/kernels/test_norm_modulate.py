"""Layer norm with modulation: values and hand-written gradients against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videodit.kernels.norm_modulate import norm_modulate, norm_modulate_reference


def inputs(b: int, t: int, s: int, d: int, frames: bool, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * t + 100 * s)
    shapes = [(b, t, s, d), *[(b, t if frames else 1, 1, d)] * 2]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 3)] * 3), d=st.integers(2, 6), frames=st.booleans())
def test_gradients_are_those_of_finite_differences(sizes: tuple, d: int, frames: bool) -> None:
    assert torch.autograd.gradcheck(norm_modulate, inputs(*sizes, d, frames, torch.float64))


@pytest.mark.parametrize("frames", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_equals_the_reference_in_float64(dtype: torch.dtype, tolerance: float, frames: bool) -> None:
    given = inputs(2, 3, 7, 16, frames, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    out, expected = norm_modulate(*given), norm_modulate_reference(*exact)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    g = torch.randn(out.shape, dtype=torch.float64)
    for one, other in zip(torch.autograd.grad(out, given, g.to(dtype)), torch.autograd.grad(expected, exact, g)):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_one_buffer_is_kept_for_the_gradient() -> None:
    given = inputs(2, 3, 64, 32, True, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_modulate(*given)
    assert sum(tensor.numel() for tensor in kept) < 1.5 * given[0].numel()
