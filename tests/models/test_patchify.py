"""Patches: a lossless reordering, one token a block."""

import pytest
import torch
import torch.nn.functional as F
from einops import EinopsError
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.models.patchify import PatchIn, PatchOut, patchify, patchify_last, unpatchify, unpatchify_last

few = st.integers(1, 3)


@given(b=few, c=few, tokens=st.tuples(few, few, few), patch=st.tuples(few, few, few))
def test_round_trip(b: int, c: int, tokens: tuple[int, int, int], patch: tuple[int, int, int]) -> None:
    t, h, w = (n * p for n, p in zip(tokens, patch))
    x = torch.arange(float(b * c * t * h * w)).view(b, c, t, h, w)
    out = patchify(x, patch)
    assert out.shape == (b, tokens[0], tokens[1] * tokens[2], c * patch[0] * patch[1] * patch[2])
    assert torch.equal(unpatchify(out, patch, tokens[1], tokens[2]), x)


def test_a_token_is_one_block_rows_first_channels_outermost() -> None:
    x = torch.arange(2.0 * 2 * 4 * 6).view(1, 2, 2, 4, 6)
    tokens = patchify(x, (1, 2, 3))
    assert tokens.shape == (1, 2, 4, 12)
    assert torch.equal(tokens[0, 1, 1], x[0, :, 1, 0:2, 3:6].flatten())  # second frame, first row, second column
    assert torch.equal(tokens[0, 0, 2], x[0, :, 0, 2:4, 0:3].flatten())  # first frame, second row, first column


def test_a_size_that_the_patch_does_not_divide_is_refused() -> None:
    with pytest.raises(EinopsError):
        patchify(torch.zeros(1, 1, 1, 3, 2), (1, 2, 2))


@settings(deadline=None)
@given(b=few, c=few, tokens=st.tuples(few, few, few), patch=st.tuples(few, few, few))
def test_channels_last_gives_the_same_through_the_same_weights(
    b: int, c: int, tokens: tuple[int, int, int], patch: tuple[int, int, int]
) -> None:
    t, h, w = (n * p for n, p in zip(tokens, patch))
    x = torch.randn(b, c, t, h, w, generator=torch.Generator().manual_seed(c), dtype=torch.float64)
    read, write = PatchIn(c, patch, 5).double(), PatchOut(5, c, patch).double()
    last = read(patchify_last(x.permute(0, 2, 3, 4, 1), patch))
    first = F.linear(patchify(x, patch), read.weight, read.bias)
    torch.testing.assert_close(last, first)
    out = unpatchify_last(write(last), patch, tokens[1], tokens[2])
    expected = unpatchify(F.linear(first, write.weight, write.bias), patch, tokens[1], tokens[2])
    torch.testing.assert_close(out.permute(0, 4, 1, 2, 3), expected)
