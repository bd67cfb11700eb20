"""torchrun for schedulers: SIGTERM or SIGUSR1 reaches the trainers with no time limit, and the exit code is theirs.

    python tools/launch.py --nnodes 2 --nproc-per-node gpu … -m videodit train dit …     (the options are torchrun's)

torchrun itself ends with 1 whatever the trainers ended with, so that a scheduler cannot tell a run that stopped with a
checkpoint (143) from a wrong config (2) and a crash (1); it kills them 30 s after a SIGTERM, which may be before the
step and its checkpoint are done; and its --max-restarts would start a stopped run and a wrong config again, not only a
crash. Linux only; needs torchrun's --signals-to-handle, which torch 2.8 has not.
"""

import os
import signal
import sys
import threading
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api
from torch.distributed.run import parse_args, run

STOPPED, USER_ERROR = 128 + signal.SIGTERM, 2
STOPS = (signal.SIGTERM, signal.SIGUSR1)

_told_to_stop = threading.Event()


class Agent(LocalElasticAgent):
    """Starts the ranks again after a crash only: not after a stop, and not for what the user has to fix."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.is_failed():
            codes = {failure.exitcode for failure in result.failures.values()}
            if _told_to_stop.is_set() or codes <= {STOPPED, -signal.SIGTERM, USER_ERROR}:
                self._remaining_restarts = 0
        return result


def launch(argv: list[str]) -> int:
    """Runs torchrun's agent in this process.

    Args:
        argv: torchrun's arguments.
    Returns:
        0, or the exit code of the rank of this node that failed first; 128 + the number of the signal that ended it.
    """
    _watch_for_stop()
    api.LocalElasticAgent = Agent  # torchrun has no other way to say what is started again
    try:
        run(parse_args(["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT", *argv]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        if code not in (STOPPED, USER_ERROR):  # else the trainer has said what there is to say
            print(error, file=sys.stderr)
        return code if code > 0 else 128 - code
    except SignalException as error:
        return 128 + error.sigval
    return 0


def _watch_for_stop() -> None:
    """Passes each SIGTERM or SIGUSR1 on to the ranks, as SIGTERM; they end by themselves. Without ranks yet, ends here.

    In a thread, for the main one runs no signal handlers while it waits for the other nodes in C++.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in STOPS:
        signal.signal(number, lambda *_: None)

    def watch() -> None:
        while True:
            if os.read(told, 1)[0] not in STOPS:
                continue  # Ctrl-C and others are torchrun's
            _told_to_stop.set()
            ranks = _children()
            if not ranks:
                os._exit(STOPPED)
            for pid in ranks:
                try:
                    os.kill(pid, signal.SIGTERM)
                except ProcessLookupError:
                    pass  # it has just ended

    threading.Thread(target=watch, daemon=True).start()


def _children() -> list[int]:
    # A child is listed under the thread that started it, and a thread may end while we look.
    found = []
    for task in Path("/proc/self/task").iterdir():
        try:
            found += [int(pid) for pid in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
