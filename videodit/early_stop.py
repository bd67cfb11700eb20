"""Signals of schedulers while the main thread cannot listen: in torch's import, or waiting for other ranks in C++."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

STOPS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM
"""What job scripts requeue on, whatever the signal; SIGUSR1 by itself would end the process with another one."""

_hear: Callable[[int], None] | None = None


def end_at_once() -> None:
    """From here on each of STOPS ends this process with EXIT_CODE, as long as nothing else listens for it.

    In a thread, for the main one runs no signal handlers while it waits for other ranks in C++. Call in the main one.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # what a child is told is not for this process
    for number in STOPS:
        signal.signal(number, _leave_it_to_the_thread)

    def watch() -> None:
        while True:
            number = os.read(told, 1)[0]
            if number not in STOPS:
                continue
            if hear := _hear:
                hear(number)
            elif signal.getsignal(number) is _leave_it_to_the_thread:
                os._exit(EXIT_CODE)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def hearing(hear: Callable[[int], None]) -> Iterator[None]:
    """While inside, and if `end_at_once` was called, the thread tells each of STOPS to `hear` and does nothing else."""
    global _hear
    _hear = hear
    try:
        yield
    finally:
        _hear = None


def _leave_it_to_the_thread(*_: object) -> None:
    pass
