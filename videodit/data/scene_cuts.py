"""Where one shot ends and the next begins: PySceneDetect's adaptive detector on frames that are decoded anyway."""

from collections.abc import Iterable
from fractions import Fraction

import av
import numpy as np
from scenedetect import FrameTimecode  # type: ignore[import-untyped]
from scenedetect.detectors import AdaptiveDetector  # type: ignore[import-untyped]

from videodit.data.yuv_planes import small_bgr

_MIN_SCENE_S = 0.5  # two cuts closer than this are a flash, not a shot


class CutDetector:
    """Finds cuts in a stream of frames. A cut is certain `lookahead` frames after it.

    Args:
        fps: frames per second.
        threshold: how many times a frame's change must exceed its neighbours' mean change.
    """

    lookahead = 2

    def __init__(self, fps: float, threshold: float = 3.0) -> None:
        self._fps = Fraction(fps).limit_denominator(1001)
        min_frames = max(2, round(_MIN_SCENE_S * fps))
        self._detector = AdaptiveDetector(
            adaptive_threshold=threshold, min_scene_len=min_frames, window_width=self.lookahead
        )
        self._number = 0

    def push(self, frame: np.ndarray | av.VideoFrame) -> list[int]:
        """Takes the next frame.

        Args:
            frame: as shards hold it, or (h, w, 3) uint8 RGB.
        Returns:
            Numbers of the frames, counted from 0, which are now known to start a scene; empty most of the time.
        """
        return self.push_bgr(small_bgr(frame))

    def push_bgr(self, picture: np.ndarray) -> list[int]:
        """As `push`, of a picture that is looked at as it is, (h, w, 3) uint8 BGR."""
        timecode = FrameTimecode(self._number, self._fps)
        self._number += 1
        return [cut.frame_num for cut in self._detector.process_frame(timecode, picture)]


def find_cuts(frames: Iterable[np.ndarray | av.VideoFrame], fps: float, threshold: float = 3.0) -> list[int]:
    """Finds the scenes of a video.

    Args:
        frames: (h, w, 3) uint8 RGB each, as an array (t, h, w, 3) or any iterable, or as shards hold them; read once
            and not kept.
        fps: frames per second.
        threshold: how many times a frame's change must exceed its neighbours' mean change.
    Returns:
        The first frame of each scene, ascending; [0] if there is no cut, [] if there are no frames.
    """
    detector = CutDetector(fps, threshold)
    starts: list[int] = []
    for number, frame in enumerate(frames):
        starts += [0] if number == 0 else []
        starts += detector.push(frame)
    return starts
