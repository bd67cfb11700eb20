"""Isolation: crashes, hangs and exceptions cost their item; order and the other results are as without them."""

import sys
from pathlib import Path

import pytest

from videodit.data.isolation import Failure, run_isolated
from videodit.errors import UserError

WORK = """
import os, signal, threading
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
    if item == "user":
        raise UserError("disk full")
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
    chunks = [["a", "crash", "b", "raise"], [], ["exit", "c"], ["memory", "d"], ["hang"], ["e"]]
    results = list(run_isolated(work, chunks, workers=2, stall_limit_s=5, max_memory_gb=16))
    assert results == [
        "aa",
        Failure("decoding crashed: SIGSEGV"),
        "bb",
        Failure("ValueError: two"),
        Failure("decoding ended with exit code 7"),
        "cc",
        Failure("needs more than 16 GB of memory"),
        "dd",
        Failure("no progress for 5 s"),
        "ee",
    ]


def test_a_users_mistake_ends_the_run(work) -> None:
    with pytest.raises(UserError, match="disk full"):
        list(run_isolated(work, [["a", "user", "b"]], workers=1, stall_limit_s=30))


def test_no_items_no_processes(work) -> None:
    assert list(run_isolated(work, [[]], workers=2, stall_limit_s=30)) == []
