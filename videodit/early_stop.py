"""Signals of schedulers before a run can listen for them: while torch is imported and the ranks look for each other."""

import os
import signal
import threading

STOPS = (signal.SIGTERM, signal.SIGUSR1)
EXIT_CODE = 128 + signal.SIGTERM
"""What job scripts requeue on, whatever the signal; SIGUSR1 by itself would end the process with another one."""


def end_at_once() -> None:
    """From here on each of STOPS ends this process with EXIT_CODE, as long as nothing else listens for it.

    In a thread, for the main one runs no signal handlers while it waits for other ranks in C++. Call in the main one.
    """
    told, tell = os.pipe()
    os.set_blocking(tell, False)
    signal.set_wakeup_fd(tell)
    for number in STOPS:
        signal.signal(number, _leave_it_to_the_thread)

    def watch() -> None:
        while True:
            number = os.read(told, 1)[0]
            if number in STOPS and signal.getsignal(number) is _leave_it_to_the_thread:
                os._exit(EXIT_CODE)

    threading.Thread(target=watch, daemon=True).start()


def _leave_it_to_the_thread(*_: object) -> None:
    pass
