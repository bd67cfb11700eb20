"""The doctor: it names what is there, and refuses only for what nothing works without."""

from pathlib import Path

import pytest
import torch

from videodit.doctor import GIB, _amount, examine, run_doctor
from videodit.errors import UserError


def test_it_reports_the_machine_it_runs_on(tmp_path: Path) -> None:
    findings = {finding.subject: finding for finding in examine(tmp_path / "not" / "there" / "yet")}
    assert {"python", "cores", "device", "bf16", "memory", "disk", "C++ compiler"} <= set(findings)
    assert ("CPU" in findings["device"].found) == (not torch.cuda.is_available())
    for finding in findings.values():
        assert finding.found
        assert finding.verdict == "ok" or finding.advice or finding.found.startswith("unknown")


def test_little_room_gets_advice() -> None:
    assert _amount("disk", 9 * GIB, 5, "clean up").verdict == "ok"
    assert _amount("disk", GIB, 5, "clean up").advice == "clean up"
    assert _amount("memory", None, 5, "").found == "unknown"


def test_the_verdict_is_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing = [finding for finding in examine(tmp_path) if finding.verdict == "missing"]
    if missing:
        with pytest.raises(UserError, match=missing[0].subject.replace("+", "\\+")):
            run_doctor(tmp_path)
    else:
        run_doctor(tmp_path)
    shown = capsys.readouterr().out
    assert "python" in shown and "opencv-python-headless" in shown and "videodit 0" not in shown
