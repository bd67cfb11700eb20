"""Signals that ask a run to stop: heard on any rank, honoured by all of them between two steps."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from videodit.early_stop import EXIT_CODE, STOPS
from videodit.parallel.mesh import any_rank


class StopRequest:
    """Whether this rank was told to stop, and all ranks' agreement on it.

    Args:
        is_main: whether this rank tells the user that Ctrl-C was heard.
    """

    def __init__(self, is_main: bool) -> None:
        self._is_main = is_main
        self._number = 0

    def __bool__(self) -> bool:
        return bool(self._number)

    def on_any_rank(self) -> bool:
        """True on every rank if one was told to stop. Call on every rank."""
        return any_rank(bool(self))

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; else 143, SIGTERM's, which job scripts requeue on, whatever the signal and the rank."""
        return 128 + signal.SIGINT if self._number == signal.SIGINT else EXIT_CODE

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Has the handlers in place while inside.

        Raises:
            KeyboardInterrupt: at the second Ctrl-C.
        """
        numbers = [*STOPS]
        # A shell that starts a job in the background has it ignore Ctrl-C: leave that as it is.
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        wakeup = signal.set_wakeup_fd(-1)  # of `early_stop`: processes that are forked inside must not write there
        before = {number: signal.signal(number, self._hear) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)

    def _hear(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            if self._number == signal.SIGINT:
                raise KeyboardInterrupt
            if self._is_main:  # not by print, which may be at work already
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        self._number = number
