"""What a user sees of a run: the live line of a terminal, and the same figures in train.log."""

import fcntl
import os
import pty
import re
import struct
import termios
import threading
from pathlib import Path

import pytest

from tests.training.test_trainers import STEPS, dit_config
from videodit.training.dit_trainer import train_dit

FIGURES = r"loss \d+\.\d{4}  \d+\.\d{3} s/step  data wait \d+%"


def test_a_terminal_shows_step_time_left_loss_speed_and_wait(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 40, 160, 0, 0))  # tcsetwinsize needs Python 3.11
    drawn: list[bytes] = []

    def draw() -> None:
        try:
            while part := os.read(ours, 4096):
                drawn.append(part)
        except OSError:  # how Linux says that nobody has the other end any more
            pass

    reader = threading.Thread(target=draw)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    with os.fdopen(theirs, "w") as terminal, monkeypatch.context() as redirected:
        redirected.setattr("sys.stderr", terminal)
        train_dit(dit_config(tmp_path / "run", latents))
    reader.join()
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", b"".join(drawn).decode())
    shown = [line for line in re.split(r"[\r\n]+", text) if line.startswith("train run ")]
    assert shown
    assert re.fullmatch(rf"train run .*{STEPS}/{STEPS} +\d:\d\d:\d\d +{FIGURES} *", shown[-1]), shown[-1]
    log = (tmp_path / "run/train.log").read_text()
    assert re.search(rf"train run: {STEPS}/{STEPS} {FIGURES}$", log, re.MULTILINE), log
