"""Writing clips: H.264, 8-bit 4:2:0, BT.709 limited range, a keyframe at least every 16 frames, the same bytes for the
same frames: what training reads fast.
"""

import io
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from videodit.data.frame_convert import ToYUV
from videodit.data.video_io import KEYFRAME_EVERY, VideoError, reason


class Mp4Encoder:
    """Encodes frames one by one into an H.264 .mp4 in memory: the same frames give the same bytes.

    Args:
        height: of the frames, in pixels; an odd last row is cut off, as 4:2:0 needs even sizes.
        width: likewise.
        fps: frames per second.
        crf: x264's constant rate factor: 0 is lossless up to colour conversion, 18 looks the same, 51 is worst.
    Raises:
        ValueError: if the size is below 2 pixels or fps is not positive.
        VideoError: if x264 refuses them.
    """

    def __init__(self, height: int, width: int, fps: float, *, crf: int = 18) -> None:
        if min(height, width) < 2:
            raise ValueError(f"frames of {height}x{width}: at least 2x2 is needed")
        if not (fps > 0 and math.isfinite(fps)):
            raise ValueError(f"fps is {fps}: a positive number is needed")
        self.height, self.width, self.num_frames = height - height % 2, width - width % 2, 0
        self._rate = Fraction(fps).limit_denominator(1001) or Fraction(1, 1001)  # of weather, once a day
        self._buffer = io.BytesIO()
        self._to_yuv = ToYUV()
        # bitexact keeps library versions out of the file
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        # no B-frames: frames are shown in decoding order, so there is no edit list for other readers to trip over
        # no macroblock tree: x264's reads memory that it never wrote, and the bytes then vary from call to call
        options = {"preset": "veryfast", "crf": str(crf), "bf": "0", "g": str(KEYFRAME_EVERY), "mbtree": "0"}
        stream: Any = self._container.add_stream("libx264", rate=self._rate, options=options)
        stream.width, stream.height, stream.pix_fmt = self.width, self.height, "yuv420p"
        context = stream.codec_context
        context.thread_count, context.thread_type = 1, "NONE"  # x264 with more threads gives other bytes
        context.color_range, context.colorspace = ColorRange.MPEG, Colorspace.ITU709
        context.color_primaries, context.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        self._stream = stream

    def write(self, image: np.ndarray) -> None:
        """Adds one frame, (h, w, 3) uint8 RGB."""
        self.write_yuv(self._to_yuv(image[: self.height, : self.width]))

    def write_yuv(self, frame: av.VideoFrame) -> None:
        """Adds one frame that is of this size and as shards hold it, see `ToShardFormat`."""
        frame.pts, frame.time_base = self.num_frames, 1 / self._rate
        self.num_frames += 1
        self._mux(frame)

    def finish(self) -> bytes:
        """Ends the file and returns its bytes."""
        self._mux(None)
        self._container.close()
        return self._buffer.getvalue()

    def close(self) -> None:
        """Gives the encoder up without a result."""
        self._container.close()

    def _mux(self, frame: av.VideoFrame | None) -> None:
        try:
            self._container.mux(self._stream.encode(frame))
        except av.FFmpegError as error:
            raise VideoError(f"cannot encode {self.width}x{self.height}: {reason(error)}") from error


def encode_mp4(frames: np.ndarray, fps: float, *, crf: int = 18) -> bytes:
    """Encodes frames as an H.264 .mp4: the same frames give the same bytes.

    Args:
        frames: (t, h, w, 3) uint8 RGB; an odd last row or column is cut off, as 4:2:0 needs even sizes.
        fps: frames per second.
        crf: x264's constant rate factor: 0 is lossless up to colour conversion, 18 looks the same, 51 is worst.
    Returns:
        The file's bytes.
    Raises:
        ValueError: if frames are not (t, h, w, 3) uint8 with t >= 1 and h, w >= 2, or fps is not positive.
        VideoError: if x264 refuses them.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: (t, h, w, 3) uint8 with t >= 1 is needed")
    encoder = Mp4Encoder(frames.shape[1], frames.shape[2], fps, crf=crf)
    try:
        for image in frames:
            encoder.write(image)
        return encoder.finish()
    finally:
        encoder.close()


def write_mp4(path: str | Path, frames: np.ndarray, fps: float, *, crf: int = 18) -> None:
    """Writes frames to an .mp4 file; the file appears only when it is complete.

    Args:
        path: the file; its folder must exist.
        frames: (t, h, w, 3) uint8 RGB.
        fps: frames per second.
        crf: x264's constant rate factor.
    Raises:
        OSError: if it cannot be written.
    """
    data = encode_mp4(frames, fps, crf=crf)
    part = Path(f"{path}.part{os.getpid()}")
    try:
        part.write_bytes(data)
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise
