"""Buckets: the few clip shapes that training sees, and which clip goes to which."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

FRAMES_PER_LATENT = 4
"""Frames of a clip are 4k+1: the causal VAE takes the first frame alone and then four at a time."""


class Bucket(NamedTuple):
    """A clip shape: frames, height and width in pixels."""

    frames: int
    height: int
    width: int

    @property
    def name(self) -> str:
        """The shape as written in configs: "17x64x64"."""
        return f"{self.frames}x{self.height}x{self.width}"

    @property
    def latent_frames(self) -> int:
        """Of 4k+1 frames, k+1."""
        return (self.frames - 1) // FRAMES_PER_LATENT + 1


def is_image(name: str) -> bool:
    """Whether clips of the bucket of this name have one frame."""
    return name.startswith("1x")


def nearest_frames(frames: int) -> int:
    """The number of the form 4k+1 nearest to `frames` (the smaller of two equally near), at least 1."""
    below = max(0, (frames - 1) // FRAMES_PER_LATENT) * FRAMES_PER_LATENT + 1
    above = below + FRAMES_PER_LATENT
    return below if frames - below <= above - frames else above


def nearest_size(size: int, multiple: int) -> int:
    """The multiple of `multiple` nearest to `size` (the smaller of two equally near), at least `multiple`."""
    below = max(1, size // multiple) * multiple
    above = below + multiple
    return below if size - below <= above - size else above


def parse_bucket(text: str, multiple: int = 16) -> Bucket:
    """Reads a bucket from "FRAMESxHEIGHTxWIDTH".

    Args:
        text: for example "17x64x64".
        multiple: what height and width must be divisible by: the VAE's spatial factor times the patch size.
    Returns:
        The bucket.
    Raises:
        ValueError: if the text has another form, frames are not 4k+1, or a size is not divisible; the message has the
            nearest bucket that fits.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.strip().isascii() and part.strip().isdigit() for part in parts):
        raise ValueError(f"bucket {text!r} must be FRAMESxHEIGHTxWIDTH, for example 17x64x64")
    bucket = Bucket(*(int(part) for part in parts))
    nearest = Bucket(
        nearest_frames(bucket.frames), nearest_size(bucket.height, multiple), nearest_size(bucket.width, multiple)
    )
    if bucket.frames != nearest.frames:
        raise ValueError(
            f"bucket {text!r} has {bucket.frames} frames, which is not 4k+1: the nearest that fits is {nearest.name}"
        )
    if not bucket.height or not bucket.width:
        raise ValueError(f"bucket {text!r} has no height or no width: the nearest that fits is {nearest.name}")
    if bucket != nearest:
        raise ValueError(
            f"bucket {text!r} has a height or width that {multiple} does not divide: "
            f"the nearest that fits is {nearest.name}"
        )
    return bucket


def assign(
    num_frames: int, height: int, width: int, buckets: Iterable[Bucket], *, enlarge: bool = True
) -> Bucket | None:
    """The bucket of a clip: of those not longer than it, the nearest in aspect ratio.

    Of equally near ones the longest; then one that does not enlarge the clip; then the largest.

    Args:
        num_frames: frames of the clip (after any change of frame rate); 1 for a still image.
        height, width: pixels of the clip.
        buckets: candidates.
        enlarge: whether a clip may go to a bucket of more pixels along a side.
    Returns:
        The bucket, or None if the clip is shorter than all of them (or smaller, if it may not be enlarged).
    """

    def badness(bucket: Bucket) -> tuple[float, int, bool, int]:
        stretch = abs(math.log((bucket.width * height) / (bucket.height * width)))
        enlarges = bucket.height > height or bucket.width > width
        return round(stretch, 6), -bucket.frames, enlarges, -bucket.height * bucket.width

    fitting = [bucket for bucket in buckets if bucket.frames <= num_frames]
    if not enlarge:
        fitting = [bucket for bucket in fitting if bucket.height <= height and bucket.width <= width]
    return min(fitting, key=badness, default=None)


@dataclass
class Grouping:
    """Which clips go to which bucket."""

    members: dict[Bucket, list[int]] = field(default_factory=dict)
    """Clip indices by bucket, in data set order; buckets without clips are listed too."""
    dropped: list[int] = field(default_factory=list)
    """Clips that fit no bucket."""


def group(sizes: Sequence[tuple[int, int, int]], buckets: Sequence[Bucket], *, enlarge: bool = True) -> Grouping:
    """Assigns every clip to its bucket.

    Args:
        sizes: (num_frames, height, width) by clip index.
        buckets: candidates.
        enlarge: as in `assign`.
    """
    grouping = Grouping(members={bucket: [] for bucket in buckets})
    found = {size: assign(*size, buckets, enlarge=enlarge) for size in set(sizes)}  # of a million clips many are alike
    for index, size in enumerate(sizes):
        bucket = found[size]
        if bucket is None:
            grouping.dropped.append(index)
        else:
            grouping.members[bucket].append(index)
    return grouping
