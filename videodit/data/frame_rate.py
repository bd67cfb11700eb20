"""Frames that come when they like (phones, screen recordings, GIFs) at the constant rate that clips have."""

from collections.abc import Callable, Iterator
from typing import TypeVar

import av

Picture = TypeVar("Picture")

_LOOSE = 0.75  # frames by which a time may differ from the expected one: clocks jitter, a frame left out is a whole one
_LONGEST_S = 600.0  # between two frames: what jumps further is no time but damage


def at_constant_rate(
    frames: Iterator[av.VideoFrame], fps: float, convert: Callable[[av.VideoFrame], Picture]
) -> Iterator[Picture]:
    """Shows each moment's frame: repeats the one that stays, leaves out the one that is gone before its moment.

    Frames that come about when they are expected pass one by one, as do those without a time and the first one after
    times that jump back or far ahead. One frame is held.

    Args:
        frames: decoded, in the order of display, with their times.
        fps: frames per second to come out.
        convert: applied once to a frame that is shown, however often.
    Yields:
        A converted frame for each 1 / fps seconds from the first one to the last.
    """
    held = next(frames, None)
    if held is None:
        return
    origin_s, number = held.time or 0.0, 0  # when frame 0 began, and the number of the held one
    for frame in frames:
        due = number + 1.0 if frame.time is None else (frame.time - origin_s) * fps
        if not number - 1 <= due <= number + max(2.0, _LONGEST_S * fps):
            origin_s, due = frame.time - (number + 1) / fps, number + 1.0
        next_number = number + 1 if abs(due - number - 1) <= _LOOSE else max(number, round(due))
        if next_number > number:
            picture = convert(held)
            for _ in range(next_number - number):
                yield picture
        held, number = frame, next_number
    yield convert(held)
