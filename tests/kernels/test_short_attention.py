"""Short attention on a CPU: values and gradients of its reference, whatever the strides."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from videodit.kernels.short_attention import short_attention, short_attention_reference

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {  # of (b, t, s, h, e), as `attend` makes them
    "spatial": lambda x: x.flatten(0, 1).transpose(1, 2),
    "temporal": lambda x: x.flatten(2, 3).transpose(1, 2),
    "full": lambda x: x.flatten(1, 2).transpose(1, 2),
}


def leaves(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("view", VIEWS)
def test_values_and_gradients_are_the_references(view: str) -> None:
    def run(attention: Callable[..., Tensor], *qkv: Tensor) -> tuple[Tensor, ...]:
        out = attention(*(VIEWS[view](x) for x in qkv))
        return out, *torch.autograd.grad((out * torch.arange(out.numel()).view(out.shape)).sum(), qkv)

    qkv = leaves(2, 3, 4, 2, 6)
    for one, other in zip(run(short_attention, *qkv), run(short_attention_reference, *qkv)):
        torch.testing.assert_close(one, other)
    with torch.no_grad():
        views = [VIEWS[view](x) for x in qkv]
        torch.testing.assert_close(short_attention(*views), short_attention_reference(*views))


@pytest.mark.parametrize("heads", [1, 3])  # fewer and more than clips: either is looped over
def test_gradients_with_a_mask_are_finite_differences(heads: int) -> None:
    query, key, value = leaves(2, heads, 3, 2)
    mask = torch.tensor([True, True, False]) | torch.tensor([False, True])[:, None, None, None]
    assert torch.autograd.gradcheck(lambda *qkv: short_attention(*qkv, mask), (query, key, value))
    short_attention(query, key, value, mask)[0].sum().backward()
    assert key.grad is not None and not key.grad[0, :, 2].any()  # hidden from the first clip


def test_bfloat16_is_the_reference() -> None:
    qkv = leaves(2, 4, 3, 8, dtype=torch.bfloat16)
    assert torch.equal(short_attention(*qkv), short_attention_reference(*qkv))
