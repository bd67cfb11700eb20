"""train.log: lines of the run, its warnings and its end, without taking anything from the console."""

import logging
import re
import warnings
from pathlib import Path

import pytest
import torch

from videodit.errors import UserError
from videodit.parallel.mesh import World
from videodit.progress import PLAIN_INTERVAL_S, Progress
from videodit.training.run_log import RunLog

ALONE = World(0, 1, 0, torch.device("cpu"))
OTHER = World(3, 4, 3, torch.device("cpu"))


def lines(path: Path) -> list[str]:
    """Without their times."""
    text = path.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ", line) for line in text)
    return [line[24:] for line in text]


def test_warnings_of_all_ranks_are_kept_and_still_shown(tmp_path: Path) -> None:
    shown = warnings.showwarning
    for world in (ALONE, OTHER):
        with pytest.warns(UserWarning, match="low disk"), RunLog.open(tmp_path / "train.log", world) as log:
            log.info("from step 0")
            warnings.warn("low disk", stacklevel=1)
            logging.getLogger("videodit.data").warning("sample %s is left out", "a")
            logging.getLogger("videodit.data").info("not this")
    logging.getLogger("videodit.data").warning("after it")
    warning = "WARNING low disk (UserWarning at test_run_log.py:"
    kept = [re.sub(r":\d+\)$", ":", line) for line in lines(tmp_path / "train.log")]
    assert kept == [
        "INFO from step 0",
        warning,
        "WARNING sample a is left out",
        "INFO done",
        f"rank 3 {warning}",
        "rank 3 WARNING sample a is left out",
    ]
    assert warnings.showwarning is shown


@pytest.mark.parametrize(
    ("error", "last"),
    [
        (SystemExit(143), "INFO stopped with exit code 143"),
        (KeyboardInterrupt(), "INFO interrupted"),
        (UserError("no room: free some"), "ERROR no room: free some"),
    ],
)
def test_it_says_how_a_run_ended(tmp_path: Path, error: BaseException, last: str) -> None:
    with pytest.raises(type(error)), RunLog.open(tmp_path / "train.log", ALONE):
        raise error
    assert lines(tmp_path / "train.log") == [last]


def test_a_bug_leaves_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLog.open(tmp_path / "train.log", OTHER):
        raise ZeroDivisionError("a bug")
    text = (tmp_path / "train.log").read_text()
    assert "rank 3 ERROR Traceback" in text and text.endswith("ZeroDivisionError: a bug\n")


def test_a_log_that_cannot_be_written_costs_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "train.log").mkdir()
    with RunLog.open(tmp_path / "train.log", ALONE) as log:
        log.info("lost")
    with RunLog.open(Path("/dev/full"), ALONE) as log:
        log.info("lost")
    assert capsys.readouterr().err == ""


def test_progress_notes_its_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    now, noted = 0.0, []
    with Progress("train dit", 10, clock=lambda: now, note=noted.append) as progress:
        for done in range(1, 11):
            progress.update(done, f"loss {done}")
            now += PLAIN_INTERVAL_S / 4
    assert noted == capsys.readouterr().err.splitlines() and noted[-1] == "train dit: 10/10 loss 10"
