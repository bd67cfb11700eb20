"""PSNR against its closed forms, and what the boxes may and may not change."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from videodit.data.transforms import to_model_range, to_pixels
from videodit.evaluation.reconstruction import (
    PSNR_CAP_DB,
    boxes_mask,
    compare,
    mean_squared_error,
    psnr,
    psnr_in_boxes,
    reconstruct,
    reconstruction_report,
)


def clip_uint8(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@given(st.integers(0, 255), st.integers(0, 255))
@settings(max_examples=30, deadline=None)
def test_a_constant_difference_has_its_closed_form_in_both_directions(x: int, y: int):
    a, b = torch.full((1, 3, 2, 4, 4), x, dtype=torch.uint8), torch.full((1, 3, 2, 4, 4), y, dtype=torch.uint8)
    expected = math.inf if x == y else 20 * math.log10(255 / abs(x - y))  # wrapping uint8 arithmetic would fail one way
    assert psnr(a, b).item() == pytest.approx(expected)
    assert psnr(b, a).item() == pytest.approx(expected)


def test_uint8_and_model_range_give_the_same_decibels():
    frames_a, frames_b = clip_uint8(2, 3, 8, 8, 3, seed=1), clip_uint8(2, 3, 8, 8, 3, seed=2)
    levels = psnr(frames_a.permute(0, 4, 1, 2, 3), frames_b.permute(0, 4, 1, 2, 3))
    floats = psnr(to_model_range(frames_a), to_model_range(frames_b))
    torch.testing.assert_close(levels, floats, rtol=0, atol=1e-4)


def test_each_clip_is_measured_alone():
    a = clip_uint8(3, 3, 2, 8, 8, seed=1)
    b = clip_uint8(3, 3, 2, 8, 8, seed=2)
    torch.testing.assert_close(psnr(a, b), torch.cat([psnr(a[i : i + 1], b[i : i + 1]) for i in range(3)]))


def test_a_mask_keeps_what_it_hides_out_even_a_nan():
    a, b = torch.zeros(1, 3, 2, 4, 4), torch.full((1, 3, 2, 4, 4), 0.2)
    b[..., 0, 0] = torch.nan
    mask = torch.ones(1, 1, 2, 4, 4, dtype=torch.bool)
    mask[..., 0, 0] = False
    assert psnr(a, b, mask).item() == pytest.approx(20.0)
    assert psnr(a, b, torch.zeros_like(mask)).isnan().all()


def test_boxes_are_half_open_clipped_by_the_frame_and_joined():
    boxes = torch.tensor(
        [[[[1, 2, 3, 4]], [[2, 3, 99, 4]], [[3, 3, 3, 9]]]]
    )  # three objects, one frame; the last is empty
    expected = torch.zeros(5, 6, dtype=torch.bool)
    expected[2:4, 1:3] = True
    expected[3, 2:] = True
    assert torch.equal(boxes_mask(boxes, 5, 6)[0, 0, 0], expected)


def test_only_errors_inside_the_boxes_count_and_overlap_counts_once():
    a = clip_uint8(1, 3, 2, 8, 8)
    b = a.clone()
    b[..., 0, :] = 255 - b[..., 0, :]  # outside
    boxes = torch.tensor([[[[2, 2, 6, 6]] * 2, [[2, 2, 4, 4]] * 2]])
    assert psnr_in_boxes(a, b, boxes).item() == math.inf
    b = a.clone()
    b[:, :, :, 2, 2] ^= 1  # one level in one of the 16 boxed pixels of each frame, which both boxes hold
    assert psnr_in_boxes(a, b, boxes).item() == pytest.approx(10 * math.log10(255**2 * 16))


def test_a_box_of_the_whole_frame_is_plain_psnr():
    a, b = clip_uint8(2, 3, 3, 8, 8, seed=3), clip_uint8(2, 3, 3, 8, 8, seed=4)
    boxes = torch.tensor([0, 0, 8, 8]).expand(2, 1, 3, 4)
    torch.testing.assert_close(psnr_in_boxes(a, b, boxes), psnr(a, b))


@pytest.mark.parametrize(
    "boxes", [torch.zeros(2, 1, 3, 4), torch.zeros(1, 1, 2, 4), torch.zeros(1, 3, 4), torch.zeros(1, 1, 3, 5)]
)
def test_boxes_of_another_clip_are_refused(boxes: torch.Tensor):
    a = clip_uint8(1, 3, 3, 8, 8)
    with pytest.raises(ValueError, match="boxes must be"):
        psnr_in_boxes(a, a, boxes)


def test_clips_that_differ_in_shape_dtype_or_rank_are_refused():
    a = clip_uint8(1, 3, 2, 4, 4)
    for b in (a.float(), a[..., :1], a[:, :1]):
        with pytest.raises(ValueError, match="agree in shape and dtype"):
            mean_squared_error(a, b)
    with pytest.raises(ValueError, match="b, c, t, h, w"):
        psnr(a[0], a[0])
    with pytest.raises(ValueError, match="data_range"):
        psnr(a.int(), a.int())


def test_every_level_survives_the_way_to_model_range_and_back():
    frames = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16, 1).expand(1, 2, 16, 16, 3)
    assert torch.equal(to_pixels(to_model_range(frames)), frames)
    assert to_model_range(frames).aminmax() == (-1.0, 1.0)


def test_both_means_have_their_closed_form_and_their_order():
    clips = np.full((2, 2, 4, 4, 3), 100, np.uint8)
    copy = clips.copy()
    copy[0] += 1
    copy[1] += 10
    report = compare(clips, copy)
    assert report["psnr_db"] == pytest.approx((20 * math.log10(255) + 20 * math.log10(25.5)) / 2)
    assert report["psnr_of_mean_mse_db"] == pytest.approx(10 * math.log10(255**2 / 50.5))
    assert report["psnr_of_mean_mse_db"] < report["psnr_db"]
    assert report["n"] == 2 and "psnr_boxes_db" not in report


def test_equal_clips_leave_the_mean_finite_and_unboxed_clips_stay_out():
    clips = np.full((3, 2, 4, 4, 3), 100, np.uint8)
    copy = clips.copy()
    copy[1, :, 0, 0] += 10
    empty, corner = np.zeros((1, 2, 4), int), np.tile([0, 0, 1, 1], (2, 2, 1))  # clips may differ in number of objects
    report = compare(clips, copy, [empty, corner, empty])
    assert report["psnr_boxes_db"] == pytest.approx(20 * math.log10(25.5))
    assert report["psnr_boxes_of_mean_mse_db"] == pytest.approx(20 * math.log10(25.5))
    assert compare(clips, clips)["psnr_db"] == PSNR_CAP_DB
    with pytest.raises(ValueError, match="2 sets of boxes for 3"):
        compare(clips, copy, [empty, corner])
    with pytest.raises(ValueError, match="no clips"):
        compare(clips[:0], copy[:0])


class HalfLevels(nn.Module):
    """An autoencoder whose only loss is that it halves the contrast."""

    def encode(self, clip: torch.Tensor) -> torch.Tensor:
        assert clip.shape[1] == 3 and clip.abs().max() <= 1
        return clip

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents / 2


def test_a_report_is_of_the_8_bit_pictures_at_any_micro_batch_size():
    clips = clip_uint8(5, 5, 8, 8, 3).numpy()
    once = reconstruct(HalfLevels(), clips, micro_batch_size=5)
    assert once.dtype == np.uint8 and np.abs(once.astype(float) - (clips / 2 + 63.75)).max() <= 0.5 + 1e-4
    assert np.array_equal(once, reconstruct(HalfLevels(), clips, micro_batch_size=2))
    boxes = [np.tile([0, 0, 4, 4], (1, 5, 1))] * 5
    assert reconstruction_report(HalfLevels(), clips, boxes, micro_batch_size=3) == compare(clips, once, boxes)
