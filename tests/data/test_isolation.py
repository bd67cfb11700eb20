"""Isolation: crashes, hangs and exceptions cost their item; order and the other results are as without them."""

import sys
from pathlib import Path

import pytest

from videodit.data.isolation import Failure, run_isolated
from videodit.errors import UserError

WORK = """
import os, pathlib, signal, threading, time
from videodit.errors import UserError

def work(item, beat):
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "exit":
        os._exit(7)
    if item == "hang":
        threading.Event().wait()
    if item == "raise":
        raise ValueError("two\\nlines")
    if item == "memory":
        bytearray(1 << 36)
    if item == "library":
        raise ImportError("decoder.so: failed to map segment from shared object")
    if item == "user":
        raise UserError("disk full")
    if item[0] == "!":
        with open(item[1:], "a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    if item == "long":
        for _ in range(600):
            time.sleep(0.1)
            beat()
    if item[0] == "/":  # marks that it is at work; of three kinds one is killed and one hangs, the first time
        mark = pathlib.Path(item)
        others = len(list(mark.parent.glob("*.now")))
        first = not mark.exists()
        mark.touch()
        if first and mark.name.startswith("killed"):
            os.kill(os.getpid(), signal.SIGKILL)
        if first and mark.name.startswith("hangs"):
            threading.Event().wait()
        mark.with_suffix(".now").touch()
        time.sleep(0.2)
        mark.with_suffix(".now").unlink()
        return mark.name if first else f"{mark.name}, {others} beside it"
    beat()
    return item * 2
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A function that worker processes can import, wherever pytest put this file."""
    (tmp_path / "isolation_work.py").write_text(WORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "isolation_work", raising=False)
    import isolation_work

    return isolation_work.work


def test_faults_cost_their_item(work) -> None:
    chunks = [["a", "crash", "b", "raise"], [], ["exit", "c"], ["memory", "library", "d"], ["hang"], ["e"]]
    chunks.append(["long", "f"])
    limits = {"stall_limit_s": 3, "time_limit_s": 4, "max_memory_gb": 16}
    results = list(run_isolated(work, chunks, workers=2, **limits))
    assert results == [
        "aa",
        Failure("decoding crashed: SIGSEGV"),
        "bb",
        Failure("ValueError: two"),
        Failure("decoding ended with exit code 7"),
        "cc",
        Failure("needs more than 16 GB of memory"),
        Failure("needs more than 16 GB of memory"),
        "dd",
        Failure("no progress for 3 s"),
        "ee",
        Failure("took longer than 4 s"),
        "ff",
    ]


def test_an_item_killed_or_hung_by_the_machine_is_tried_again_alone(work, tmp_path: Path) -> None:
    kinds = ["plain1", "killed1", "hangs1", "plain2"]
    chunks = [[f"{tmp_path}/{name}" for name in kinds[i : i + 2]] for i in (0, 2)]
    results = list(run_isolated(work, chunks, workers=2, stall_limit_s=3))
    assert results == ["plain1", "killed1, 0 beside it", "hangs1, 0 beside it", "plain2"]


@pytest.mark.slow
def test_second_tries_end_where_they_are_in_vain(work, tmp_path: Path) -> None:
    """Three of them, then items are believed to be at fault at once."""
    marks = [tmp_path / f"{number}" for number in range(4)]
    items = [f"!{mark}" for mark in marks]
    results = list(run_isolated(work, [items], workers=1, stall_limit_s=60))
    assert results == [Failure("decoding crashed: SIGKILL")] * 4
    assert [len(mark.read_text()) for mark in marks] == [2, 2, 2, 1]


def test_a_users_mistake_ends_the_run(work) -> None:
    with pytest.raises(UserError, match="disk full"):
        list(run_isolated(work, [["a", "user", "b"]], workers=1, stall_limit_s=30))


def test_no_items_no_processes(work) -> None:
    assert list(run_isolated(work, [[]], workers=2, stall_limit_s=30)) == []
