"""Progress without a terminal: a plain line now and then, and at the end, on stderr."""

import io
import sys

import pytest

from videodit.progress import PLAIN_INTERVAL_S, Progress, duration, show_progress


def test_a_line_an_interval_and_one_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Progress("train dit", 10, clock=lambda: now) as progress:
        for done in range(1, 11):
            progress.update(done, f"loss {done}")
            now += PLAIN_INTERVAL_S / 4
    out, err = capsys.readouterr()
    assert out == ""
    left = 5 * PLAIN_INTERVAL_S / 4
    assert err.splitlines() == [
        f"train dit: 5/10, {left:.0f} s left, loss 5",
        f"train dit: 9/10, {PLAIN_INTERVAL_S / 4:.0f} s left, loss 9",
        "train dit: 10/10 loss 10",
    ]


@pytest.mark.parametrize(("is_a_terminal", "environment"), [(True, {"TERM": "dumb"}), (False, {"FORCE_COLOR": "1"})])
def test_plain_lines_where_no_line_can_be_live(
    is_a_terminal: bool, environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    screen = io.StringIO()
    monkeypatch.setattr(screen, "isatty", lambda: is_a_terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress("train dit", 2) as progress:
        progress.update(2, "loss 1")
    assert screen.getvalue() == "train dit: 2/2 loss 1\n"


def test_a_resumed_run_is_not_taken_for_a_fast_one(capsys: pytest.CaptureFixture[str]) -> None:
    now = 0.0
    with Progress("train dit", 1000, clock=lambda: now) as progress:
        progress.update(900)
        now = PLAIN_INTERVAL_S
        progress.update(910)
    assert capsys.readouterr().err == f"train dit: 910/1000, {9 * PLAIN_INTERVAL_S:.0f} s left\n"


def test_each_stage_has_a_rate_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    """How long cutting a video took says nothing of how long captioning a clip will."""
    now = 0.0
    with Progress("ingest videos", clock=lambda: now) as progress:
        for done in range(1, 4):
            now += 100
            progress.update(done, total=3)
        for done in (4, 5, 6):
            now += 40
            progress.update(done, total=6)
    left = [line.split(", ")[1] for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert left == ["100 s left", "20 s left", "16 s left"]


def test_a_long_time_is_not_told_in_seconds() -> None:
    times = {0.4: "0 s", 599: "599 s", 601: "10 min", 35999: "600 min", 36000: "10.0 h", 345600: "4.0 days"}
    assert {seconds: duration(seconds) for seconds in times} == times


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("train dit", 1, enabled=False) as progress:
        progress.update(1)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("total", [0, 1, 1000])
def test_the_callback_shows_the_end(total: int, capsys: pytest.CaptureFixture[str]) -> None:
    with show_progress("encode clips") as report:
        for done in range(total + 1):
            report(done, total)
    assert capsys.readouterr().err.splitlines()[-1] == f"encode clips: {total}/{total}"
