"""From decoded frames to the bucket's shape: temporal window, resize to cover, crop; and the model's range.

Random choices are drawn in a fixed order (start, top, left), so that the loader, which decodes only the window, and
`fit_clip` on the whole clip give the same result from the same generator.
"""

from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

from videodit.data.buckets import Bucket


@dataclass(frozen=True)
class ClipCut:
    """What was done to a clip to make it fit a bucket."""

    original_height: int
    """pixels before the resize"""
    original_width: int
    """pixels before the resize"""
    crop_top: int
    """pixels after the resize, above the crop"""
    crop_left: int
    """pixels after the resize, left of the crop"""
    first_frame: int
    """of the clip"""
    stride: int
    """every how many frames were taken"""


def frame_stride(clip_fps: float, target_fps: float | None) -> int:
    """Every how many frames to take, so that the rate is nearest to the target.

    Args:
        clip_fps: frames per second of the clip; 0 if unknown.
        target_fps: frames per second wanted; None keeps every frame.
    Returns:
        An integer of at least 1: frames are skipped, never invented.
    """
    if target_fps is None or clip_fps <= 0:
        return 1
    below = max(1, int(clip_fps / target_fps))
    # Of two neighbouring strides, the one whose rate is nearer to the target.
    return min((below, below + 1), key=lambda stride: abs(clip_fps / stride - target_fps))


def frames_after_stride(num_frames: int, stride: int) -> int:
    """Frames that are left when every stride-th is taken."""
    return (num_frames - 1) // stride + 1 if num_frames > 0 else 0


def temporal_window(num_frames: int, wanted: int, stride: int, rng: np.random.Generator | None) -> tuple[int, int]:
    """Where in the clip to read `wanted` frames, `stride` apart.

    Args:
        num_frames: frames of the clip.
        wanted: frames of the bucket.
        stride: as from `frame_stride`.
        rng: draws the start; None takes the middle.
    Returns:
        (start, stop) in frames of the clip; frames[start:stop:stride] has `wanted` frames.
    Raises:
        ValueError: if the clip is too short.
    """
    span = (wanted - 1) * stride + 1
    slack = num_frames - span
    if slack < 0:
        raise ValueError(f"a clip of {num_frames} frames is too short for {wanted} frames at stride {stride}")
    start = slack // 2 if rng is None else int(rng.integers(slack + 1))
    return start, start + span


def resize_and_crop(frames: np.ndarray, height: int, width: int, rng: np.random.Generator | None) -> np.ndarray:
    """Resizes frames to cover height x width (antialiased bilinear) and crops what stands out.

    Args:
        frames: (t, h, w, c) uint8.
        height, width: pixels wanted.
        rng: draws the crop's top and left; None takes the centre.
    Returns:
        (t, height, width, c) uint8; `frames` itself where nothing has to change.
    """
    return crop(resize_to_cover(frames, height, width), height, width, rng)[0]


def resize_to_cover(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """(t, h, w, c) uint8 -> the same, at least height x width, one of the two exact; `frames` itself where it fits."""
    h, w = frames.shape[1:3]
    if (h, w) != (height, width):
        scale = max(height / h, width / w)
        h, w = max(height, round(h * scale)), max(width, round(w * scale))
        if (h, w) != frames.shape[1:3]:
            # A view with the channels last in memory: torch has a fast uint8 path for it.
            pixels = rearrange(torch.from_numpy(np.ascontiguousarray(frames)), "t h w c -> t c h w")
            resized = F.interpolate(pixels, size=(h, w), mode="bilinear", antialias=True)
            frames = rearrange(resized, "t c h w -> t h w c").numpy()
    return frames


def crop(
    frames: np.ndarray, height: int, width: int, rng: np.random.Generator | None
) -> tuple[np.ndarray, tuple[int, int]]:
    """Cuts height x width out of frames.

    Args:
        frames: (t, h, w, c).
        height, width: pixels wanted.
        rng: draws top and left; None takes the centre.
    Returns:
        (t, height, width, c), a view, and its top and left in `frames`.
    Raises:
        ValueError: if frames are smaller.
    """
    h, w = frames.shape[1:3]
    if h < height or w < width:
        raise ValueError(f"frames of {h}x{w} are smaller than the bucket's {height}x{width}")
    top = (h - height) // 2 if rng is None else int(rng.integers(h - height + 1))
    left = (w - width) // 2 if rng is None else int(rng.integers(w - width + 1))
    return frames[:, top : top + height, left : left + width], (top, left)


def fit_clip(frames: np.ndarray, bucket: Bucket, rng: np.random.Generator | None, stride: int = 1) -> np.ndarray:
    """Cuts a clip to a bucket's shape.

    Args:
        frames: (t, h, w, c) uint8.
        bucket: the shape wanted.
        rng: draws start and crop; None takes the middle of each.
        stride: every how many frames to take.
    Returns:
        (bucket.frames, bucket.height, bucket.width, c) uint8.
    Raises:
        ValueError: if the clip is too short.
    """
    start, stop = temporal_window(len(frames), bucket.frames, stride, rng)
    return resize_and_crop(frames[start:stop:stride], bucket.height, bucket.width, rng)


def to_model_range(clips: Tensor) -> Tensor:
    """The one conversion from pixels to what models see.

    Args:
        clips: (b, t, h, w, c) uint8, or float32 of fields that were standardised.
    Returns:
        (b, c, t, h, w) float32 in [-1, 1], or about it, contiguous.
    """
    clips = rearrange(clips, "b t h w c -> b c t h w")
    if clips.is_floating_point():
        return clips.contiguous()
    out = torch.empty(clips.shape, dtype=torch.float32, device=clips.device)
    for row, clip in zip(out, clips, strict=True):  # clip by clip, so that the three passes stay in the CPU's cache
        row.copy_(clip).div_(127.5).sub_(1)
    return out


def to_pixels(clips: Tensor) -> Tensor:
    """The way back: rounds and clamps.

    Args:
        clips: (b, c, t, h, w) float, [-1, 1] and what lies beyond it.
    Returns:
        (b, t, h, w, c) uint8 on the same device, contiguous.
    """
    pixels = clips.float().add(1).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return rearrange(pixels, "b c t h w -> b t h w c").contiguous()
