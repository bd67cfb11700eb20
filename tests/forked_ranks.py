"""Ranks without a launcher, forked from one process that has imported everything: `python -m tests.forked_ranks`.

torch and DeepSpeed take seconds to import, so that is done once. Each line of stdin is a rank to start:
{"argv": arguments of videodit, "env": what a launcher says, "namespace": file of its network or "", "out": folder}.
OUT/pid is there once it runs, OUT/code once it has ended; OUT/err is its stderr. All end with this process.

`Ranks` and `Rank` are the tests' side of it.
"""

import ctypes
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER, CLONE_NEWNET = 1, 36, 0x40000000
LIMIT_S = 120.0


class Rank:
    """A rank that was started."""

    def __init__(self, out: Path) -> None:
        self._out = out

    @property
    def pid(self) -> int:
        return int((self._out / "pid").read_text())

    @property
    def stderr(self) -> str:
        return (self._out / "err").read_text()

    @property
    def lines(self) -> list[str]:
        """The errors that it reported."""
        return [line for line in self.stderr.splitlines() if line.startswith("error: ")]

    def wait(self) -> int:
        """Its exit code, once it has ended."""
        wait_until((self._out / "code").exists, lambda: self.stderr)
        return int((self._out / "code").read_text())

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def family(self) -> list[int]:
        """The process and its workers."""
        return [self.pid, *children(self.pid)]


class Ranks:
    """The process that forks them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0
        # As torchrun does: ranks with as many threads as there are cores each would wait for each other's.
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.forked_ranks"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1], env=environment)

    def start(
        self,
        argv: Sequence[str],
        size: int,
        address: str = "127.0.0.1",
        namespaces: Sequence[str] = (),
        *,
        absent: int = 0,
        port: int = 0,
        environment: Mapping[str, str] = MappingProxyType({}),
    ) -> list[Rank]:
        """`videodit ARGV` on all ranks, each in its network namespace if there are any: then each is a node.

        The absent ones, the last, never come.
        """
        assert self._process.stdin is not None
        port, ranks = port or free_port(), []
        for rank in range(size - absent):
            self._count += 1
            out = self._folder / str(self._count)
            out.mkdir()
            local = 0 if namespaces else rank
            env = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": local, "MASTER_ADDR": address, "MASTER_PORT": port}
            env |= environment
            job = {"argv": list(argv), "env": env, "out": str(out), "namespace": namespaces[rank] if namespaces else ""}
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            ranks.append(Rank(out))
        self._process.stdin.flush()
        return ranks

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def wait_until(condition: Callable[[], bool], report: Callable[[], str] = str) -> None:
    """Waits for something that another process does."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"it took too long; {report()}"
        time.sleep(0.02)


def steps_of(run_dir: Path) -> int:
    """Steps that a run has logged."""
    figures = run_dir / "metrics.jsonl"
    return figures.read_text().count("\n") if figures.exists() else 0


def children(pid: int) -> list[int]:
    """The processes that a process has started; none of one that has ended meanwhile."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return []
    return found


def exists(pid: int) -> bool:
    """Whether there is such a process, be it a zombie: one that has ended and whose parent does not care.

    Of ranks that were forked here and whatever they have started: those whose parent has ended are taken care of.
    """
    return Path(f"/proc/{pid}").exists()


def alive(pid: int) -> bool:
    """Whether a process still runs."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])


def _run(job: dict[str, Any]) -> None:
    """In the fork: becomes the rank."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    libc = ctypes.CDLL(None, use_errno=True)
    if job["namespace"]:
        with open(job["namespace"]) as namespace:
            if libc.setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
    os.environ.update({name: str(value) for name, value in job["env"].items()})
    out = Path(job["out"])
    err = os.open(out / "err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(err, 1)
    os.dup2(err, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    (out / "pid.tmp").write_text(str(os.getpid()))
    os.replace(out / "pid.tmp", out / "pid")
    sys.argv = ["videodit", *job["argv"]]
    from videodit.cli import entry

    try:
        entry()
    except BaseException as error:
        if not isinstance(error, SystemExit):
            sys.excepthook(type(error), error, error.__traceback__)
        sys.stderr.flush()
        os._exit(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) else 1)


def _serve() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    outs: dict[int, Path] = {}
    pending = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            chunk = os.read(0, 1 << 16)
            if not chunk:
                os._exit(0)
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                job = json.loads(line)
                pid = os.fork()
                if not pid:
                    _run(job)
                outs[pid] = Path(job["out"])
        pid = 1
        while pid:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)  # orphans too
            except ChildProcessError:
                break
            if pid in outs:
                out = outs.pop(pid)
                (out / "code.tmp").write_text(str(os.waitstatus_to_exitcode(status)))
                os.replace(out / "code.tmp", out / "code")


if __name__ == "__main__":
    import videodit.training.export  # noqa: F401  # brings torch, DeepSpeed and the trainers

    _serve()
