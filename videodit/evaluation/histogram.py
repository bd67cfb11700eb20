"""Histograms as inline SVG, with the thresholds that cut them."""

from collections.abc import Sequence
from html import escape

import numpy as np

from videodit.evaluation.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Scale,
    linear_ticks,
    short_number,
    svg_text,
)

_BINS = 40


def histogram(values: Sequence[float], label: str, low: float | None = None, high: float | None = None) -> str:
    """How often values occur, as an `<svg>` element; bars outside the limits are pale.

    The axis ends at the 99.5th percentile, so that one odd value does not press all others into one bar; what lies
    beyond is counted in the last bar.

    Args:
        values: finite numbers.
        label: what they are, with the unit.
        low: smallest value that is kept; None for no limit.
        high: largest value that is kept; None for no limit.
    """
    data = np.asarray(values, np.float64)
    if not len(data):
        return '<p class="empty">No values.</p>'
    start = float(data.min())
    end = max(float(np.quantile(data, 0.995)), *(limit for limit in (low, high) if limit is not None), start)
    if end - start < 1e-9:
        start, end = start - 0.5, end + 0.5
    counts, edges = np.histogram(np.clip(data, start, end), bins=_BINS, range=(start, end))
    px = Scale(start, end, LEFT, WIDTH - RIGHT)
    bottom = HEIGHT - BOTTOM
    py = Scale(0.0, float(counts.max()), bottom, TOP)
    parts = []
    for value in linear_ticks(0.0, py.high, 4):
        if value == int(value):
            y = py(value)
            parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
            parts.append(svg_text("tick", LEFT - 8, y + 4, short_number(value), anchor="end"))
    for count, left, right in zip(counts, edges, edges[1:]):
        if count:
            kept = (low is None or right > low) and (high is None or left < high)
            x, y = px(float(left)), py(float(count))
            size = f'width="{max(1.0, px(float(right)) - x - 1):.1f}" height="{bottom - y:.1f}"'
            parts.append(f'<rect class="{"bin" if kept else "bin out"}" x="{x:.1f}" y="{y:.1f}" {size}/>')
    parts += [svg_text("tick", px(value), bottom + 18, short_number(value)) for value in linear_ticks(start, end)]
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{bottom}" y2="{bottom}"/>')
    for limit in (low, high):
        if limit is not None:
            x = px(limit)
            parts.append(f'<line class="limit" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
    parts.append(svg_text("label", (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, label))
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
    return head + "".join(parts) + "</svg>"
