"""Scores against closed forms: known shifts, levels and repetitions; hashes against other encodings of the same."""

import cv2
import numpy as np
import pytest

from videodit.data.mp4 import encode_mp4
from videodit.data.scores import HASH_BITS, ClipScorer, hash_distance, score_clip, shrink
from videodit.data.video_io import read_frames


def texture(seed: int, height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8, smooth and different everywhere; periodic, so that it may be rolled."""
    noise = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    tiled = cv2.GaussianBlur(np.tile(noise, (3, 3)), (0, 0), 4)[height : 2 * height, width : 2 * width]
    gray = np.clip(128 + 45 * tiled / tiled.std(), 0, 255).astype(np.uint8)
    return np.repeat(gray[..., None], 3, axis=2)


def moving(seed: int, pixels: int, frames: int = 17, height: int = 128, width: int = 192) -> np.ndarray:
    picture = texture(seed, height, width)
    return np.stack([np.roll(picture, pixels * number, axis=1) for number in range(frames)])


@pytest.mark.parametrize(("pixels", "fps"), [(1, 8), (2, 8), (3, 24), (2, 3)])
def test_motion_is_the_shift_in_short_sides_a_second(pixels: int, fps: int) -> None:
    scores = score_clip(moving(0, pixels), fps)
    assert scores.motion == pytest.approx(pixels * fps / 128, rel=0.15)
    assert scores.static == 0


def test_a_still_has_no_motion_and_is_static() -> None:
    scores = score_clip(moving(1, 0), 8)
    assert (scores.motion, scores.static) == (0, 1)
    one = score_clip(moving(1, 0)[:1], 8)
    assert (one.motion, one.static, one.picture_hash) == (0, 1, scores.picture_hash)


def test_a_slide_show_is_static_but_for_its_changes() -> None:
    slides = np.concatenate([moving(seed, 0, frames=4) for seed in range(5)])  # 19 pairs, 4 of them changes
    assert score_clip(slides, 2).static == pytest.approx(15 / 19, abs=1e-4)


def test_brightness_is_mean_luma() -> None:
    for level in (0, 51, 255):
        assert score_clip(np.full((5, 20, 30, 3), level, np.uint8), 4).brightness == pytest.approx(
            level / 255, abs=1e-4
        )


def test_sharpness_falls_with_blur_and_stays_with_size() -> None:
    sharp = moving(2, 1, frames=5, height=512, width=512)
    sharp = np.where(sharp > 128, 255, 0).astype(np.uint8)
    blurred = [np.stack([cv2.GaussianBlur(f, (0, 0), s) for f in sharp]) for s in (3, 9)]
    values = [score_clip(clip, 8).sharpness for clip in (sharp, *blurred)]
    assert values[0] > 2 * values[1] > 4 * values[2]
    doubled = sharp.repeat(2, axis=1).repeat(2, axis=2)
    assert score_clip(doubled, 8).sharpness == pytest.approx(values[0], rel=0.05)


@pytest.mark.parametrize("short_side", [270, 300, 360, 400, 480, 500])
def test_smaller_pictures_are_as_sharp_as_means_over_areas(short_side: int) -> None:
    """Where the factor is not whole; noise is the hardest."""
    noise = np.random.default_rng(0).standard_normal((short_side, short_side * 3 // 2)).astype(np.float32)
    for blur in (0.8, 2.0):
        soft = cv2.GaussianBlur(noise, (0, 0), blur)
        gray = np.clip(128 + 40 * soft / soft.std(), 0, 255).astype(np.uint8)
        ours = shrink(gray, 256)
        mean = cv2.resize(gray, ours.shape[::-1], interpolation=cv2.INTER_AREA)
        assert min(ours.shape) == 256
        assert cv2.Laplacian(ours, cv2.CV_64F).var() == pytest.approx(cv2.Laplacian(mean, cv2.CV_64F).var(), rel=0.25)


def test_hashes_of_other_encodings_are_near_and_of_other_clips_far() -> None:
    clips = [moving(seed, 2) for seed in range(6)]
    hashes = [score_clip(clip, 8).picture_hash for clip in clips]
    for clip, text in zip(clips, hashes):
        assert len(text) * 4 == HASH_BITS
        small = np.stack([cv2.resize(frame, (120, 80), interpolation=cv2.INTER_AREA) for frame in clip])
        again = score_clip(read_frames(encode_mp4(small, 8, crf=30)), 8).picture_hash
        assert hash_distance(text, again) <= 12
    distances = [hash_distance(a, b) for i, a in enumerate(hashes) for b in hashes[:i]]
    assert min(distances) > 50


@pytest.mark.parametrize("size", [(2, 2), (16, 16), (17, 90), (64, 64)])
@pytest.mark.parametrize("fps", [0.5, 4, 1000])
def test_any_size_and_rate_is_scored(size: tuple[int, int], fps: float) -> None:
    scorer = ClipScorer(fps)
    for frame in np.random.default_rng(0).integers(0, 256, (9, *size, 3), np.uint8):
        scorer.push(frame)
    scores = scorer.finish()
    assert 0.3 < scores.brightness < 0.7 and np.isfinite(scores.motion) and scores.static == 0
