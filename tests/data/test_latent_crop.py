"""Training windows: where they lie, what they hold, and that nothing but a clip's own latents and number decides."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.latent_crop import LatentCropConfig, crop, draw_windows, window_weights


@settings(deadline=None, max_examples=60)
@given(
    patch=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    window=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    more=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    power=st.sampled_from([0.0, 1.0, 4.0, 50.0]),
    seed=st.integers(0, 2**31),
)
def test_a_crop_is_a_window_of_its_clip_on_the_patches_grid(
    patch: tuple[int, int], window: tuple[int, int], more: tuple[int, int], power: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = (window[0] * patch[0], window[1] * patch[1])
    whole = (size[0] + more[0] * patch[0], size[1] + more[1] * patch[1])
    latents = torch.randn(4, 3, 2, *whole, generator=generator)
    uniform = torch.rand(4, generator=generator)
    weights = window_weights(latents, size, patch, power)
    origins = draw_windows(weights, patch, uniform)
    assert (origins % torch.tensor(patch) == 0).all()
    for clip, (row, column), part in zip(latents, origins.tolist(), crop(latents, origins, size), strict=True):
        assert torch.equal(part, clip[:, :, row : row + size[0], column : column + size[1]])
    # A clip's window does not hang on the others of its batch, but for the order of float32 sums (to the power of 50).
    torch.testing.assert_close(window_weights(latents[2:], size, patch, power), weights[2:], rtol=1e-3, atol=1e-6)
    assert torch.equal(draw_windows(weights[2:], patch, uniform[2:]), origins[2:])


def test_the_window_with_the_object_is_drawn_as_often_as_its_contrast_says() -> None:
    latents = torch.zeros(1, 1, 1, 2, 4)
    latents[..., 0] = -1.0
    latents[..., 1:] = 1.0  # the mean is 0.5: energy 2 (1.5² + 0.5²) in columns 0 and 1, 4 x 0.5² in 2 and 3
    uniform = (torch.arange(1000) + 0.5) / 1000
    for power, first in ((0.0, 0.5), (1.0, 5 / 6), (2.0, 25 / 26), (100.0, 1.0)):
        weights = window_weights(latents, (2, 2), (2, 2), power)
        drawn = draw_windows(weights.expand(1000, -1, -1), (2, 2), uniform)
        assert (drawn[:, 1] == 0).float().mean() == pytest.approx(first, abs=1e-3)


def test_a_clip_without_contrast_has_any_window() -> None:
    uniform = (torch.arange(100) + 0.5) / 100
    weights = window_weights(torch.full((100, 2, 3, 4, 4), 0.3), (2, 2), (2, 2), 4.0)
    origins = draw_windows(weights, (2, 2), uniform)
    assert torch.unique(origins, dim=0).tolist() == [[0, 0], [0, 2], [2, 0], [2, 2]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": (-2, 4)}, r"crop.size \[-2, 4\] is not 2 sizes: use for example \[6, 6\], or \[0, 0\] for none"),
        ({"size": (6, 0)}, r"crop.size \[6, 0\] is not 2 sizes: use for example \[6, 6\], or \[0, 0\] for none"),
        ({"share": 0.5}, r"crop.share 0.5 without crop.size: give for example --crop.size \[6,6\]"),
        ({"share": 1.5}, "crop.share 1.5 is no share: use a number from 0 to 1"),
        ({"contrast_power": -1.0}, "crop.contrast_power -1.0 is negative: 0 draws every window alike"),
    ],
)
def test_what_cannot_be_is_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LatentCropConfig(**changes)
