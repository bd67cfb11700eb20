"""Video files to arrays of frames: probe, decode, sample. PyAV does the work, this file fixes the choices.

Frames are (t, h, w, 3) uint8 RGB, full range, turned the way a player shows them.
"""

import io
import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from videodit.data.frame_convert import ToRGB, ToShardFormat, display_matrix, is_transposed
from videodit.data.yuv_planes import Planes

KEYFRAME_EVERY = 16
_SLOWEST, _FASTEST = 0.01, 1000.0  # frames per second that a header is believed
MAX_PIXELS = 1 << 26  # of one frame, twice 8K: beyond it, a damaged header is likelier than a picture
# FFmpeg tells formats by content, and some of those it knows are lists of other files to read: none of these is.
_FORMATS = (
    "mov mp4 matroska webm avi mpeg mpegts mpegvideo m4v h263 h264 hevc vvc av1 obu ivf vc1 asf flv live_flv ogg mxf "
    "gif yuv4mpegpipe nut dv rm mjpeg dirac wtv wav mp3 jpeg_pipe png_pipe webp_pipe bmp_pipe tiff_pipe"
)
_OPTIONS = {"format_whitelist": _FORMATS.replace(" ", ","), "protocol_whitelist": "file"}


class VideoError(Exception):
    """A video that cannot be decoded or encoded; the message is a short reason."""


@dataclass(frozen=True)
class VideoInfo:
    """What a video is, as displayed."""

    path: str
    """The file, as given ("<bytes>" for bytes)."""
    num_frames: int
    """Frames by the container's account, else duration times frame rate, 0 if unknown: only decoding tells."""
    fps: float
    """Average frames per second."""
    height: int
    """Pixels, after rotation."""
    width: int
    """Pixels, after rotation."""
    duration_s: float
    """Seconds, 0 if unknown."""
    rotation: int
    """Degrees counterclockwise by which the coded picture is turned for display."""
    codec: str
    """Name of the codec, as in "h264"."""
    pix_fmt: str
    """Pixel format as coded, as in "yuv420p10le"."""
    pixel_aspect: float = 1.0
    """Width of a pixel over its height, after rotation; frames are not stretched by it."""


@contextmanager
def open_decoded(source: str | Path | bytes) -> Iterator[tuple[VideoInfo, Iterator[av.VideoFrame]]]:
    """Opens a video for one pass, in constant memory: `with open_decoded(path) as (info, frames)`.

    The best video stream is read; frames are taken as they come, also at a variable frame rate.

    Args:
        source: a file, or a file's bytes.
    Yields:
        What the file is, and its frames as they are coded: not converted, not turned.
    Raises:
        VideoError: if it does not open, has no video stream or its first frame does not decode; the iterator: at the
            frame where decoding fails.
    """
    with _open(source) as (container, stream):
        decoder = _decode(container, stream)
        first = next(decoder, None)
        if first is None:
            raise VideoError("no frames")
        info = _describe("<bytes>" if isinstance(source, bytes) else str(source), container, stream, first)
        yield info, itertools.chain([first], decoder)


def probe(path: str | Path | bytes) -> VideoInfo:
    """Reads what a video says of itself and decodes its first frame.

    Args:
        path: a file, or a file's bytes.
    Raises:
        VideoError: if it does not open, has no video stream or its first frame does not decode.
    """
    with open_decoded(path) as (info, _):
        return info


def iter_frames(path: str | Path | bytes) -> Iterator[np.ndarray]:
    """Decodes a video frame by frame, in constant memory.

    Args:
        path: a file, or a file's bytes.
    Yields:
        (h, w, 3) uint8 RGB, rotation applied, all of the first one's size.
    Raises:
        VideoError: at the frame where decoding fails.
    """
    with open_decoded(path) as (_, frames):
        yield from map(ToRGB(), frames)


def read_frames(source: str | Path | bytes, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Decodes frames start to stop (exclusive) of a video.

    Where the frame rate is constant, as in every clip of a shard, decoding begins at the keyframe before `start`, else
    at the beginning.

    Args:
        source: a file, or a file's bytes.
        start: first frame, counted from 0.
        stop: frame after the last one; None reads to the end.
    Returns:
        (t, h, w, 3) uint8 RGB, rotation applied.
    Raises:
        VideoError: if it does not decode, or ends before `start` or `stop`.
        ValueError: if the range is negative or empty.
    """
    return np.stack(list(map(ToRGB(), _frames(source, start, stop))))


def read_yuv(
    source: str | Path | bytes,
    start: int = 0,
    stop: int | None = None,
    stride: int = 1,
    out: np.ndarray | None = None,
) -> np.ndarray:
    """As `read_frames`, in the 4:2:0 of shards: what is stored so is not converted.

    Args:
        source, start, stop: as in `read_frames`.
        stride: every how many frames to give.
        out: filled and given back, if frames have its shape; not written to otherwise.
    Returns:
        (t, 3h/2, w) uint8, packed as in `yuv`; an odd last row or column is cut off.
    Raises:
        VideoError, ValueError: as `read_frames`.
    """
    from videodit.data import yuv  # torch, which would be most of the start of ingest's processes

    frames = itertools.islice(_frames(source, start, stop), 0, None, stride)
    planes: Iterator[Planes] = map(ToShardFormat().planes, frames)
    if stop is None:
        whole = list(planes)
        planes, count = iter(whole), len(whole)
    else:
        count = len(range(start, stop, stride))
    # Each frame is copied as it comes: it is in the CPU's cache then, and the decoder needs few buffers.
    first = next(planes)
    shape = yuv.packed_shape(count, *first[0].shape)
    packed = out if out is not None and out.shape == shape else np.empty(shape, np.uint8)
    luma, chroma = yuv.split(packed)
    for number, (y, u, v) in enumerate(itertools.chain([first], planes)):
        luma[number], chroma[number, 0], chroma[number, 1] = y, u, v
    return packed


def _frames(source: str | Path | bytes, start: int, stop: int | None) -> Iterator[av.VideoFrame]:
    """Frames start to stop, as they are coded."""
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"frames {start} to {stop} are no range: 0 <= start < stop")
    count = 0
    with _open_at(source, start) as (first, decoder):
        for frame in itertools.islice(decoder, start - first, None if stop is None else stop - first):
            count += 1
            yield frame
    if not count:
        raise VideoError(f"ends before frame {start}" if start else "no frames")
    if stop is not None and count < stop - start:
        raise VideoError(f"ends after {start + count} frames, {stop} were asked for")


@contextmanager
def _open_at(source: str | Path | bytes, start: int) -> Iterator[tuple[int, Iterator[av.VideoFrame]]]:
    """A decoder whose next frame is `start` or one before it: its number, and the decoder."""
    with _open(source) as (container, stream):
        found = _seek(container, stream, start)
        if found is not None:
            yield found
            return
    with _open(source) as (container, stream):  # the seek led nowhere certain
        yield 0, _decode(container, stream)


def sample_frames(source: str | Path | bytes, count: int) -> list[np.ndarray]:
    """Frames from moments spread over a video, by seeking to keyframes.

    Args:
        source: a file, or a file's bytes.
        count: how many at most.
    Returns:
        (h, w, 3) uint8 RGB each, rotation applied, all of one size; fewer where seeking does not work, at least the
        first.
    Raises:
        VideoError: if it does not open or its first frame does not decode.
    """
    return list(map(ToRGB(), iter_samples(source, count)))


def iter_samples(source: str | Path | bytes, count: int) -> Iterator[av.VideoFrame]:
    """The frames of `sample_frames` one by one, as they are coded; moments after one keyframe give the same object.

    Raises:
        VideoError: if it does not open or its first frame does not decode.
    """
    with _open(source) as (container, stream):
        packet, packets = _next_packet(container, stream)
        frame = first = next(_decode_packets(packets), None)
        if first is None:
            raise VideoError("no frames")
        yield first
        length, origin = stream.duration or 0, stream.start_time or 0
        for number in range(1, count) if length > 0 else ():
            try:
                container.seek(origin + length * number // count, stream=stream)
                before = packet
                packet, packets = _next_packet(container, stream)
                if packet != before:
                    frame = next(_decode_packets(packets), None)
            except (av.FFmpegError, OSError, VideoError):
                break
            if frame is not None and (frame.height, frame.width) == (first.height, first.width):
                yield frame


@contextmanager
def _open(source: str | Path | bytes) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        # An absolute path: FFmpeg takes what comes before a colon for a protocol.
        file = io.BytesIO(source) if isinstance(source, bytes) else os.path.abspath(source)
        container: Any = av.open(file, metadata_errors="replace", options=dict(_OPTIONS))
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"cannot be opened: {reason(error)}") from error
    with container:  # PyAV leaks containers that are left to the garbage collector
        stream = container.streams.best("video")
        if stream is None:
            raise VideoError("no video stream")
        if stream.codec_context is None:
            raise VideoError("no decoder for its video stream")
        if stream.width * stream.height > MAX_PIXELS:
            raise VideoError(f"frames of {stream.width}x{stream.height} are too large")
        # Files are spread over processes, one a core; threads beside them only get in the way, and in forked workers
        # they hang.
        stream.thread_type = "NONE"
        stream.codec_context.thread_count = 1
        yield container, stream


def _next_packet(container: av.container.InputContainer, stream: av.VideoStream) -> tuple[Any, Iterator[av.Packet]]:
    """What tells the next packet from others, and the packets from it on."""
    packets = container.demux(stream)
    packet = next(packets)
    return (packet.pts, packet.dts, packet.pos, packet.size), itertools.chain([packet], packets)


def _decode(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    yield from _decode_packets(container.demux(stream))


def _decode_packets(packets: Iterator[av.Packet]) -> Iterator[av.VideoFrame]:
    try:
        for packet in packets:
            yield from packet.decode()  # type: ignore[misc]  # of a video's stream
    except (av.FFmpegError, OSError, ValueError) as error:
        raise VideoError(f"does not decode: {reason(error)}") from error


def _describe(
    path: str, container: av.container.InputContainer, stream: av.VideoStream, frame: av.VideoFrame
) -> VideoInfo:
    rate = stream.average_rate or stream.guessed_rate
    if not rate or not _SLOWEST <= rate <= _FASTEST:
        raise VideoError(f"a frame rate of {float(rate):g}" if rate else "no frame rate")
    if stream.duration and stream.time_base:
        duration_s = float(stream.duration * stream.time_base)
    else:
        duration_s = (container.duration or 0) / av.time_base
    transposed = is_transposed(display_matrix(frame))
    aspect = float(stream.sample_aspect_ratio or 1)
    return VideoInfo(
        path=path,
        num_frames=stream.frames or round(duration_s * rate),
        fps=float(rate),
        height=frame.width if transposed else frame.height,
        width=frame.height if transposed else frame.width,
        duration_s=duration_s,
        rotation=frame.rotation,
        codec=stream.codec_context.codec.canonical_name,
        pix_fmt=frame.format.name,
        pixel_aspect=1 / aspect if transposed else aspect,
    )


def _seek(
    container: av.container.InputContainer, stream: av.VideoStream, start: int
) -> tuple[int, Iterator[av.VideoFrame]] | None:
    """Goes to the keyframe before `start`: (its number, decoder), None if timestamps do not say which it is."""
    rate, time_base = stream.average_rate, stream.time_base
    decoder = _decode(container, stream)
    if start < KEYFRAME_EVERY or not rate or not time_base:
        return 0, decoder
    ticks = float(1 / (rate * time_base))  # of a frame
    if stream.guessed_rate != rate or abs((stream.duration or 0) / ticks - stream.frames) > 0.5:
        return 0, decoder  # the frame rate varies, or the container does not tell
    origin = stream.start_time or 0
    container.seek(origin + round(start * ticks), stream=stream)
    frame = next(decoder, None)
    if frame is None or frame.pts is None:
        return None
    number = (frame.pts - origin) / ticks
    if abs(number - round(number)) > 0.05 or not 0 <= number <= start + 0.5:
        return None
    return round(number), itertools.chain([frame], decoder)


def reason(error: BaseException) -> str:
    """FFmpeg's own words for what went wrong."""
    return str(getattr(error, "strerror", None) or error)
