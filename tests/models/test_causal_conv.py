"""Causal convolution and resampling: parity with torch's convolution, exact inverses, and no look into the future."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.models.tiny import randomize
from videodit.models.causal_conv import (
    CausalConv3d,
    CausalDownsample,
    CausalUpsample,
    ChannelNorm,
    StreamCache,
    fold,
    unfold,
)

KERNELS = [(3, 3, 3), (1, 3, 3), (3, 1, 1), (1, 1, 1), (5, 1, 1), (2, 3, 3)]
FACTORS = [(1, 2, 2), (2, 1, 1), (2, 2, 2), (4, 1, 1), (4, 2, 2)]


def reference(conv: CausalConv3d, x: Tensor) -> Tensor:
    """The plain 3D convolution with all time padding in front."""
    weight = conv.weight.view(conv.bias.shape[0], -1, *conv.kernel)
    kt, kh, kw = conv.kernel
    return F.conv3d(F.pad(x, (kw // 2, kw // 2, kh // 2, kh // 2, kt - 1, 0)), weight, conv.bias)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_every_shortcut_is_the_same_convolution(kernel: tuple[int, int, int], channels_last: bool) -> None:
    conv = randomize(CausalConv3d(3, 5, kernel), 1.0)
    nn.init.normal_(conv.weight)
    x = torch.randn(2, 3, 4, 6, 5)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(conv(x), reference(conv, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradients(kernel: tuple[int, int, int]) -> None:
    conv = CausalConv3d(2, 2, kernel).double()
    nn.init.normal_(conv.weight)
    x = torch.randn(1, 2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: conv(x), (x, conv.weight, conv.bias))


def stream(layer: nn.Module, chunks: list[Tensor]) -> Tensor:
    """The layer over chunks of a clip, one after another."""
    cache = StreamCache()
    out = []
    for chunk in chunks:
        out.append(layer(chunk, cache))
        cache.first_chunk = False
    return torch.cat(out, dim=2)


@settings(max_examples=40, deadline=None)
@given(kernel=st.sampled_from(KERNELS), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_a_streamed_convolution_is_the_whole_one(kernel: tuple[int, int, int], sizes: list[int]) -> None:
    conv = CausalConv3d(2, 3, kernel)
    nn.init.normal_(conv.weight)
    x = torch.randn(1, 2, sum(sizes), 3, 3)
    torch.testing.assert_close(stream(conv, list(x.split(sizes, dim=2))), conv(x), rtol=1e-4, atol=1e-4)


def test_two_clips_do_not_share_a_cache() -> None:
    conv = CausalConv3d(2, 2, (3, 1, 1))
    nn.init.normal_(conv.weight)
    x = torch.randn(1, 2, 4, 2, 2)
    stream(conv, [torch.randn(1, 2, 2, 2, 2)])
    torch.testing.assert_close(stream(conv, [x]), conv(x))


def test_channel_norm_is_layer_norm_over_channels() -> None:
    norm = randomize(ChannelNorm(6), 1.0)
    x = torch.randn(2, 6, 3, 4, 5) * 3 + 1
    mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, correction=0)
    scale, bias = (p.view(1, 6, 1, 1, 1) for p in (norm.weight, norm.bias))
    torch.testing.assert_close(norm(x), (x - mean) / (var + 1e-6).sqrt() * scale + bias)


few = st.integers(1, 3)


@given(b=few, c=few, blocks=st.tuples(st.integers(0, 3), few, few), factor=st.tuples(st.integers(1, 4), few, few))
def test_unfold_inverts_fold(b: int, c: int, blocks: tuple, factor: tuple) -> None:
    for first_chunk in (True, False):
        frames = blocks[0] * factor[0] + 1 if first_chunk else (blocks[0] + 1) * factor[0]
        x = torch.randn(b, c, frames, blocks[1] * factor[1], blocks[2] * factor[2])
        folded = fold(x, factor, first_chunk)
        assert folded.shape == (b, c * factor[0] * factor[1] * factor[2], blocks[0] + 1, blocks[1], blocks[2])
        assert torch.equal(unfold(folded, factor, first_chunk), x)


def test_the_first_frame_is_a_block_of_its_own() -> None:
    x = torch.arange(5.0).view(1, 1, 5, 1, 1)
    assert fold(x, (4, 1, 1))[0, :, :, 0, 0].T.tolist() == [[0, 0, 0, 0], [1, 2, 3, 4]]
    assert fold(x, (2, 1, 1))[0, :, :, 0, 0].T.tolist() == [[0, 0], [1, 2], [3, 4]]


def test_folding_twice_over_time_and_at_once_see_the_same_frames() -> None:
    x = torch.arange(9.0).view(1, 1, 9, 1, 1)
    twice = fold(fold(x, (2, 1, 1)), (2, 1, 1))
    assert torch.equal(twice.sort(dim=1).values, fold(x, (4, 1, 1)))


def resamplers(factor: tuple[int, int, int]) -> list[tuple[nn.Module, Callable[[int], int]]]:
    """A down- and an upsampler of 8 channels, each with how many frames it takes for k + 1 blocks."""
    layers = [
        (CausalDownsample(8, 8, factor), lambda k: k * factor[0] + 1),
        (CausalUpsample(8, 8, factor), lambda k: k + 1),
    ]
    for layer, _ in layers:
        nn.init.normal_(layer.conv.weight)
    return layers


@pytest.mark.parametrize("factor", FACTORS)
def test_resamplers_stream_and_do_not_look_ahead(factor: tuple[int, int, int]) -> None:
    for layer, frames in resamplers(factor):
        x = torch.randn(1, 8, frames(3), 4, 4)
        whole = layer(x)
        chunks = list(x.tensor_split([frames(0), frames(2)], dim=2))
        torch.testing.assert_close(stream(layer, chunks), whole, rtol=1e-4, atol=1e-4)
        known = layer(x[:, :, : frames(1)])
        torch.testing.assert_close(whole[:, :, : known.shape[2]], known, rtol=1e-4, atol=1e-4)


def test_without_its_convolution_downsampling_averages_and_upsampling_repeats() -> None:
    down, up = CausalDownsample(2, 4, (1, 2, 2)), CausalUpsample(4, 2, (1, 2, 2))
    nn.init.zeros_(down.conv.weight)
    nn.init.zeros_(up.conv.weight)
    x = torch.randn(1, 2, 1, 2, 2)
    rows = x[0, :, 0].mean(dim=-1)  # each group of 8 / 4 folded channels is one row of pixels
    torch.testing.assert_close(down(x)[0, :, 0, 0, 0], rows.flatten())
    torch.testing.assert_close(up(down(x))[0, :, 0], rows[..., None].expand(2, 2, 2))


def test_channels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot average 24 folded channels into 7: choose a divisor of 24"):
        CausalDownsample(3, 7, (2, 2, 2))
    with pytest.raises(ValueError, match="cannot repeat 7 channels into 24: choose a multiple of 7"):
        CausalUpsample(7, 3, (2, 2, 2))
