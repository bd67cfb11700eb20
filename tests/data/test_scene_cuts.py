"""Scene cuts: known ones are found, motion is none, listed ones of a real trailer are found."""

from pathlib import Path

import numpy as np
import pytest
from scenedetect import FrameTimecode
from scenedetect.detectors import AdaptiveDetector

from videodit.data.scene_cuts import CutDetector, find_cuts
from videodit.data.video_io import iter_frames
from videodit.data.yuv_planes import small_bgr


def scene(seed: int, num_frames: int, size: int = 96) -> np.ndarray:
    """A coarse random picture that pans by a pixel a frame."""
    blocks = np.random.default_rng(seed).integers(0, 256, (size // 8, size // 8, 3), np.uint8)
    picture = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, shift, axis=1) for shift in range(num_frames)])


@pytest.mark.parametrize("lengths", [(30,), (30, 25), (20, 40, 33), (17, 17, 17, 17)])
def test_known_cuts_are_found(lengths: tuple[int, ...]) -> None:
    video = np.concatenate([scene(seed, length) for seed, length in enumerate(lengths)])
    assert find_cuts(video, 25) == np.cumsum([0, *lengths[:-1]]).tolist()


def test_any_iterable_will_do() -> None:
    assert find_cuts(iter([]), 24) == []
    assert find_cuts((frame for frame in scene(0, 5)), 24) == [0]
    assert find_cuts(np.zeros((40, 32, 32, 3), np.uint8), 8) == [0]


def test_cuts_are_known_after_the_lookahead() -> None:
    detector = CutDetector(25)
    video = np.concatenate([scene(0, 30), scene(1, 30)])
    assert [(number, cuts) for number, frame in enumerate(video) if (cuts := detector.push(frame))] == [
        (30 + detector.lookahead, [30])
    ]


def of_reference(pictures: list[np.ndarray], fps: float, threshold: float) -> list[int]:
    detector = AdaptiveDetector(adaptive_threshold=threshold, min_scene_len=max(2, round(fps / 2)), window_width=2)
    frames = (FrameTimecode(number, fps) for number in range(len(pictures)))
    return [cut.frame_num for time, p in zip(frames, pictures) for cut in detector.process_frame(time, p)]


@pytest.mark.parametrize("threshold", [1.2, 3.0])
@pytest.mark.parametrize("fps", [4.0, 24.0])
def test_every_decision_is_that_of_pyscenedetect(real_clips: Path, fps: float, threshold: float) -> None:
    """Also in a slide show, where nothing changes around a cut, and in noise, where everything does."""
    rng = np.random.default_rng(0)
    videos = [list(map(small_bgr, iter_frames(real_clips / name))) for name in ("nasa_13013.mp4", "av1_video.mkv")]
    videos.append([p for level in 9 * [0, 200] for p in np.full((rng.integers(1, 40), 9, 9, 3), level, np.uint8)])
    videos.append(list(rng.integers(0, 256, (60, 16, 16, 3), np.uint8)))
    videos.append(list((rng.random((200, 1, 1, 1)) * rng.integers(0, 256, (200, 24, 24, 3))).astype(np.uint8)))
    found = 0
    for pictures in videos:
        detector = CutDetector(fps, threshold)
        cuts = [cut for picture in pictures for cut in detector.push_bgr(picture)]
        assert cuts == of_reference(pictures, fps, threshold)
        found += len(cuts)
    assert found > 3


def test_listed_cuts_of_a_trailer(real_clips: Path) -> None:
    """Where two detectors agree, by the clips' README; they differ at the fades, near the second list."""
    found = find_cuts(iter_frames(real_clips / "sintel_trailer_30s.mp4"), 24)
    agreed, fades = [0, 286, 348, 372, 388, 523, 573, 610], [468, 478, 631, 671]
    assert all(min(abs(cut - listed) for cut in found) <= 2 for listed in agreed)
    assert all(min(abs(cut - listed) for listed in agreed + fades) <= 12 for cut in found)


def test_listed_cut_of_nasa(real_clips: Path) -> None:
    found = find_cuts(iter_frames(real_clips / "nasa_13013.mp4"), 30000 / 1001)
    assert min(abs(cut - 240) for cut in found) <= 2
