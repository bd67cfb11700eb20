"""Names the motion of a tracked object: each kind of path is fitted to it by least squares, and exactly one must hold.

Lengths are world units (pixels of a 64x64 frame); the rendered motions travel 16 to 48 of them, and grow or shrink by
80% of the mean radius.
"""

from dataclasses import dataclass

import numpy as np

from videodit.data.shapes.world import WORLD_SIZE

MIN_FRAMES = 5
MIN_TRAVEL = 10.0  # of left, right, up, down and diagonal, from end to end
MAX_FIT_ERROR = 1.5  # root mean square distance of the centers from the fitted path
STILL_TRAVEL = 3.0
STILL_SPREAD = 1.0  # root mean square distance from the mean position
MIN_GROWTH = 0.4  # change of the radius from end to end over its mean
STEADY_GROWTH = 0.25  # what moves does not change in size by more
MAX_RADIUS_ERROR = 0.12  # root mean square deviation of the radius from its line, over its mean
AXIS_RATIO = 0.3  # largest slope of left, right, up and down against their axis, and of diagonals against 45 degrees
MIN_BOUNCE_ARM = 3.0  # travel before the turn and after it
MIN_BOUNCE_TRAVEL = 10.0
BORDER_GAP = 5.0  # between the turning object's edge and the border
ORBIT_RANGE = (4.0, 13.0)
MIN_TURNS = 0.6


@dataclass(frozen=True)
class Track:
    """Where an object is in each frame: all (t,), in world units.

    Attributes:
        x: center.
        y: center, down.
        radius: sqrt(area / pi).
        present: bool, whether the object was found whole.
    """

    x: np.ndarray
    y: np.ndarray
    radius: np.ndarray
    present: np.ndarray


def classify_motion(track: Track) -> str:
    """The one motion that the track shows, or "unclear"."""
    time = np.linspace(0.0, 1.0, len(track.x))[track.present]
    if len(time) < MIN_FRAMES:
        return "unclear"
    x, y, radius = (np.asarray(v, np.float64)[track.present] for v in (track.x, track.y, track.radius))
    measured = np.stack([x, y, radius], axis=1)
    lines = np.polyfit(time, measured, 1)  # slope, offset
    misfit = measured - (time[:, None] * lines[0] + lines[1])
    line_error = _rms(misfit[:, 0], misfit[:, 1])
    mean_radius = radius.mean()
    growth = lines[0, 2] / mean_radius
    dx, dy = lines[0, 0], lines[0, 1]

    if _rms(misfit[:, 2]) > MAX_RADIUS_ERROR * mean_radius:
        return "unclear"
    stays = np.hypot(dx, dy) <= STILL_TRAVEL and _rms(x - x.mean(), y - y.mean()) <= STILL_SPREAD
    if stays and abs(growth) >= MIN_GROWTH:
        return "grow" if growth > 0 else "shrink"
    if abs(growth) > STEADY_GROWTH:
        return "unclear"
    if stays:
        return "still"

    found = []
    if line_error <= MAX_FIT_ERROR and line_error <= 0.12 * np.hypot(dx, dy) and np.hypot(dx, dy) >= MIN_TRAVEL:
        found.append((line_error, _heading(dx, dy)))
    if (bounce_error := _fit_bounce(time, x, y, radius)) <= MAX_FIT_ERROR:
        found.append((bounce_error, "bounce"))
    if (orbit_error := _fit_orbit(time, x, y)) <= MAX_FIT_ERROR:
        found.append((orbit_error, "orbit"))
    return min(found)[1] if found else "unclear"


def _rms(*components: np.ndarray) -> float:
    """Root mean square length of the vectors with these components."""
    return float(np.sqrt(sum(np.mean(np.square(c)) for c in components)))


def _heading(dx: float, dy: float) -> str:
    """The direction of a straight path, if it is near one of the eight that the world has."""
    small, large = sorted((abs(dx), abs(dy)))
    if small <= AXIS_RATIO * large:
        return ("right" if dx > 0 else "left") if abs(dx) > abs(dy) else ("down" if dy > 0 else "up")
    tilt = abs(np.arctan2(small, large) - np.pi / 4)
    return "diagonal" if tilt <= np.arctan(AXIS_RATIO) else "unclear"


def _fit_bounce(time: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> float:
    """Error of the best vertical path that turns once at the upper or lower border; inf where none is plausible."""
    if np.ptp(x) > MIN_BOUNCE_TRAVEL / 2:
        return np.inf
    turns = np.linspace(0.15, 0.85, 29)
    arm = np.abs(time - turns[:, None])  # (29, t): y = at_turn + slope * arm, for each time of the turn
    centered = arm - arm.mean(axis=1, keepdims=True)
    slopes = centered @ y / np.square(centered).sum(axis=1)
    errors = np.square(y - y.mean() - slopes[:, None] * centered).mean(axis=1)
    best = int(np.argmin(errors))
    turn, slope, at_turn = turns[best], slopes[best], y.mean() - slopes[best] * arm[best].mean()
    error = float(np.sqrt(errors[best] + x.var()))
    arms = abs(slope) * min(turn, 1 - turn)
    edge = at_turn - radius.mean() if slope > 0 else WORLD_SIZE - at_turn - radius.mean()
    if arms < MIN_BOUNCE_ARM or abs(slope) < MIN_BOUNCE_TRAVEL or edge > BORDER_GAP:
        return np.inf
    return error


def _fit_orbit(time: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Error of the best circle travelled at an even speed for more than half a turn; inf where none is plausible."""
    system = np.stack([x, y, np.ones_like(x)], axis=1)
    solution = np.linalg.lstsq(system, x**2 + y**2, rcond=None)[0]  # |p|² = 2 c·p + r² - |c|²
    cx, cy = solution[:2] / 2
    squared = solution[2] + cx**2 + cy**2
    if not ORBIT_RANGE[0] ** 2 <= squared <= ORBIT_RANGE[1] ** 2:
        return np.inf
    angle = np.unwrap(np.arctan2(y - cy, x - cx))
    rate, start = np.polyfit(time, angle, 1)
    if abs(rate) < MIN_TURNS * 2 * np.pi:
        return np.inf
    r = np.sqrt(squared)
    fitted = rate * time + start
    return _rms(x - cx - r * np.cos(fitted), y - cy - r * np.sin(fitted))
