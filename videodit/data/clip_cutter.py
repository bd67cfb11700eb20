"""One source video into clips: decoded once, cut at scene changes, resized, scored, encoded, in constant memory."""

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import cv2

from videodit.data.channel_statistics import ChannelMoments
from videodit.data.frame_convert import ToShardFormat
from videodit.data.frame_rate import at_constant_rate
from videodit.data.letterbox import Bars, find_bars
from videodit.data.mp4 import Mp4Encoder
from videodit.data.scene_cuts import CutDetector
from videodit.data.scores import ClipScorer, ClipScores
from videodit.data.shards import sha256_hex
from videodit.data.video_io import VideoError, VideoInfo, iter_samples, open_decoded
from videodit.data.yuv_planes import frame_of, planes_of
from videodit.errors import user_error

_SQUARE = 0.02  # pixels this near to square are shown as square
_SAMPLED = 12  # frames that bars are looked for in
NO_BARS = Bars()


@dataclass(frozen=True)
class CutRules:
    """How a source becomes clips."""

    min_frames: int
    max_duration_s: float
    max_short_side: int
    scene_cuts: bool
    cut_threshold: float
    crf: int
    crop_bars: bool = False
    encode: bool = True
    """Whether clips are written; without it they have no bytes, and all else that is known of them."""

    def max_frames(self, fps: float) -> int:
        """The longest clip, in frames."""
        return max(self.min_frames, round(self.max_duration_s * fps))

    def size(self, info: VideoInfo, bars: Bars = NO_BARS) -> tuple[int, int]:
        """(height, width) of a source's frames, bars included: square pixels, even if scaled.

        What is left without the bars has a short side of at most max_short_side.
        """
        height, width = info.height, info.width * info.pixel_aspect
        if abs(info.pixel_aspect - 1) <= _SQUARE:
            width = info.width
        content = (
            height * (1 - (bars.top + bars.bottom) / info.height),
            width * (1 - (bars.left + bars.right) / info.width),
        )
        scale = self.max_short_side / min(content) if self.max_short_side else 1.0
        if scale >= 1 and width == info.width:
            return info.height, info.width
        scale = min(scale, 1.0)
        return max(2, 2 * round(height * scale / 2)), max(2, 2 * round(width * scale / 2))


@dataclass(frozen=True)
class Clip:
    """A clip in a spool file; a picture has no frame rate, 0, a field has moments of its channels and no scores."""

    start_frame: int
    num_frames: int
    height: int
    width: int
    fps: float
    offset: int
    size: int
    sha256: str
    scores: ClipScores | None
    bars: Bars
    extension: str = "mp4"
    moments: ChannelMoments | None = None


@dataclass(frozen=True)
class Dropped:
    """A stretch of a source that does not become a clip."""

    start_frame: int
    num_frames: int
    fps: float
    reason: str


@dataclass
class CutResult:
    """What became of one source."""

    clips: list[Clip] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)
    problem: str = ""
    """Why the source as a whole was refused; empty if it was not."""
    fetched: bool = True
    """Whether its bytes could be had; if not, the next run tries again."""


def cut_source(source: str | bytes, spool: Path, rules: CutRules, beat: Callable[[], None] = lambda: None) -> CutResult:
    """Cuts one source into clips.

    A source that stops decoding half-way gives nothing: what comes before the damage is not to be trusted either.

    Args:
        source: the file, or its bytes.
        spool: the file the clips' bytes go to, one after the other.
        rules: how to cut.
        beat: called at every frame.
    Returns:
        Where in the spool each clip lies, what was dropped, or what is wrong with the source.
    Raises:
        UserError: if the spool cannot be written.
    """
    cv2.setNumThreads(1)  # one process a core
    number = 0
    try:
        with open(spool, "wb") as file, open_decoded(source) as (info, frames):
            first = next(frames)
            frames = itertools.chain([first], frames)
            bars = _bars_of(source, first) if rules.crop_bars else NO_BARS
            beat()
            cutter = _Cutter(rules, info, bars, file.write)
            to_shard = ToShardFormat(rules.size(info, bars))
            try:
                for frame in at_constant_rate(frames, info.fps, lambda frame: _without(to_shard(frame), bars, info)):
                    beat()
                    cutter.push(frame)
                    number += 1
                return cutter.finish()
            finally:
                cutter.close()
    except VideoError as error:
        return CutResult(problem=f"{error}, after {number} good frames" if number else str(error))
    except OSError as error:
        raise user_error(error, spool) from error


def _bars_of(source: str | bytes, first: av.VideoFrame) -> Bars:
    """Most videos have none, as their first frame shows; else moments all over it are looked at."""
    to_shard = ToShardFormat()

    def moments() -> Iterator[av.VideoFrame]:
        yield to_shard(first)
        before = None
        for frame in iter_samples(source, _SAMPLED):
            if frame is not before:
                yield to_shard(frame)
            before = frame

    return find_bars(moments())


def _without(frame: av.VideoFrame, bars: Bars, info: VideoInfo) -> av.VideoFrame:
    """The frame without its bars, which are in pixels of the source; even sizes, and no edge of a bar."""
    if bars == NO_BARS:
        return frame
    # In steps of two pixels, one of chroma.
    top, bottom = (math.ceil(bar * frame.height / info.height / 2) for bar in bars[:2])
    left, right = (math.ceil(bar * frame.width / info.width / 2) for bar in bars[2:])
    height, width = frame.height // 2 - bottom, frame.width // 2 - right
    y, u, v = planes_of(frame)
    half = slice(top, height), slice(left, width)
    return frame_of((y[2 * top : 2 * height, 2 * left : 2 * width], u[half], v[half]))


class _Cutter:
    """Takes frames one by one and writes clips; holds as many frames as the cut detector looks ahead."""

    def __init__(self, rules: CutRules, info: VideoInfo, bars: Bars, write: Callable[[bytes], object]) -> None:
        self._rules, self._bars = rules, bars
        self._fps = info.fps
        self._write = write
        self._detector = CutDetector(info.fps, rules.cut_threshold) if rules.scene_cuts else None
        self._held: deque[av.VideoFrame] = deque()
        self._cuts: set[int] = set()
        self._next = 0  # number of the first frame held
        self._encoder: Mp4Encoder | _FrameCounter | None = None
        self._scorer = ClipScorer(info.fps)
        self._offset = 0
        self._result = CutResult()

    def push(self, frame: av.VideoFrame) -> None:
        self._held.append(frame)
        if self._detector:
            self._cuts.update(self._detector.push(frame))
        while len(self._held) > CutDetector.lookahead:
            self._encode(self._held.popleft())

    def finish(self) -> CutResult:
        while self._held:
            self._encode(self._held.popleft())
        self._end_clip()
        return self._result

    def close(self) -> None:
        if self._encoder:
            self._encoder.close()

    def _encode(self, frame: av.VideoFrame) -> None:
        if self._next in self._cuts or (
            self._encoder and self._encoder.num_frames >= self._rules.max_frames(self._fps)
        ):
            self._cuts.discard(self._next)
            self._end_clip()
        if self._encoder is None:
            kind = Mp4Encoder if self._rules.encode else _FrameCounter
            self._encoder = kind(frame.height, frame.width, self._fps, crf=self._rules.crf)
            self._scorer = ClipScorer(self._fps)
        self._scorer.push(frame)
        self._encoder.write_yuv(frame)
        self._next += 1

    def _end_clip(self) -> None:
        encoder, self._encoder = self._encoder, None
        if encoder is None:
            return
        start, count = self._next - encoder.num_frames, encoder.num_frames
        if count < self._rules.min_frames:
            encoder.close()
            reason = f"{count} frames, shorter than min_frames {self._rules.min_frames}"
            self._result.dropped.append(Dropped(start, count, self._fps, reason))
            return
        data = encoder.finish()
        self._write(data)
        clip = Clip(
            start, count, encoder.height, encoder.width, self._fps, self._offset, len(data), sha256_hex(data),
            self._scorer.finish(), self._bars,
        )  # fmt: skip
        self._offset += len(data)
        self._result.clips.append(clip)


class _FrameCounter:
    """In the place of an encoder where no clip is wanted."""

    def __init__(self, height: int, width: int, fps: float, *, crf: int) -> None:
        self.height, self.width, self.num_frames = height - height % 2, width - width % 2, 0

    def write_yuv(self, frame: av.VideoFrame) -> None:
        self.num_frames += 1

    def finish(self) -> bytes:
        return b""

    def close(self) -> None:
        pass
