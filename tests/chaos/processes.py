"""Real processes of a training run that are killed with all that they have started. Linux only.

The process that uses this adopts every orphan below it, so that none is overlooked; it must have no other children.
"""

import contextlib
import ctypes
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests import tiny

_PR_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """From here on a process below this one whose parent dies becomes this one's child."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[int]:
    """Process ids of all that this one has started, and they."""
    found, pending = [], [os.getpid()]
    while pending:
        pid = pending.pop()
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                children = [int(child) for child in (task / "children").read_text().split()]
                found += children
                pending += children
    return found


def shared_memory() -> set[str]:
    """Names of what lies in shared memory; of this process' runs alone where it has a /dev/shm of its own."""
    return {path.name for path in Path("/dev/shm").iterdir()}


def command_of(pid: int) -> bytes:
    """Command line of a process, b"" if it has ended."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def wait_for_no_descendants(limit_s: float = 60.0) -> None:
    """Fails if a process of a run that has ended is still there after a while."""
    deadline = time.monotonic() + limit_s
    while left := descendants():
        with contextlib.suppress(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        assert time.monotonic() < deadline, [command_of(pid) for pid in left]
        time.sleep(0.005)


class Job:
    """A command `videodit …` on one or more ranks.

    Args:
        arguments: what comes after videodit.
        ranks: of the run.
        log: file that gets what they print.
        fork: ranks are forks of this process, which has imported all that takes seconds; else the command line as a
            user types it, under torchrun if there is more than one rank.
    """

    def __init__(self, arguments: Sequence[str], ranks: int, log: Path, *, fork: bool) -> None:
        self._log, self._ranks, self._fork_ranks = log, ranks, fork
        if fork:
            port = str(_free_port())
            launcher = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            self.pids = [
                self._fork(arguments, {"RANK": str(r), "LOCAL_RANK": str(r), **launcher} if ranks > 1 else {})
                for r in range(ranks)
            ]
        else:
            with log.open("a") as output:
                # Never waited for by subprocess: that is done here, for all children alike.
                self.pids = [subprocess.Popen(tiny.command(arguments, ranks), stdout=output, stderr=output).pid]
        self._codes: dict[int, int] = {}

    def _fork(self, arguments: Sequence[str], environment: dict[str, str]) -> int:
        pid = os.fork()
        if pid:
            return pid
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ.update(environment)
        sys.argv = ["videodit", *arguments]
        try:
            from videodit.cli import entry

            entry()
        finally:
            os._exit(1)  # of what went wrong the log has the traceback

    def kill(self) -> int:
        """Kills it with all that it has started, at once; returns the number of processes."""
        killed = 0
        while pids := descendants():
            killed += len(pids)
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(-1, 0)
        return killed

    def kill_one(self, rng: random.Random) -> bool:
        """Kills one of its processes, but not the launcher that looks after the others; False if there is none yet."""
        pids = descendants() if self._fork_ranks or self._ranks == 1 else sorted(set(descendants()) - set(self.pids))
        if pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rng.choice(pids), signal.SIGKILL)
        return bool(pids)

    def codes(self) -> list[int] | None:
        """Exit codes of the ranks, or of torchrun; None while one is there."""
        for pid in set(self.pids) - self._codes.keys():
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self._codes[pid] = os.waitstatus_to_exitcode(status)
                # What torchrun does: a rank may wait for one that never came up. One that was stopped has company.
                if self._codes[pid] not in (0, 128 + signal.SIGTERM):
                    for other in set(self.pids) - self._codes.keys():
                        os.kill(other, signal.SIGTERM)
        return [self._codes[pid] for pid in self.pids] if len(self._codes) == len(self.pids) else None

    def wait(self, limit_s: float) -> list[int]:
        """The exit codes; fails if they are not there in time."""
        deadline = time.monotonic() + limit_s
        while (codes := self.codes()) is None:
            assert time.monotonic() < deadline, f"it did not end; {self._log.read_text()[-3000:]}"
            time.sleep(0.005)
        return codes


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
