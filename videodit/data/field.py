"""Spatiotemporal fields that are no video (weather, simulation, microscopy): arrays (t, h, w, c) of any channels.

Ingest cuts them into clips, KEY.npy in float32 and in their own units; nothing is resized, clipped or scored.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from videodit.data.channel_statistics import ChannelMoments
from videodit.data.clip_cutter import NO_BARS, Clip, CutResult, CutRules, Dropped
from videodit.data.field_arrays import FieldArray, FieldError, open_field, read_npy_header
from videodit.errors import user_error

_HEADER_BYTES = 4096  # numpy's header of a plain array has 128
_STORED = np.dtype("<f4")


def cut_field(
    source: str | bytes,
    spool: Path,
    rules: CutRules,
    fps: Any = 1.0,
    beat: Callable[[], None] = lambda: None,
    array: Any = None,
) -> CutResult:
    """One array into clips, as `cut_source` does for videos: (t, h, w) or (t, h, w, c), any float or int dtype.

    A value that is not finite refuses the whole file: what is left of it is not to be trusted either.

    Args:
        source: the .npy, of which a clip at a time is mapped, its bytes, or the .zarr folder, of which some frames at a
            time are read.
        spool: the file the clips' bytes go to, one after the other.
        rules: how to cut; of them min_frames and max_duration_s.
        fps: frames per second, as the sidecar says it.
        beat: called at every frame.
        array: name of that which is meant in a zarr group, as the sidecar says it.
    Raises:
        UserError: if the spool cannot be written.
    """
    try:
        field, rate = open_field(source, array), _rate(fps)
        longest = rules.max_frames(rate)
        result = CutResult()
        with open(spool, "wb") as file:
            for start in range(0, field.shape[0], longest):
                count = min(longest, field.shape[0] - start)
                if count < rules.min_frames:
                    reason = f"{count} frames, shorter than min_frames {rules.min_frames}"
                    result.dropped.append(Dropped(start, count, rate, reason))
                else:
                    result.clips.append(_write_clip(file, field, start, count, rate, beat))
        return result
    except FieldError as error:
        return CutResult(problem=str(error))
    except OSError as error:
        raise user_error(error, spool) from error


def _rate(fps: Any) -> float:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not (fps > 0 and math.isfinite(fps)):
        raise FieldError(f"fps {fps!r} in its .json: a positive number is needed")
    return float(fps)


def _write_clip(
    file: BinaryIO, field: FieldArray, start: int, count: int, fps: float, beat: Callable[[], None]
) -> Clip:
    """Appends a clip's .npy, frame by frame."""
    offset, digest = file.tell(), hashlib.sha256()
    shape = (count, *field.shape[1:])

    def write(data: bytes) -> None:
        file.write(data)
        digest.update(data)

    header = io.BytesIO()
    described = {"descr": _STORED.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    write(header.getvalue())
    moments: ChannelMoments | None = None
    for number, frame in enumerate(field.frames(start, start + count), start):
        beat()
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            stored = frame.astype(_STORED, order="C")
        if not np.isfinite(stored).all():
            raise FieldError(f"frame {number} has values that are not finite in float32")
        write(stored.tobytes())
        moments = ChannelMoments.of(stored) if moments is None else moments + ChannelMoments.of(stored)
    _, height, width, _ = shape
    size = file.tell() - offset
    return Clip(start, count, height, width, fps, offset, size, digest.hexdigest(), None, NO_BARS, "npy", moments)


def read_window(read: Callable[[int, int], bytes], shape: tuple[int, ...], start: int, stop: int) -> np.ndarray:
    """Frames start to stop (exclusive) of a clip that `cut_field` wrote; nothing but these is read.

    Args:
        read: gives the clip's bytes from an offset on, as many as asked for or fewer at the end.
        shape: (t, h, w, c) that the clip must have.
        start, stop: frames of it.
    Returns:
        (stop - start, h, w, c) float32, not to be written to.
    Raises:
        ValueError: if it is another array.
    """
    array = read_npy_header(io.BytesIO(read(0, _HEADER_BYTES)))
    if array[:3] != (shape, False, _STORED):
        raise ValueError(f"an array of {array.dtype} {array.shape}, the index says {_STORED} {shape}")
    frame_bytes = math.prod(shape[1:]) * _STORED.itemsize
    data = read(array.offset + start * frame_bytes, (stop - start) * frame_bytes)
    return np.frombuffer(data, _STORED).reshape(stop - start, *shape[1:])


def preview(frames: np.ndarray) -> np.ndarray:
    """A clip to look at: up to three channels as red, green and blue, or one as grey, each from its 1st to its 99th
    percentile.

    Args:
        frames: (t, h, w, c); uint8 ones are pictures already.
    Returns:
        (t, h, w, 3) uint8.
    """
    if frames.dtype == np.uint8:
        return frames
    shown = frames[..., :3].astype(np.float32)
    low, high = np.percentile(shown, (1, 99), axis=(0, 1, 2))
    levels = (shown - low) / np.where(high > low, high - low, 1.0)
    pixels = np.rint(255 * levels.clip(0, 1)).astype(np.uint8)
    if pixels.shape[-1] == 1:
        return pixels.repeat(3, axis=-1)
    return np.pad(pixels, [(0, 0)] * 3 + [(0, 3 - pixels.shape[-1])])


def write_npy(path: str | Path, frames: np.ndarray) -> None:
    """Writes an array to a .npy file, which appears only when it is complete.

    Raises:
        OSError: if it cannot be written.
    """
    part = Path(f"{path}.part{os.getpid()}")
    try:
        with open(part, "wb") as file:
            np.save(file, frames, allow_pickle=False)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
