"""Runs a function on many items in processes that may crash or hang: it costs the item, never the run."""

import multiprocessing
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

from videodit.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
Beat = Callable[[], None]

_START_LIMIT_S = 300.0  # to import what the function needs, on a machine that is busy
_BEAT_EVERY_S = 0.5
_WINDOW = 4096  # items begun ahead of the one waited for: a long film must not stop the others
_OPENCV_NO_MEMORY = -4
_OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGBUS)  # from a full memory, an operator, a lost disk
_PATIENCE = 3  # second tries in a row that are in vain before none is made: it's the items then, not the machine


@dataclass(frozen=True)
class Failure:
    """In place of a result: the item's process crashed, hung or raised."""

    reason: str
    """One line."""


def run_isolated(
    function: Callable[[Item, Beat], Result],
    chunks: Sequence[Sequence[Item]],
    *,
    workers: int,
    stall_limit_s: float,
    time_limit_s: float = 0,
    max_memory_gb: float = 0,
) -> Iterator[Result | Failure]:
    """Applies a function to every item, in worker processes.

    An item whose process was killed from outside or stalled gets a second try, with no other at work beside it: the
    machine may have been short of memory, or a disk away for a while.

    Args:
        function: importable by name; called with (item, beat). It must call beat() at least every `stall_limit_s`
            seconds of work. UserErrors that it raises end the run; any other exception is the item's Failure.
        chunks: items by the chunk; a chunk goes to one process at a time.
        workers: processes.
        stall_limit_s: seconds without a beat or a result until an item's process is killed.
        time_limit_s: seconds that an item may take altogether, 0 for no limit.
        max_memory_gb: address space a process may have, 0 for no limit.
    Yields:
        Results or Failures, one an item, in the items' order whatever the timing.
    Raises:
        UserError: as raised by the function.
        RuntimeError: if a worker process does not start.
    """
    pending = deque(deque(chunk) for chunk in _numbered(chunks))
    total = sum(len(chunk) for chunk in pending)
    again: deque[tuple[int, Item]] = deque()
    alone: int | None = None  # the item of a second try
    in_vain = 0
    done: dict[int, Any] = {}
    next_up = 0
    crew: list[_Worker[Item]] = []
    try:
        while next_up < total:
            busy = sum(not worker.idle for worker in crew)
            while len(crew) < min(workers, len(pending) + len(again) + busy):
                crew.append(_Worker(function, stall_limit_s, time_limit_s, max_memory_gb))
            for worker in crew:
                ahead = pending[0][0][0] - next_up if pending else 0
                if not (worker.ready and worker.idle) or alone is not None:
                    continue
                if again and not busy:
                    alone = again[0][0]
                    worker.assign(deque([again.popleft()]))
                elif not again and pending and (busy == 0 or ahead < _WINDOW):
                    worker.assign(pending.popleft())
                    busy += 1
            _wait(crew)
            for worker in list(crew):
                done.update(worker.collect())
                if worker.dead:
                    crew.remove(worker)
                    if worker.failed:
                        number, item = worker.failed
                        in_vain += number == alone
                        if worker.may_try_again and number != alone and in_vain < _PATIENCE:
                            again.append((number, item))
                        else:
                            done[number] = Failure(worker.reason)
                    if worker.items:  # the rest of its chunk
                        pending.appendleft(worker.items)
            if alone in done:
                in_vain = 0 if not isinstance(done[alone], Failure) else in_vain
                alone = None
            while next_up in done:
                yield done.pop(next_up)
                next_up += 1
    finally:
        for worker in crew:
            worker.kill()


def _numbered(chunks: Sequence[Sequence[Item]]) -> Iterator[list[tuple[int, Item]]]:
    number = 0
    for chunk in chunks:
        if chunk:
            yield list(enumerate(chunk, number))
        number += len(chunk)


def _wait(crew: "list[_Worker[Any]]") -> None:
    timeout = min(worker.deadline for worker in crew) - time.monotonic()
    wait([worker.pipe for worker in crew], timeout=min(max(0.0, timeout), 60.0))


class _Worker(Generic[Item]):
    """A process and the items it has still to do; the first one is being done."""

    def __init__(
        self,
        function: Callable[[Item, Beat], Any],
        stall_limit_s: float,
        time_limit_s: float,
        max_memory_gb: float,
    ) -> None:
        self.items: deque[tuple[int, Item]] = deque()
        self.ready = False
        self.dead = False
        self.failed: tuple[int, Item] | None = None  # the item that it died of
        self.reason, self.may_try_again = "", False
        self._stall_limit_s, self._time_limit_s = stall_limit_s, time_limit_s or float("inf")
        self._begun = 0.0  # when the first item was
        self.deadline = time.monotonic() + _START_LIMIT_S
        context = multiprocessing.get_context("spawn")  # a fork would inherit locks held by other threads
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(function, theirs, max_memory_gb), daemon=True)
        self._process.start()
        theirs.close()

    @property
    def idle(self) -> bool:
        return not self.items

    def assign(self, items: deque[tuple[int, Item]]) -> None:
        self.items = items
        self._begun = time.monotonic()
        self._extend()
        try:
            self.pipe.send(list(items))
        except OSError:
            pass  # it died between two chunks: collect sees it

    def collect(self) -> dict[int, Any]:
        """What came in since the last call; notices death and stalls."""
        results: dict[int, Any] = {}
        try:
            while self.pipe.poll():
                kind, value = self.pipe.recv()
                if kind == "error":
                    raise UserError(value)
                self.ready = True
                if kind == "result":
                    results[self.items.popleft()[0]] = value
                    self._begun = time.monotonic()
                self._extend()
        except (EOFError, OSError):
            self._process.join()
            code = self._process.exitcode
            self._bury(_describe_exit(code), may_try_again=code in [-number for number in _OUTSIDE])
            return results
        if time.monotonic() > self.deadline:
            if self.ready and time.monotonic() > self._begun + self._time_limit_s:
                self._bury(f"took longer than {self._time_limit_s:g} s", may_try_again=False)
            else:
                self._bury(f"no progress for {self._stall_limit_s:g} s", may_try_again=True)
        return results

    def _extend(self) -> None:
        """Sets the deadline, after a sign of life."""
        limit = min(time.monotonic() + self._stall_limit_s, self._begun + self._time_limit_s)
        self.deadline = limit if self.items else float("inf")

    def kill(self) -> None:
        self._process.kill()
        self._process.join()
        self.pipe.close()

    def _bury(self, reason: str, may_try_again: bool) -> None:
        self.dead = True
        self.kill()
        if not self.ready:
            raise RuntimeError(f"a worker process did not start: {reason}")
        self.reason, self.may_try_again = reason, may_try_again
        if self.items:
            self.failed = self.items.popleft()


def _describe_exit(code: int | None) -> str:
    if code is not None and code < 0:
        return f"decoding crashed: {signal.Signals(-code).name}"
    return f"decoding ended with exit code {code}"


def _is_lack_of_memory(error: Exception) -> bool:
    """MemoryError, as the loader of libraries and as OpenCV (StsNoMem; the module may not be loaded) call it too."""
    of_loader = isinstance(error, ImportError) and "failed to map segment" in str(error)
    return isinstance(error, MemoryError) or of_loader or getattr(error, "code", None) == _OPENCV_NO_MEMORY


def _work(function: Callable[[Any, Beat], Any], pipe: Connection, max_memory_gb: float) -> None:
    """The worker process: chunks come in, results go out one by one; it ends when the pipe does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    if max_memory_gb > 0:
        limit = int(max_memory_gb * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last > _BEAT_EVERY_S:
            last = time.monotonic()
            pipe.send(("beat", None))

    try:
        pipe.send(("ready", None))
        while True:
            for _, item in pipe.recv():
                try:
                    message: tuple[str, Any] = "result", function(item, beat)
                except UserError as error:
                    message = "error", str(error)
                except Exception as error:
                    reason = f"{type(error).__name__}: {error}".splitlines()[0]
                    if _is_lack_of_memory(error):
                        reason = f"needs more than {max_memory_gb:g} GB of memory"
                    message = "result", Failure(reason)
                pipe.send(message)
                last = time.monotonic()
    except (EOFError, OSError):
        os._exit(0)  # the parent has gone or has all it wanted
