"""Progress of long work: one live line on a terminal, a plain line now and then elsewhere. Goes to stderr."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Report = Callable[[int, int], None]  # (done, in all)
PLAIN_INTERVAL_S = 15.0


def counted(number: int, noun: str) -> str:
    """A number of things: "1 clip", "14 clips"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """A time for people, in the unit that suits it: "90 s", "25 min", "13.5 h", "6.2 days"."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    if seconds < 10 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 96 * 3600 else f"{seconds / 86400:.1f} days"


class Progress:
    """`with Progress("train dit", max_steps) as progress: progress.update(step, "loss 0.31")`.

    Args:
        label: what is done, with its unit, for example "encode clips".
        total: units in all; 0 if unknown until an update says it.
        enabled: False shows nothing (ranks other than 0).
        clock: seconds from any start.
        note: takes the plain lines too, on a terminal as elsewhere; for a log file.
    """

    def __init__(
        self,
        label: str,
        total: int = 0,
        enabled: bool = True,
        clock: Callable[[], float] = time.monotonic,
        note: Callable[[str], object] | None = None,
    ) -> None:
        self.label, self.total, self.enabled = label, total, enabled
        self._console = Console(stderr=True)
        self._live: RichProgress | None = None
        self._clock, self._note = clock, note
        self._started = self._last_line = self._last_update = clock()
        self._first_done: int | None = None
        self._done = 0

    def __enter__(self) -> "Progress":
        # FORCE_COLOR makes no terminal of a log file, and TERM=dumb would be shown nothing before the end.
        if self.enabled and self._console.is_interactive and self._console.file.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._live = RichProgress(*columns, TextColumn("{task.fields[text]}"), console=self._console)
            self._task = self._live.add_task(self.label, total=self.total or None, text="")
            self._live.start()
        return self

    def update(self, done: int, text: str = "", total: int | None = None) -> None:
        """Shows that `done` units are done, with figures beside it.

        Fewer than before, or another total, are a new stage, whose rate is its own.
        """
        if self._first_done is None:
            self._first_done, self._started = done, self._clock()
        elif done < self._done or total not in (None, self.total):
            self._first_done, self._started = 0, self._last_update
        self.total = total or self.total
        self._done, self._last_update = done, self._clock()
        if self._live is not None:
            self._live.update(self._task, completed=done, total=self.total or None, text=text)
        if self.enabled and (done == self.total or self._clock() - self._last_line >= PLAIN_INTERVAL_S):
            self._last_line = self._clock()
            left = self._left(done)
            line = f"{self.label}: {done}/{self.total}{left}{',' if left and text else ''} {text}".rstrip()
            if self._live is None:
                print(line, file=sys.stderr, flush=True)
            if self._note is not None:
                self._note(line)

    def say(self, text: str) -> None:
        """One line, on a terminal too."""
        if self.enabled:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)

    def _left(self, done: int) -> str:
        advanced = done - (self._first_done or 0)
        if not advanced or done >= self.total:
            return ""
        return f", {duration((self.total - done) * (self._clock() - self._started) / advanced)} left"

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()


@contextmanager
def show_progress(label: str, enabled: bool = True) -> Iterator[Report]:
    """Gives a function of (done, in all), to be called as often as the work likes."""
    with Progress(label, enabled=enabled) as progress:
        yield lambda done, total: progress.update(done, total=total)
