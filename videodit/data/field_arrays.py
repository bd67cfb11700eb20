"""The arrays that fields are ingested from: .npy files and zarr arrays, read by ranges of frames."""

import hashlib
import importlib.util
import io
import math
import os
from collections.abc import Iterator
from typing import Any, BinaryIO, Literal, NamedTuple, Protocol

import numpy as np

from videodit.data.storage import FileState, files_below, reason
from videodit.errors import MissingExtra

ZARR = ".zarr"
"""How the name of a folder ends that is a zarr array, or a group with one."""
_BLOCK_BYTES = 256 << 20  # of a zarr array at a time
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


class FieldError(Exception):
    """A field that cannot be used; the message is a short reason."""


class FieldArray(Protocol):
    """An array with all its values, of floats or integers."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(t, h, w, c), none of them 0."""

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Frames start to stop, (h, w, c) each, in the array's own dtype; no more is in memory than a few of them.

        Raises:
            FieldError: if they cannot be read.
        """


def open_field(source: str | bytes, name: Any = None) -> FieldArray:
    """Opens a field.

    Args:
        source: the file or, of zarr, the folder; or a .npy's bytes.
        name: of the array in a zarr group; None where only one has three or four axes.
    Raises:
        FieldError: if it is no array (t, h, w) or (t, h, w, c) of numbers.
    """
    if isinstance(source, str) and source.endswith(ZARR):
        return _ZarrArray(source, name)
    return _NpyArray(source)


def _whole_shape(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    if dtype.kind not in "fiu":
        raise FieldError(f"values of dtype {dtype}: floats or integers are needed")
    if len(shape) not in (3, 4) or 0 in shape:
        raise FieldError(f"shape {shape}: (t, h, w) or (t, h, w, c) is needed")
    t, h, w, *c = shape
    return t, h, w, *(c or [1])  # type: ignore[return-value]


class NpyHeader(NamedTuple):
    """What the header of a .npy says, and where the values begin."""

    shape: tuple[int, ...]
    by_columns: bool
    dtype: np.dtype[Any]
    offset: int


def read_npy_header(file: BinaryIO) -> NpyHeader:
    """Unlike np.load, it takes arrays of numbers only: no pickle, no zip. ValueError says what else it is."""
    version = np.lib.format.read_magic(file)
    if version not in _HEADERS:
        raise ValueError(f"format {version}")
    shape, by_columns, dtype = _HEADERS[version](file)
    return NpyHeader(shape, by_columns, dtype, file.tell())


class _NpyArray:
    """A .npy file, or its bytes."""

    def __init__(self, source: str | bytes) -> None:
        self._source = source
        try:
            with io.BytesIO(source) if isinstance(source, bytes) else open(source, "rb") as file:
                self._header = header = read_npy_header(file)
                size = file.seek(0, os.SEEK_END) - header.offset
        except OSError as error:
            raise FieldError(f"cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise FieldError(f"cannot be read as an array: {str(error).splitlines()[0]}") from error
        self.shape = _whole_shape(header.dtype, header.shape)
        if size < math.prod(header.shape) * header.dtype.itemsize:
            raise FieldError(f"cut short: {size} bytes of values for {header.dtype} {header.shape}")

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """No more than these is mapped, for address space is limited and fields may be larger."""
        shape, by_columns, dtype, offset = self._header
        if not by_columns:
            offset += start * math.prod(shape[1:]) * dtype.itemsize
            shape, start, stop = (stop - start, *shape[1:]), 0, stop - start
        order: Literal["F", "C"] = "F" if by_columns else "C"
        try:
            if isinstance(self._source, bytes):
                whole = np.ndarray(shape, dtype, self._source, offset, order=order)
            else:
                whole = np.memmap(self._source, dtype, "r", offset, shape, order)
        except OSError as error:
            by = ", by columns: save numpy.ascontiguousarray of it" if by_columns else ""
            raise FieldError(f"cannot be mapped ({error.strerror}){by}") from error
        frames = whole[start:stop]
        yield from frames if frames.ndim == 4 else frames[..., None]


class _ZarrArray:
    """A folder that holds a zarr array, or a group of them; format 2 or 3."""

    def __init__(self, folder: str, name: Any) -> None:
        import zarr  # takes a second

        try:
            node = zarr.open(folder, mode="r")
            array = _member(node, name) if isinstance(node, zarr.Group) else node
            dtype, shape, chunks = np.dtype(array.dtype), tuple(array.shape), tuple(array.chunks)
        except FieldError:
            raise
        except Exception as error:  # of the file, its metadata and every codec
            raise FieldError(f"cannot be read as a zarr array: {reason(error)}") from error
        self.shape = _whole_shape(dtype, shape)
        self._array = array
        fitting = max(1, _BLOCK_BYTES // (math.prod(shape[1:]) * dtype.itemsize))
        # Whole chunks where they fit: of a part of one all is decoded.
        self._step = max(fitting // chunks[0] * chunks[0], min(fitting, chunks[0]))

    def frames(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """A block of frames is decoded at a time; a chunk that was never written reads as the fill value."""
        while start < stop:
            end = min(stop, start + self._step - start % self._step)
            try:
                block = np.asarray(self._array[start:end])
            except Exception as error:  # every codec has errors of its own
                raise FieldError(f"frames {start} to {end - 1} cannot be read: {reason(error)}") from error
            yield from block if block.ndim == 4 else block[..., None]
            start = end


def _member(group: Any, name: Any) -> Any:
    """The array of a group that is meant."""
    found = {key: array for key, array in group.arrays() if len(array.shape) in (3, 4)}
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if isinstance(name, str) and name in found:
        return found[name]
    several = ", ".join(sorted(found)) or "none with three or four axes"
    asked = "" if name is None else f", not {name}"
    raise FieldError(f'a group of arrays ({several}){asked}: say which in its .json, for example {{"array": "u"}}')


def require_zarr() -> None:
    """Raises MissingExtra if zarr is not installed."""
    if importlib.util.find_spec("zarr") is None:
        raise MissingExtra("zarr", "zarr")


def folder_state(folder: str) -> FileState:
    """What tells that any file below a folder, here or elsewhere, has changed, without reading them.

    Raises:
        OSError, UserError: if it cannot be listed.
    """
    files, digest = files_below(folder), hashlib.sha256()
    for name, (size, version) in sorted(files.items()):
        digest.update(f"{name} {size} {version}\n".encode())
    return FileState(sum(size for size, _ in files.values()), digest.hexdigest())
