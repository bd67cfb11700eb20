"""Spatiotemporal fields that are no video (weather, simulation, microscopy): arrays (t, h, w, c) of any channels.

Ingest cuts them into clips, KEY.npy in float32 and in their own units; nothing is resized, clipped or scored.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from videodit.data.channel_statistics import ChannelMoments
from videodit.data.clip_cutter import NO_BARS, Clip, CutResult, CutRules, Dropped
from videodit.errors import user_error

_HEADER_BYTES = 4096  # numpy's header of a plain array has 128
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
_STORED = np.dtype("<f4")


class FieldError(Exception):
    """A field that cannot be used; the message is a short reason."""


def cut_field(
    source: str | bytes, spool: Path, rules: CutRules, fps: Any = 1.0, beat: Callable[[], None] = lambda: None
) -> CutResult:
    """One .npy file into clips, as `cut_source` does for videos: (t, h, w) or (t, h, w, c), any float or int dtype.

    A value that is not finite refuses the whole file: what is left of it is not to be trusted either.

    Args:
        source: the file, of which a clip at a time is mapped, or its bytes.
        spool: the file the clips' bytes go to, one after the other.
        rules: how to cut; of them min_frames and max_duration_s.
        fps: frames per second, as the sidecar says it.
        beat: called at every frame.
    Raises:
        UserError: if the spool cannot be written.
    """
    try:
        array, rate = _open(source), _rate(fps)
        longest = rules.max_frames(rate)
        result = CutResult()
        with open(spool, "wb") as file:
            for start in range(0, array.shape[0], longest):
                count = min(longest, array.shape[0] - start)
                if count < rules.min_frames:
                    reason = f"{count} frames, shorter than min_frames {rules.min_frames}"
                    result.dropped.append(Dropped(start, count, rate, reason))
                else:
                    frames = _frames(source, array, start, start + count)
                    result.clips.append(_write_clip(file, frames, start, rate, beat))
        return result
    except FieldError as error:
        return CutResult(problem=str(error))
    except OSError as error:
        raise user_error(error, spool) from error


class _Array(NamedTuple):
    """What the header of a .npy says, and where the values begin."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]
    offset: int


def _read_header(file: BinaryIO) -> _Array:
    """Unlike np.load, it takes arrays of numbers only: no pickle, no zip. ValueError says what else it is."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"format {version}")
    shape, by_columns, dtype = _HEADERS[version](file)
    return _Array(shape, by_columns, dtype, file.tell())


def _open(source: str | bytes) -> _Array:
    """Checks that the file holds all values of a field."""
    try:
        with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
            array = _read_header(file)
            size = file.seek(0, os.SEEK_END) - array.offset
    except OSError as error:
        raise FieldError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise FieldError(f"cannot be read as an array: {str(error).splitlines()[0]}") from error
    if array.dtype.kind not in "fiu":
        raise FieldError(f"values of dtype {array.dtype}: floats or integers are needed")
    if len(array.shape) not in (3, 4) or 0 in array.shape:
        raise FieldError(f"shape {array.shape}: (t, h, w) or (t, h, w, c) is needed")
    if size < math.prod(array.shape) * array.dtype.itemsize:
        raise FieldError(f"cut short: {size} bytes of values for {array.dtype} {array.shape}")
    return array


def _frames(source: str | bytes, array: _Array, start: int, stop: int) -> np.ndarray:
    """Frames start to stop, (t, h, w, c): no more is mapped, for address space is limited and fields may be larger."""
    shape, by_columns, dtype, offset = array
    if not by_columns:
        offset += start * math.prod(shape[1:]) * dtype.itemsize
        shape, start, stop = (stop - start, *shape[1:]), 0, stop - start
    order: Literal["F", "C"] = "F" if by_columns else "C"
    try:
        if isinstance(source, bytes):
            whole = np.ndarray(shape, dtype, source, offset, order=order)
        else:
            whole = np.memmap(source, dtype, "r", offset, shape, order)
    except OSError as error:
        by = ", by columns: save numpy.ascontiguousarray of it" if by_columns else ""
        raise FieldError(f"cannot be mapped ({error.strerror}){by}") from error
    frames = whole[start:stop]
    return frames if frames.ndim == 4 else frames[..., None]


def _rate(fps: Any) -> float:
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not (fps > 0 and math.isfinite(fps)):
        raise FieldError(f"fps {fps!r} in its .json: a positive number is needed")
    return float(fps)


def _write_clip(file: BinaryIO, frames: np.ndarray, start: int, fps: float, beat: Callable[[], None]) -> Clip:
    """Appends a clip's .npy, frame by frame."""
    offset, digest = file.tell(), hashlib.sha256()

    def write(data: bytes) -> None:
        file.write(data)
        digest.update(data)

    header = io.BytesIO()
    described = {"descr": _STORED.str, "fortran_order": False, "shape": frames.shape}
    np.lib.format.write_array_header_1_0(header, described)
    write(header.getvalue())
    moments: ChannelMoments | None = None
    for number, frame in enumerate(frames, start):
        beat()
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is refused as such
            stored = frame.astype(_STORED, order="C")
        if not np.isfinite(stored).all():
            raise FieldError(f"frame {number} has values that are not finite in float32")
        write(stored.tobytes())
        moments = ChannelMoments.of(stored) if moments is None else moments + ChannelMoments.of(stored)
    count, height, width, _ = frames.shape
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
    array = _read_header(io.BytesIO(read(0, _HEADER_BYTES)))
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
