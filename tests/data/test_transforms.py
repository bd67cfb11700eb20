import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.buckets import Bucket
from videodit.data.transforms import (
    fit_clip,
    frame_stride,
    frames_after_stride,
    resize_and_crop,
    temporal_window,
    to_model_range,
    to_pixels,
)


def frames_of(t: int, h: int, w: int) -> np.ndarray:
    """Frame number in red, row in green, column in blue."""
    frames = np.zeros((t, h, w, 3), np.uint8)
    frames[..., 0] = np.arange(t)[:, None, None]
    frames[..., 1] = np.arange(h)[None, :, None]
    frames[..., 2] = np.arange(w)[None, None, :]
    return frames


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 20), st.integers(20, 90), st.integers(20, 90), st.integers(0, 100), st.booleans())
def test_any_clip_gets_the_buckets_shape_and_repeats(t, h, w, seed, random):
    frames, bucket = frames_of(t, h, w), Bucket(5, 32, 48)

    def fit() -> np.ndarray:
        return fit_clip(frames, bucket, np.random.default_rng(seed) if random else None)

    assert fit().shape == (5, 32, 48, 3) and fit().dtype == np.uint8
    assert np.array_equal(fit(), fit())


def test_a_clip_of_the_buckets_shape_is_untouched():
    frames = frames_of(17, 64, 64)
    assert np.array_equal(fit_clip(frames, Bucket(17, 64, 64), np.random.default_rng(0)), frames)


def test_centre_crop_is_a_slice():
    frames = frames_of(9, 32, 64)
    assert np.array_equal(fit_clip(frames, Bucket(5, 32, 32), None), frames[2:7, :, 16:48])


def test_random_crops_are_slices_and_reach_both_ends():
    frames = frames_of(7, 32, 36)
    corners = set()
    for seed in range(100):
        cut = fit_clip(frames, Bucket(5, 32, 32), np.random.default_rng(seed))
        start, left = int(cut[0, 0, 0, 0]), int(cut[0, 0, 0, 2])
        assert np.array_equal(cut, frames[start : start + 5, :, left : left + 32])
        corners.add((start, left))
    assert {start for start, _ in corners} == {0, 1, 2} and {left for _, left in corners} == {0, 1, 2, 3, 4}


def test_window_then_space_is_fit_clip():
    # The loader decodes the window alone; the same generator must give the same clip.
    frames, rng = frames_of(30, 50, 70), np.random.default_rng(3)
    start, stop = temporal_window(30, 5, 2, rng)
    cut = resize_and_crop(frames[start:stop:2], 32, 32, rng)
    assert np.array_equal(cut, fit_clip(frames, Bucket(5, 32, 32), np.random.default_rng(3), stride=2))


def test_resize_is_antialiased_and_keeps_constants():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None, :, :, None].repeat(3, axis=3)
    small = resize_and_crop(board, 32, 32, None)
    assert np.abs(small[:, 2:-2, 2:-2].astype(int) - 127).max() <= 3  # without antialiasing: stripes or all black
    constant = np.full((2, 30, 50, 3), 93, np.uint8)
    assert (resize_and_crop(constant, 64, 64, None) == 93).all()


def test_resize_covers_and_keeps_the_aspect():
    frames = frames_of(1, 100, 200)
    cut = resize_and_crop(frames, 50, 50, None)  # halved, then the middle of 100 columns
    assert abs(int(cut[0, 25, 0, 2]) - 51) <= 2 and abs(int(cut[0, 25, 49, 2]) - 149) <= 2


@pytest.mark.parametrize(
    ("clip_fps", "target", "stride"),
    [(24, None, 1), (24, 8, 3), (30, 8, 4), (25, 24, 1), (8, 24, 1), (29.97, 10, 3), (0, 8, 1), (60, 24, 3)],
)
def test_stride_is_the_nearest_rate(clip_fps, target, stride):
    assert frame_stride(clip_fps, target) == stride


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 6), st.integers(0, 10))
def test_window_holds_exactly_the_frames_wanted(num_frames, wanted, stride, seed):
    if frames_after_stride(num_frames, stride) < wanted:
        with pytest.raises(ValueError, match=f"{num_frames} frames is too short"):
            temporal_window(num_frames, wanted, stride, None)
        return
    for rng in (None, np.random.default_rng(seed)):
        start, stop = temporal_window(num_frames, wanted, stride, rng)
        assert len(range(num_frames)[start:stop:stride]) == wanted and 0 <= start < stop <= num_frames


def test_model_range_is_exact_at_the_ends_and_round_trips():
    pixels = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1)
    clip = to_model_range(pixels)
    assert clip.shape == (1, 1, 1, 16, 16) and clip.is_contiguous()
    assert clip.min() == -1 and clip.max() == 1
    assert torch.equal(to_pixels(clip), pixels)


def test_pixels_clamp_what_a_model_overshoots():
    clip = torch.tensor([-7.0, -1.001, 0.0, 1.001, 7.0]).reshape(1, 1, 1, 1, 5)
    assert to_pixels(clip).flatten().tolist() == [0, 0, 128, 255, 255]
