"""Renders scenes of the shapes world to frames, and writes folders of captioned H.264 clips.

Every polygon here is a star polygon: n tips at radius 1 and n notches between them at a smaller radius (a square's
notches are the middles of its sides). Folding a point into half a tip leaves one edge to measure against, so a clip
costs a few array operations.
"""

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from videodit.data.mp4 import write_mp4
from videodit.data.shapes.world import (
    BACKGROUNDS,
    COLORS,
    EXTENTS,
    SPLITS,
    STAR_INNER_RATIO,
    WORLD_SIZE,
    SceneSpec,
    Split,
    captions,
    frame_times,
    sample_spec,
)
from videodit.errors import UserError

SUPERSAMPLE = 2  # samples a pixel and axis; each is itself anti-aliased by its distance to the edge
CHUNK = 32  # clips handed to a process at a time

# shape -> (number of tips, radius of the notches, angle of the first tip from +x towards +y)
_TIPS: dict[str, tuple[int, float, float]] = {
    "square": (4, math.cos(math.pi / 4), math.pi / 4),
    "triangle": (3, math.cos(math.pi / 3), -math.pi / 2),
    "star": (5, STAR_INNER_RATIO, -math.pi / 2),
}


def shape_distance(shape: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Signed distance to the outline of a shape with circumradius 1 at the origin, negative inside.

    For polygons this is the distance to the nearest edge's line: exact near an edge, and sharp at the tips.

    Args:
        shape: one of SHAPES.
        x: any shape; y: the same shape, down.
    Returns:
        Distances, the same shape, float32.
    """
    radius = np.hypot(x, y)
    if shape == "circle":
        return radius - 1.0
    tips, notch, first = _TIPS[shape]
    sector = 2 * math.pi / tips
    angle = np.arctan2(y, x) - np.float32(first)
    angle = np.abs(angle - np.float32(sector) * np.round(angle / np.float32(sector)))  # 0 at a tip, half at a notch
    # The edge from the tip (1, 0) to the notch; its outward normal has unit length.
    edge_x, edge_y = notch * math.cos(sector / 2) - 1.0, notch * math.sin(sector / 2)
    length = math.hypot(edge_x, edge_y)
    normal_x, normal_y = edge_y / length, -edge_x / length
    along_x, along_y = radius * np.cos(angle), radius * np.sin(angle)
    return (along_x - 1.0) * np.float32(normal_x) + along_y * np.float32(normal_y)


def render(spec: SceneSpec, num_frames: int = 17, size: int = 64) -> np.ndarray:
    """Renders a scene.

    Args:
        spec: the scene.
        num_frames: frames over which the scene's whole path is spread.
        size: height and width of the frames in pixels.
    Returns:
        (num_frames, size, size, 3) uint8 RGB.
    """
    scale = size / WORLD_SIZE
    u = frame_times(num_frames)
    paths = [(obj, obj.centers(u) * scale, obj.radii(u) * scale) for obj in spec.objects]
    # Patches may hang over the frame: the canvas has a border for them, cut off at the end.
    pad = 2 * math.ceil(max(radius.max() for _, _, radius in paths)) + 2
    top, bottom = BACKGROUNDS[spec.background]
    rows = top + (bottom - top) * (np.arange(-pad, size + pad, dtype=np.float32) + 0.5) / size
    canvas = np.empty((num_frames, size + 2 * pad, size + 2 * pad, 3), np.float32)
    canvas[:] = rows[:, None, None]
    time = np.arange(num_frames)[:, None, None]
    for obj, center, radius in paths:
        reach = math.ceil(radius.max()) + 1
        side = 2 * reach + 1
        corner = np.floor(center).astype(int) - reach  # (t, 2) first column and row of a patch that holds the object
        fine = (np.arange(side * SUPERSAMPLE) + 0.5) / SUPERSAMPLE
        offset = (fine + (corner - center)[..., None]) / radius[:, None, None]  # (t, 2, side') in radii
        x, y = np.broadcast_arrays(offset[:, 0, None, :].astype(np.float32), offset[:, 1, :, None].astype(np.float32))
        distance = shape_distance(obj.shape, x, y) * (radius * SUPERSAMPLE).astype(np.float32)[:, None, None]
        samples = np.clip(0.5 - distance, 0.0, 1.0).reshape(num_frames, side, SUPERSAMPLE, side, SUPERSAMPLE)
        cover = samples.mean(axis=(2, 4))
        row, column = pad + corner[:, 1:, None] + np.arange(side)[:, None], pad + corner[:, :1, None] + np.arange(side)
        behind = canvas[time, row, column]  # (t, side, side, 3)
        canvas[time, row, column] = behind + cover[..., None] * (np.asarray(COLORS[obj.color], np.float32) - behind)
    return np.rint(canvas[:, pad : pad + size, pad : pad + size]).astype(np.uint8)


def object_boxes(spec: SceneSpec, num_frames: int = 17, size: int = 64) -> np.ndarray:
    """The smallest pixel boxes that hold each object.

    Args:
        spec: the scene.
        num_frames: as given to render.
        size: as given to render.
    Returns:
        (n_objects, num_frames, 4) int64 x0, y0, x1, y1, clipped to the frame; frames[t, y0:y1, x0:x1] is one box.
    """
    u = frame_times(num_frames)
    boxes = []
    for obj in spec.objects:
        extent = obj.radii(u)[:, None, None] * np.reshape(EXTENTS[obj.shape], (2, 2))
        corners = (obj.centers(u)[:, None] + extent) * size / WORLD_SIZE  # (t, 2 corners, 2)
        soft = 0.5 / SUPERSAMPLE  # px by which an anti-aliased edge reaches out
        boxes.append(np.concatenate([np.floor(corners[:, 0] - soft), np.ceil(corners[:, 1] + soft)], axis=1))
    return np.clip(np.stack(boxes), 0, size).astype(np.int64)


@dataclass(frozen=True)
class _Job:
    """Everything that determines the clips of a folder."""

    out_dir: str
    split: Split
    seed: int
    num_frames: int
    size: int
    fps: float
    num_objects: int

    def paths(self, index: int) -> tuple[Path, Path]:
        """The clip and its sidecar."""
        stem = Path(self.out_dir) / f"{self.split}-{index:06d}"
        return stem.with_suffix(".mp4"), stem.with_suffix(".json")

    def write(self, index: int) -> None:
        """Renders one clip, unless it is there already and was made from the same scene and settings."""
        spec = world_spec(index, self.split, self.seed, self.num_objects)
        made_with = {"num_frames": self.num_frames, "size": self.size, "fps": self.fps}
        sidecar = json.dumps({"captions": captions(spec), "spec": spec.to_dict(), "rendered": made_with}) + "\n"
        video_path, sidecar_path = self.paths(index)
        if video_path.exists() and sidecar_path.exists() and sidecar_path.read_text() == sidecar:
            return
        # The clip comes last, and an outdated one goes first: whatever interrupts us, no clip has another's captions.
        video_path.unlink(missing_ok=True)
        partial = sidecar_path.with_suffix(".json.tmp")
        partial.write_text(sidecar)
        partial.replace(sidecar_path)
        write_mp4(video_path, render(spec, self.num_frames, self.size), self.fps)

    def write_many(self, indices: range) -> int:
        """Writes several clips; returns how many."""
        for index in indices:
            self.write(index)
        return len(indices)


def world_spec(index: int, split: Split, seed: int, num_objects: int = 1) -> SceneSpec:
    """The scene of a folder's clip: a function of these arguments alone, whatever the number of clips or processes."""
    return sample_spec(np.random.default_rng([seed, SPLITS.index(split), num_objects, index]), split, num_objects)


def write_world(
    out_dir: str | Path,
    num_clips: int,
    split: Split = "train",
    seed: int = 0,
    num_frames: int = 17,
    size: int = 64,
    fps: float = 8,
    progress: Callable[[int], None] | None = None,
    *,
    num_objects: int = 1,
    workers: int | None = None,
) -> list[Path]:
    """Writes a folder of clips SPLIT-000000.mp4, each with a sidecar .json; clips that are there already are kept.

    Args:
        out_dir: created if absent.
        num_clips: how many clips the folder shall have.
        split: "train" or "held_out".
        seed: of the scenes; the first clips are the same for every num_clips.
        num_frames: frames of each clip.
        size: height and width in pixels, even (yuv420p).
        fps: frames a second.
        progress: called with the number of clips done so far, in this process.
        num_objects: objects in each scene, 1 or 2.
        workers: processes; as many as there are cores by default.
    Returns:
        The clips' paths, in order.
    Raises:
        UserError: if size is odd or a number is not positive, the split is unknown, or the folder cannot be written.
    """
    for name, value in {"num_clips": num_clips, "num_frames": num_frames, "size": size, "fps": fps}.items():
        if value <= 0:
            raise UserError(f"{name} is {value}: it must be positive")
    if size % 2:
        raise UserError(f"size is {size}: H.264 with 4:2:0 chroma needs an even one, {size - 1} or {size + 1}")
    if split not in SPLITS:
        raise UserError(f"split is {split!r}: choose one of {', '.join(SPLITS)}")
    job = _Job(str(out_dir), split, seed, num_frames, size, fps, num_objects)
    chunks = [range(i, min(i + CHUNK, num_clips)) for i in range(0, num_clips, CHUNK)]
    workers = min(workers or os.cpu_count() or 1, len(chunks))
    done = 0
    try:
        Path(out_dir).mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            results: Iterator[int] = map(job.write_many, chunks)
            if workers > 1:
                # Spawned, not forked: the caller may hold threads (torch) that a fork leaves in an undefined state.
                pool = stack.enter_context(ProcessPoolExecutor(workers, mp_context=get_context("spawn")))
                stack.callback(pool.shutdown, wait=False, cancel_futures=True)
                results = pool.map(job.write_many, chunks)
            for count in results:
                done += count
                if progress:
                    progress(done)
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot write clips to {out_dir}: {reason}; choose a folder with room to write") from error
    return [job.paths(index)[0] for index in range(num_clips)]
