"""Signals that ask a run to stop: heard on any rank, honoured by all of them between two steps, or before the first."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from videodit.early_stop import EXIT_CODE, STOPS, hearing
from videodit.parallel.mesh import World, any_rank
from videodit.parallel.watch import hold


class StopRequest:
    """Whether this rank was told to stop, and all ranks' agreement on it.

    Args:
        world: this process' place; rank 0 tells the user that Ctrl-C was heard.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._number = 0
        self._has_begun = False

    def __bool__(self) -> bool:
        return bool(self._number)

    def on_any_rank(self) -> bool:
        """True on every rank if one was told to stop. Call on every rank."""
        return any_rank(bool(self))

    def work_has_begun(self) -> None:
        """From here on there is something to save: a stop waits for the end of the running step.

        Before, it ends all ranks wherever they are: a first compile may take longer than a scheduler waits.
        Call on every rank, any number of times.
        """
        if not self._has_begun:
            hold()
            self._has_begun = True

    @property
    def exit_code(self) -> int:
        """130 after Ctrl-C; else 143, SIGTERM's, which job scripts requeue on, whatever the signal and the rank."""
        return 128 + signal.SIGINT if self._number == signal.SIGINT else EXIT_CODE

    def asked(self) -> int:
        """The exit code with which this rank was asked to end, 0 if it was not."""
        return self.exit_code if self else 0

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Has the handlers in place while inside.

        Raises:
            SystemExit: in a run of one rank, when it is told to stop before `work_has_begun`; more leave together, by
                `watching`.
            KeyboardInterrupt: at the second Ctrl-C, and in a run of one rank at the first before `work_has_begun`.
        """
        numbers = [*STOPS]
        # A shell that starts a job in the background has it ignore Ctrl-C: leave that as it is.
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            numbers.append(signal.SIGINT)
        with hearing(self._note):
            before = {number: signal.signal(number, self._hear) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

    def _note(self, number: int) -> None:
        self._number = number

    def _hear(self, number: int, _: object) -> None:
        again = number == self._number == signal.SIGINT
        self._note(number)
        alone = self._world.size == 1 and not self._has_begun
        if number == signal.SIGINT:
            if again or alone:
                raise KeyboardInterrupt
            if self._world.is_main and self._has_begun:  # not by print, which may be at work already
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again stops at once\n")
        elif alone:
            raise SystemExit(self.exit_code)
