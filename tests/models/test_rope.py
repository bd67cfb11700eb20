"""RoPE: the published form, and what it is for: scores that depend on relative positions only."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from videodit.models.rope import absolute_embedding, apply_rope, axis_dims, rope_table


@given(st.integers(1, 128).map(lambda half: 2 * half))
def test_channels_are_split_as_wan_does(head_dim: int) -> None:
    t, h, w = axis_dims(head_dim)
    assert (t, h, w) == (head_dim - 4 * (head_dim // 6), 2 * (head_dim // 6), 2 * (head_dim // 6))
    assert t + h + w == head_dim and t % 2 == h % 2 == w % 2 == 0


def test_wans_own_head_size() -> None:
    assert axis_dims(128) == (44, 42, 42)


def test_is_wans_multiplication_by_complex_numbers() -> None:
    t, h, w, e = 3, 2, 4, 20
    x = torch.randn(2, t, h * w, 3, e)
    grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (t, h, w)), indexing="ij")
    phases = [
        grid[..., None] * 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        for grid, dim in zip(grids, axis_dims(e))
    ]
    turn = torch.polar(torch.ones(()).double(), torch.cat(phases, dim=-1)).reshape(t, h * w, 1, e // 2)
    expected = torch.view_as_real(torch.view_as_complex(x.double().unflatten(-1, (-1, 2))) * turn).flatten(-2)
    torch.testing.assert_close(apply_rope(x, rope_table(t, h, w, e)), expected.float())


def test_scores_depend_on_relative_positions_only() -> None:
    t, h, w, e = 4, 4, 4, 12
    query, key = torch.randn(e), torch.randn(e)
    table = rope_table(t, h, w, e)

    def everywhere(x: torch.Tensor) -> torch.Tensor:
        return apply_rope(x.expand(1, t, h * w, 1, e), table).reshape(t, h, w, e)

    scores = torch.einsum("thwe,xyze->thwxyz", everywhere(query), everywhere(key))
    for steps in ((1, 0, 0), (0, 1, 0), (0, 0, 1), (2, 1, 3)):
        here = scores[tuple(slice(0, n - s) for n, s in zip((t, h, w) * 2, steps * 2))]
        there = scores[tuple(slice(s, n) for n, s in zip((t, h, w) * 2, steps * 2))]
        torch.testing.assert_close(here, there, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(scores[0, 0, 0, 0, 0, 0], scores[0, 0, 0, 1, 0, 0])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_each_axis_turns_its_own_channels(axis: int) -> None:
    sizes = [3 if i == axis else 1 for i in range(3)]
    x = torch.ones(1, sizes[0], sizes[1] * sizes[2], 1, 12)
    moved = (apply_rope(x, rope_table(*sizes, 12)) - x).abs().amax(dim=(0, 1, 2, 3)) > 1e-6
    dims = axis_dims(12)
    first = sum(dims[:axis])
    assert moved.tolist() == [first <= channel < first + dims[axis] for channel in range(12)]


def test_keeps_norms_and_the_first_token() -> None:
    x = torch.randn(2, 3, 6, 2, 16)
    turned = apply_rope(x, rope_table(3, 2, 3, 16))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, 0, 0], x[:, 0, 0])


class Waves(TorchDispatchMode):
    """How many cosines and sines are computed."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.cos.default, torch.ops.aten.sin.default):
            self.count += out.numel()
        return out


def test_cosines_and_sines_are_those_of_the_axes_not_of_every_token() -> None:
    """Of a large clip they would take seconds on a CPU, again for every other size of clip."""
    with Waves() as waves:
        rope_table(4, 5, 6, 12)
    assert waves.count == 2 * (4 + 5 + 6) * (4 // 2)  # 4 channels an axis, in pairs


def test_a_larger_base_turns_slower() -> None:
    slow, fast = (rope_table(2, 1, 1, 12, theta)[1, 1, 0].asin() for theta in (10000.0, 100.0))
    assert slow[0] == fast[0]  # the first pair of an axis turns by 1 whatever the base
    assert (slow[2:4] < fast[2:4]).all()


def test_keeps_the_dtype_and_computes_in_float32() -> None:
    x = torch.randn(1, 2, 4, 1, 8, dtype=torch.bfloat16)
    table = rope_table(2, 2, 2, 8)
    assert torch.equal(apply_rope(x, table), apply_rope(x.float(), table).bfloat16())


def test_the_absolute_embedding_tells_every_place_apart() -> None:
    embedded = absolute_embedding(5, 4, 6, 96)
    assert embedded.shape == (5, 24, 96)
    rows = embedded.flatten(0, 1)
    torch.testing.assert_close(rows.square().sum(dim=1), torch.full((120,), 48.0))  # a sine and a cosine a pair
    nearest = torch.cdist(rows, rows) + 1e3 * torch.eye(120)
    assert nearest.min() > 0.5


def test_the_absolute_embedding_of_a_place_does_not_depend_on_the_clip_s_size() -> None:
    small, large = absolute_embedding(2, 3, 4, 48), absolute_embedding(5, 7, 8, 48)
    torch.testing.assert_close(small.unflatten(1, (3, 4)), large.unflatten(1, (7, 8))[:2, :3, :4])


def test_the_absolute_embedding_of_a_crop_is_that_of_its_place_in_the_whole() -> None:
    whole = absolute_embedding(2, 6, 8, 48).unflatten(1, (6, 8))
    crops = absolute_embedding(2, 3, 4, 48, torch.tensor([[0, 0], [3, 1], [2, 4]])).unflatten(2, (3, 4))
    for part, (row, column) in zip(crops, [(0, 0), (3, 1), (2, 4)], strict=True):
        assert torch.equal(part, whole[:, row : row + 3, column : column + 4])
