"""RMS norm with rotary embedding: values and hand-written gradients against the reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from videodit.kernels.norm_rope import norm_rope, norm_rope_reference
from videodit.models.layers import RMSNorm
from videodit.models.rope import apply_rope, rope_table


def inputs(
    b: int, t: int, s: int, h: int, e: int, all_heads: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(b + 10 * t + 100 * s)
    x = torch.randn(b, t, s, h, e, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(h * e if all_heads else e, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), weight.requires_grad_(), rope_table(t, s, 1, e)


@settings(max_examples=25, deadline=None)
@given(sizes=st.tuples(*[st.integers(1, 3)] * 4), pairs=st.integers(1, 4), all_heads=st.booleans())
def test_gradients_are_those_of_finite_differences(sizes: tuple, pairs: int, all_heads: bool) -> None:
    x, weight, table = inputs(*sizes, 2 * pairs, all_heads, torch.float64)
    assert torch.autograd.gradcheck(lambda x, weight: norm_rope(x, weight, table), (x, weight))


@pytest.mark.parametrize("all_heads", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_reference_in_float64(dtype: torch.dtype, tolerance: float, all_heads: bool) -> None:
    x, weight, table = inputs(2, 3, 5, 4, 12, all_heads, dtype)
    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    out, expected = norm_rope(x, weight, table), norm_rope_reference(*exact, table)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    g = torch.randn(out.shape, dtype=torch.float64)
    ours, theirs = torch.autograd.grad(out, (x, weight), g.to(dtype)), torch.autograd.grad(expected, exact, g)
    for one, other in zip(ours, theirs):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


def test_is_the_norm_and_then_the_rotation() -> None:
    x, weight, table = inputs(2, 3, 4, 2, 6, False, torch.float32)
    norm = RMSNorm(6)
    norm.weight.data = weight.detach()
    torch.testing.assert_close(norm_rope(x, weight, table), apply_rope(norm(x), table))


def test_one_buffer_is_kept_for_the_gradient() -> None:
    x, weight, table = inputs(2, 3, 64, 4, 12, False, torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        norm_rope(x, weight, table)
    assert sum(tensor.numel() for tensor in kept if tensor.data_ptr() != x.data_ptr()) < x.numel()
