"""Clips as one still picture: a row for each clip, its frames from left to right."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

BACKGROUND = (250, 250, 249)
INK = (38, 38, 42)
FONT_SIZE = 15
MARGIN = 16  # around the sheet, in pixels
GAP = 4  # between frames
ROW_GAP = 14  # between clips
SMALLEST_FRAME = 96  # smaller frames are enlarged by a whole factor, so that a pixel stays a square


def frame_indices(num_frames: int, count: int) -> list[int]:
    """Indices of `count` frames spread evenly over a clip, first and last included; all of them if it has fewer."""
    count = min(count, num_frames)
    return np.linspace(0, num_frames - 1, count).round().astype(int).tolist()


def strip(clip: np.ndarray, frames: int = 6, *, scale: int = 1, gap: int = 0) -> np.ndarray:
    """A clip as one row of frames.

    Args:
        clip: (t, h, w, 3) uint8.
        frames: how many to show, spread evenly, first and last included; fewer if the clip is shorter.
        scale: each pixel becomes scale × scale pixels.
        gap: pixels of background between two frames.
    Returns:
        (h·scale, width of the row, 3) uint8.
    Raises:
        ValueError: if the clip is not (t, h, w, 3) uint8 with at least one frame, or frames < 1.
    """
    if clip.ndim != 4 or clip.shape[-1] != 3 or clip.dtype != np.uint8 or len(clip) == 0:
        raise ValueError(f"a clip must be (t, h, w, 3) uint8 with t >= 1, got {clip.shape} {clip.dtype}")
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    shown = clip[frame_indices(len(clip), frames)].repeat(scale, axis=1).repeat(scale, axis=2)  # t h w 3
    count, height, width, _ = shown.shape
    row = np.empty((height, count * width + (count - 1) * gap, 3), np.uint8)
    row[:] = BACKGROUND
    for i, frame in enumerate(shown):
        left = i * (width + gap)
        row[:, left : left + width] = frame
    return row


def contact_sheet(
    clips: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[str] | None = None,
    frames: int = 6,
    path: str | Path | None = None,
) -> Image.Image:
    """A picture with one row for each clip and, above it, its caption.

    Args:
        clips: each (t, h, w, 3) uint8; they may differ in length and size.
        captions: one for each clip; a long one is broken into lines.
        frames: frames shown of each clip.
        path: where to write a PNG (atomically; the folder is made); None writes nothing.
    Returns:
        The sheet.
    Raises:
        ValueError: if there are no clips, or not one caption for each clip.
    """
    if len(clips) == 0:
        raise ValueError("no clips for a contact sheet: at least one is needed")
    if captions is not None and len(captions) != len(clips):
        raise ValueError(f"{len(captions)} captions for {len(clips)} clips: give one for each clip")
    font = ImageFont.load_default(size=FONT_SIZE)
    line_height = FONT_SIZE + 5
    rows = [strip(np.asarray(clip), frames, scale=_scale(np.asarray(clip)), gap=GAP) for clip in clips]
    width = max(row.shape[1] for row in rows)
    texts = [_wrap(caption, font, width) for caption in captions] if captions is not None else [[] for _ in rows]
    heights = [row.shape[0] + line_height * len(lines) for row, lines in zip(rows, texts, strict=True)]

    sheet = Image.new("RGB", (width + 2 * MARGIN, sum(heights) + ROW_GAP * (len(rows) - 1) + 2 * MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    top = MARGIN
    for row, lines, height in zip(rows, texts, heights, strict=True):
        for i, line in enumerate(lines):
            draw.text((MARGIN, top + i * line_height), line, fill=INK, font=font)
        sheet.paste(Image.fromarray(row), (MARGIN, top + line_height * len(lines)))
        top += height + ROW_GAP
    if path is not None:
        _write_png(sheet, Path(path))
    return sheet


def _scale(clip: np.ndarray) -> int:
    return max(1, -(-SMALLEST_FRAME // max(1, min(clip.shape[1:3])))) if clip.ndim == 4 else 1


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Words onto lines no wider than `width` pixels; a word that is wider by itself is cut with an ellipsis."""
    lines: list[str] = []
    for word in text.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        while len(word) > 1 and font.getlength(word) > width:
            word = word[:-2] + "…"
        lines.append(word)
    return lines


def _write_png(sheet: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG", optimize=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(buffer.getvalue())
    os.replace(partial, path)
