"""Kills at random moments, and stops: real processes that end as if nobody had disturbed them. Linux only."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.cases import CASES, SLOW_CASES

ROOT = Path(__file__).parents[2]
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="orphans are adopted by a call that only Linux has")


def own_shared_memory() -> list[str]:
    """Start of a command line that gives it a /dev/shm of its own: what is left there is its; [] if that cannot be."""
    setup = [*UNSHARE, "sh", "-ec", 'mount -t tmpfs tmpfs /dev/shm; exec "$@"', "sh"]
    allowed = shutil.which("unshare") and subprocess.run([*setup, "true"], capture_output=True).returncode == 0
    return setup if allowed else []


def run_module(name: str, *arguments: str | Path, limit_s: float) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork of a process with threads may hang
    command = [*own_shared_memory(), sys.executable, "-m", f"tests.chaos.{name}", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def reported(out: Path, *arguments: str) -> dict[str, str]:
    run_module("cases", out, *arguments, limit_s=900)
    found: dict[str, str] = json.loads((out / "report.json").read_text())
    return found


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return reported(tmp_path_factory.mktemp("chaos"))


@pytest.fixture(scope="module")
def slow_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return reported(tmp_path_factory.mktemp("slow_chaos"), "slow")


@pytest.mark.parametrize("name", list(CASES))
def test_ends_as_it_should(report: dict[str, str], name: str) -> None:
    assert not report[name], report[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SLOW_CASES))
def test_ends_as_it_should_too(slow_report: dict[str, str], name: str) -> None:
    assert not slow_report[name], slow_report[name]


@pytest.mark.slow
def test_a_hundred_kills(tmp_path: Path) -> None:
    """The command lines as users type them: one process, and two ranks under torchrun."""
    long = ["--real", "--kills=50", "--steps=30"]
    run_module("harness", tmp_path / "out", *long, limit_s=5400)
    figures = json.loads((tmp_path / "out/report.json").read_text())
    assert [figures[name]["kills"] for name in ("1 ranks", "2 ranks")] == [50, 50]
    for name, hit in ((name, figures[name]["hit"]) for name in figures):
        assert hit.get("writing a checkpoint", 0) > 0 and hit.get("starting", 0) > 0, (name, hit)
