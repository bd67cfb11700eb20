"""Ticks, smoothing and what a chart draws of awkward data."""

import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videodit.evaluation.charts import (
    HEIGHT,
    MOST_POINTS,
    WIDTH,
    Curve,
    curve_from_metrics,
    last_values,
    line_chart,
    linear_ticks,
    log_ticks,
    running_mean,
    short_number,
)

NUMBER = r"-?\d+(?:\.\d+)?"


def points(svg: str, css: str) -> list[tuple[float, float]]:
    path = re.search(rf'<path class="{css} s0" d="([^"]*)"', svg)
    assert path
    return [(float(x), float(y)) for x, y in re.findall(rf"({NUMBER}) ({NUMBER})", path[1])]


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_linear_ticks_are_few_round_even_and_inside(low: float, span: float):
    high = low + span
    if high - low < 1e-9 * max(abs(low), 1):
        return  # below floating point's resolution
    ticks = linear_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert all(low - 1e-6 * span <= tick <= high + 1e-6 * span for tick in ticks)
    steps = np.diff(ticks)
    assert np.allclose(steps, steps[0], rtol=1e-3)
    mantissa = steps[0] / 10 ** math.floor(math.log10(steps[0]) + 1e-9)
    assert min(abs(mantissa - m) for m in (1, 2, 5, 10)) < 0.01


@given(st.floats(-8, 6), st.floats(0.02, 12))
def test_log_ticks_are_few_and_inside(exponent: float, decades: float):
    low, high = 10.0**exponent, 10.0 ** (exponent + decades)
    ticks = log_ticks(low, high)
    assert 2 <= len(ticks) <= 9
    assert all(low * 0.999 <= tick <= high * 1.001 for tick in ticks)


@given(st.floats(-100, 100), st.integers(2, 60), st.floats(0.5, 30))
def test_a_running_mean_keeps_a_constant_to_its_ends(value: float, n: int, width: float):
    np.testing.assert_allclose(running_mean(np.full(n, value), width), value, atol=1e-9)


def test_a_running_mean_narrows_noise():
    noise = np.random.default_rng(0).normal(size=2000)
    assert running_mean(noise, 10).std() < 0.3 * noise.std()


def test_labels_are_short():
    labels = [short_number(x) for x in (0, 0.05, 2.5, 1200, 15000, 2e6, 1e-5)]
    assert labels == ["0", "0.05", "2.5", "1200", "15k", "2M", "1e-5"]


@pytest.mark.parametrize("log", [False, True])
def test_a_line_falls_where_its_values_fall_and_stays_in_the_picture(log: bool):
    drawn = points(line_chart(Curve("loss", "loss", [1, 2, 3], [100.0, 10.0, 1.0], log=log)), "line")
    (x0, y0), (x1, y1), (x2, y2) = drawn
    assert x0 < x1 < x2 and y0 < y1 < y2  # SVG's y points down
    assert (y1 - y0 == pytest.approx(y2 - y1, abs=0.2)) == log  # equal ratios are equal distances on a logarithmic axis
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in drawn)


def test_values_that_cannot_be_drawn_are_left_out():
    curve = Curve("loss", "loss", range(6), [1.0, math.nan, 0.5, math.inf, 0.0, 0.25], log=True)
    svg = line_chart(curve)
    assert len(points(svg, "line")) == 3 and "nan" not in svg and "inf" not in svg
    assert last_values(curve) == pytest.approx({"": 0.25})
    assert "No values yet" in line_chart(Curve("loss", "loss", [1], [math.nan]))
    assert "No values yet" in line_chart(Curve("loss", "loss", [], []))


@pytest.mark.parametrize("ys", [[0.0], [3.0] * 20])
def test_one_point_and_a_constant_are_drawn(ys: list[float]):
    assert points(line_chart(Curve("loss", "loss", range(len(ys)), ys, smooth=True)), "line")


def test_a_long_run_stays_small_and_keeps_its_spike():
    ys = np.ones(50_000)
    ys[31_234] = 9.0
    drawn = points(line_chart(Curve("loss", "loss", range(50_000), ys, smooth=True)), "raw")
    assert len(drawn) <= MOST_POINTS + 2
    heights = [y for _, y in drawn]
    assert min(heights) < max(heights) - 100


def test_names_are_escaped_and_each_line_has_its_own_colour():
    svg = line_chart(Curve("<b>", "a & b", [1, 2], {"x": [1, 2], "y": [2, 1]}))
    assert "<b>" not in svg and "a &amp; b" in svg
    assert 'class="line s0"' in svg and 'class="line s1"' in svg


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="one value for each position"):
        line_chart(Curve("loss", "loss", [1, 2, 3], [1, 2]))


def test_metrics_are_read_past_a_torn_line_and_past_lines_without_the_key(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step": 1, "train/loss": 2.0}\n{"step": 2, "vae/psnr_db": 20}\n{"step": 3, "train/loss": NaN}\n'
        '{"step": 4, "train/loss": 1.0}\n{"step": 5, "train/lo'
    )
    curve = curve_from_metrics(path, "train/loss", "Loss", "MSE")
    assert list(curve.xs) == [1, 3, 4] and curve.ys[0] == 2.0 and math.isnan(curve.ys[1]) and curve.ys[2] == 1.0
    assert len(points(line_chart(curve), "line")) == 2
