"""Kills at random moments, and stops: real processes that end as if nobody had disturbed them. Linux only."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.cases import CASES

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted by a call that only Linux has")


def run_module(name: str, *arguments: str | Path, limit_s: float) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork of a process with threads may hang
    command = [sys.executable, "-m", f"tests.chaos.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("chaos")
    run_module("cases", out, limit_s=600)
    found: dict[str, str] = json.loads((out / "report.json").read_text())
    return found


@pytest.mark.parametrize("name", list(CASES))
def test_ends_as_it_should(report: dict[str, str], name: str) -> None:
    assert not report[name], report[name]


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    """The command lines as users type them: one process, and two ranks under torchrun."""
    long = ["--real", "--kills=50", "--steps=30"]
    run_module("harness", tmp_path / "out", *long, limit_s=5400)
    figures = json.loads((tmp_path / "out/report.json").read_text())
    assert [figures[name]["kills"] for name in ("1 ranks", "2 ranks")] == [50, 50]
    for name, hit in ((name, figures[name]["hit"]) for name in figures):
        assert hit.get("writing a checkpoint", 0) > 0 and hit.get("starting", 0) > 0, (name, hit)
