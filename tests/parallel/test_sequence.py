"""Sequence parallelism on 2 and 4 gloo ranks: the same numbers as one process, and no more traffic than promised."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel.sequence_cases import CASES

ROOT = Path(__file__).parents[2]
EXTRA = [
    "two_switches_a_pair",
    "full_attention_moves_heads",
    "local_layers_work_on_their_own_frames",
    "exchange_is_its_own_inverse",
    "layouts_are_values",
]


def report_of(ranks: int, path: Path, *which: str) -> dict[str, str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.parallel.sequence_cases", str(path), *which]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, str] = json.loads(path.read_text())
    return report


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, str]]:
    folder = tmp_path_factory.mktemp("sequence")
    return {ranks: report_of(ranks, folder / f"{ranks}.json") for ranks in (2, 4)}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", [*CASES, *EXTRA])
def test_on_ranks(name: str, ranks: int, reports: dict[int, dict[str, str]]) -> None:
    assert not reports[ranks][name], reports[ranks][name]


@pytest.mark.slow
def test_compiled_on_two_ranks(tmp_path: Path) -> None:
    report = report_of(2, tmp_path / "report.json", "compiled")
    assert report == {"compiled_blocks_are_whole_graphs": ""}
