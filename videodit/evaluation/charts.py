"""Line charts as inline SVG, drawn without a plotting library so that a report is one file that needs nothing.

Colours and fonts come from the page's style sheet through classes, so that a chart follows its light and dark themes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np

WIDTH, HEIGHT = 460, 270  # the SVG's own units; it is scaled to its column
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 14, 42  # room for tick labels and axis titles
MOST_POINTS = 480  # a line has no more vertices than the chart has pixels


@dataclass(frozen=True)
class Curve:
    """One chart.

    Attributes:
        title: what is shown.
        ylabel: the quantity with its unit.
        xs: position on the horizontal axis, ascending.
        ys: one value for each position; or several named lines, {name: values}.
        smooth: draw the values thin and a running mean over them.
        log: logarithmic vertical axis.
        xlabel: the horizontal quantity with its unit.
    """

    title: str
    ylabel: str
    xs: Sequence[float]
    ys: Sequence[float] | Mapping[str, Sequence[float]]
    smooth: bool = False
    log: bool = False
    xlabel: str = "step"


@dataclass(frozen=True)
class Scale:
    """From data to picture: low lands on start, high on end."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def all(self, values: np.ndarray) -> np.ndarray:
        """Each of (n,) values."""
        return self.start + (values - self.low) / (self.high - self.low) * (self.end - self.start)


def curve_from_metrics(
    path: str | Path, key: str, title: str, ylabel: str, *, smooth: bool = False, log: bool = False, x: str = "step"
) -> Curve:
    """A curve out of a run folder's metrics.jsonl.

    Args:
        path: the metrics.jsonl; a last line that a killed process left unfinished is passed over.
        key: which figure, for example train/loss. Lines that lack it are passed over.
        title: the chart's title.
        ylabel: the figure's name and unit.
        smooth: as in `Curve`.
        log: as in `Curve`.
        x: which key is the horizontal axis.
    Returns:
        The curve; empty if no line has the key.
    """
    xs: list[float] = []
    ys: list[float] = []
    with open(path, encoding="utf-8") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(row, dict) and _is_number(row.get(x)) and _is_number(row.get(key)):
                xs.append(float(row[x]))
                ys.append(float(row[key]))
    return Curve(title, ylabel, xs, ys, smooth=smooth, log=log, xlabel=x)


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values (1, 2 or 5 times a power of ten apart) from low to high, about `count` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(rough))
    step = min((m * power for m in (1, 2, 5, 10)), key=lambda step: abs((high - low) / step - count))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Round values from low to high for a logarithmic axis: powers of ten, with 2 and 5 between them where few fit."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for multiples in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [m * 10.0**e for e in range(first, last + 1) for m in multiples]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks[:: -(-len(ticks) // 8)]  # at most eight
    return linear_ticks(low, high, 4)  # less than an octave: linear ticks are the readable ones


def running_mean(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian-weighted mean around each value, renormalised at the ends so that they are not pulled towards zero.

    Args:
        values: (n,) float.
        width: standard deviation of the weights, in values.
    Returns:
        (n,) float.
    """
    reach = min(len(values) - 1, math.ceil(3 * width)) if len(values) else 0
    if reach < 1:
        return values
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total = np.convolve(values, weights)[reach:-reach]
    return total / np.convolve(np.ones(len(values)), weights)[reach:-reach]


def line_chart(curve: Curve) -> str:
    """The chart as an `<svg>` element; a short note in its place when there is nothing finite to draw."""
    lines = {name: _finite(curve.xs, ys, curve.log) for name, ys in _named(curve).items()}
    lines = {name: (xs, ys) for name, (xs, ys) in lines.items() if len(xs)}
    if not lines:
        return '<p class="empty">No values yet.</p>'
    x_low, x_high = _range(np.concatenate([xs for xs, _ in lines.values()]), pad=0.0)
    y_low, y_high = _range(np.concatenate([ys for _, ys in lines.values()]), pad=0.06)  # log10 on a logarithmic axis
    px = Scale(x_low, x_high, LEFT, WIDTH - RIGHT)
    py = Scale(y_low, y_high, HEIGHT - BOTTOM, TOP)

    parts = [_axes(curve, px, py)]
    for i, (xs, ys) in enumerate(lines.values()):
        smoothed = curve.smooth and len(ys) >= 8
        if smoothed:
            parts.append(f'<path class="raw s{i % 5}" d="{_path(px.all(xs), py.all(ys))}"/>')
        drawn = running_mean(ys, max(1.0, len(ys) / 60)) if smoothed else ys
        parts.append(f'<path class="line s{i % 5}" d="{_path(px.all(xs), py.all(drawn))}"/>')
        end_x, end_y = px(float(xs[-1])), py(float(drawn[-1]))
        parts.append(f'<circle class="dot s{i % 5}" cx="{end_x:.1f}" cy="{end_y:.1f}" r="3.2"/>')
    summary = escape(f"{curve.title}: {curve.ylabel} against {curve.xlabel}")
    return f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{summary}">{"".join(parts)}</svg>'


def last_values(curve: Curve) -> dict[str, float]:
    """The last finite value of each line, as drawn (the running mean's where the curve is smoothed), for a legend."""
    last = {}
    for name, values in _named(curve).items():
        _, ys = _finite(curve.xs, values, curve.log)
        if len(ys):
            end = float((running_mean(ys, max(1.0, len(ys) / 60)) if curve.smooth and len(ys) >= 8 else ys)[-1])
            last[name] = 10.0**end if curve.log else end
    return last


def short_number(value: float) -> str:
    """A tick's label: 0.05, 2.5, 1200, 15k."""
    if value == 0:
        return "0"
    if abs(value) >= 1e6:
        return f"{value / 1e6:.4g}M"
    if abs(value) >= 1e4:
        return f"{value / 1e3:.4g}k"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.0e}".replace("e-0", "e-")


def _axes(curve: Curve, px: Scale, py: Scale) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for value in log_ticks(10.0**py.low, 10.0**py.high) if curve.log else linear_ticks(py.low, py.high):
        y = py(math.log10(value) if curve.log else value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(svg_text("tick", LEFT - 8, y + 4, short_number(value), anchor="end"))
    for value in linear_ticks(px.low, px.high):
        x = px(value)  # the last label stays inside the picture
        parts.append(
            svg_text("tick", x, bottom + 18, short_number(value), anchor="end" if x > right - 12 else "middle")
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(svg_text("label", (LEFT + right) / 2, HEIGHT - 5, curve.xlabel))
    ylabel = curve.ylabel + (" (log)" if curve.log else "")
    return "".join(parts) + svg_text("label", 0, 0, ylabel, f"translate(13 {(TOP + bottom) / 2:.0f}) rotate(-90)")


def svg_text(css: str, x: float, y: float, text: str, transform: str = "", anchor: str = "middle") -> str:
    """A `<text>` element of a CSS class, at a place or moved by a transform."""
    place = f'transform="{transform}"' if transform else f'x="{x:.1f}" y="{y:.1f}"'
    return f'<text class="{css}" {place} text-anchor="{anchor}">{escape(text)}</text>'


def _named(curve: Curve) -> Mapping[str, Sequence[float]]:
    return curve.ys if isinstance(curve.ys, Mapping) else {"": curve.ys}


def _finite(xs: Sequence[float], ys: Sequence[float], log: bool) -> tuple[np.ndarray, np.ndarray]:
    """The points that can be drawn; y as log10 on a logarithmic axis."""
    x, y = np.asarray(xs, np.float64), np.asarray(ys, np.float64)
    if x.shape != y.shape or x.ndim != 1:
        raise ValueError(f"a curve needs one value for each position, got {y.shape} values and {x.shape} positions")
    keep = np.isfinite(x) & np.isfinite(y) & ((y > 0) | (not log))
    return x[keep], np.log10(y[keep]) if log else y[keep]


def _range(values: np.ndarray, pad: float) -> tuple[float, float]:
    low, high = float(values.min()), float(values.max())
    if high - low < 1e-12 * max(1.0, abs(high)):  # one point or a constant: open a window around it
        half = 0.05 * abs(high) or 0.5
        return low - half, high + half
    return low - pad * (high - low), high + pad * (high - low)


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """SVG path data; a long line keeps the lowest and the highest value of each stretch, so spikes stay visible."""
    if len(x) > MOST_POINTS:
        stretches = np.array_split(np.arange(len(x)), MOST_POINTS // 2)
        keep = sorted({int(i) for s in stretches for i in (s[y[s].argmin()], s[y[s].argmax()])} | {0, len(x) - 1})
        x, y = x[keep], y[keep]
    return "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
