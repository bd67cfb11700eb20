"""Ends a run in which a rank is gone, frozen or stuck: one line says which, where it was and for how long.

The other ranks wait in a collective, which cannot tell. So every rank says once a second, over a connection of its own
to the process group's store, where it is; rank 0 listens to all of them and the others to rank 0, which writes down for
them what it finds. Times are by the clock of the one who listens, and only while it runs itself.
"""

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, NoReturn

import torch.distributed as dist
from torch.distributed import distributed_c10d

from videodit.errors import LostRanks
from videodit.parallel.mesh import World, gather_objects
from videodit.parallel.verdict import PERIOD_S, Beat, Judge, Verdict

_LINGER_S = 2 * PERIOD_S  # rank 0 may hold the store, from which the others have to read why they end


class _Place:
    """Where this rank is: written by the training, read by the watch."""

    def __init__(self) -> None:
        self.step, self.phase, self.entered, self.ticks = 0, "start", 0, 0
        self.held, self.holding = False, threading.Lock()


_place = _Place()


def enter(phase: str, step: int | None = None) -> None:
    """Says what this rank does from here on. Call on every rank, equally often.

    Args:
        phase: for people.
        step: optimizer step that it belongs to; None if that has not changed.
    """
    _place.phase = phase
    _place.step = _place.step if step is None else step
    _place.entered += 1


@contextlib.contextmanager
def phase(name: str, step: int | None = None) -> Iterator[None]:
    """`enter`, and back again unless there was an error. Call on every rank, equally often."""
    before = _place.phase, _place.step
    enter(name, step)
    yield
    enter(*before)


def tick(*_: object) -> None:
    """Says that this rank is not stuck; any rank, any number of times. May be a hook: what it is given is ignored."""
    _place.ticks += 1


def hold() -> None:
    """From here on no rank is ended because it, or another, was `asked`. Call on every rank."""
    with _place.holding:  # for ever, if rank 0 has decided that all end
        _place.held = True


def _nobody_asks() -> int:
    return 0


@contextlib.contextmanager
def watching(world: World, limit_s: float, asked: Callable[[], int] = _nobody_asks) -> Iterator[None]:
    """Watches over the ranks while inside. Call on every rank; a run of one rank has nobody to wait for.

    If another rank is lost, this process ends with verdict.EXIT_CODE, from wherever it is. One rank of a node says why.

    Args:
        world: this process' place.
        limit_s: how long a rank may give no sign of life, or stay where it is while others wait for it; 0 for ever. A
            rank that has ended is noticed in seconds all the same, by the connections that break.
        asked: gives the exit code with which this rank was asked to end, 0 as long as it was not; called from threads.
            All ranks then end with it, from wherever they are, unless rank 0 comes to `hold` first.
    Raises:
        LostRanks: if a rank is gone before all have begun to watch.
    """
    if world.size == 1:
        yield
        return
    try:
        watch = _Watch(world, limit_s or float("inf"), asked)
    except RuntimeError as error:  # DistError too
        if not _is_broken_connection(error):
            raise
        raise LostRanks(f"rank {world.rank} of {world.size} lost the others before training: {error}") from error
    try:
        yield
    except Exception as error:
        if _is_broken_connection(error):
            watch.cut_off(error)
        else:
            watch.close("failed", " ".join(f"{type(error).__name__}: {error}".split()))
        raise
    except KeyboardInterrupt:
        watch.close("failed", "interrupted")
        raise
    except BaseException:  # SystemExit: all ranks were told to stop
        watch.close("done")
        raise
    watch.close("done")


def _is_broken_connection(error: Exception) -> bool:
    # Gloo's errors are plain RuntimeErrors that begin with the place in its sources.
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "/gloo/" in str(error))


def _collectives() -> int:
    """Collectives that this rank has begun: the one that the others wait for has begun fewer."""
    groups: list[Any] = list(distributed_c10d._world.pg_map)  # Any: torch's types lack some of its methods
    return sum(group._get_sequence_number_for_group() for group in groups)


class _Watch:
    def __init__(self, world: World, limit_s: float, asked: Callable[[], int]) -> None:
        global _place
        _place = _Place()
        self._world = world
        self._others = list(range(1, world.size)) if world.is_main else [0]
        self._judge = Judge(world.rank, world.size, limit_s)
        self._host, self._number = socket.gethostname(), 0
        self._state, self._why = "", ""
        self._asked = asked
        self._told = self._found = Verdict()
        self._store_lost = False
        self._closing, self._wake = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        shared: Any = distributed_c10d._get_default_store()
        self._store = shared.clone()  # a connection that nobody else blocks
        if world.is_main:
            self._store.set("watch/verdict", "")
        self._say()
        # Then every key is there: reading one that is not would wait for it. And a rank that ends before its first
        # period is over was heard once.
        beats = gather_objects(self._here())
        self._heard = {rank: beats[rank] for rank in self._others}
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._exchange, self._look)]
        for thread in self._threads:
            thread.start()

    def close(self, state: str, why: str = "") -> None:
        """Says how this rank ends, and stops watching."""
        with self._lock:  # not while the process is being ended
            self._state, self._why = state, why
            self._closing.set()
        self._wake.set()
        self._threads[0].join(2 * PERIOD_S)

    def cut_off(self, error: Exception) -> None:
        """Ends this process once it is known whose connections broke; returns if that cannot be found out."""
        self._state, self._why = "cut off", " ".join(str(error).split())
        self._wake.set()
        self._threads[1].join(60)

    def _here(self) -> Beat:
        place = _place
        order = (place.entered, _collectives())
        state, why, asked = self._state, self._why, self._asked()
        return Beat(self._number, place.step, place.phase, order, place.ticks, self._host, state, why, asked)

    def _say(self) -> None:
        self._number += 1
        self._store.set(f"watch/{self._world.rank}", json.dumps(asdict(self._here())))

    def _exchange(self) -> None:
        keys = [f"watch/{rank}" for rank in self._others]
        try:
            while True:
                closing = self._closing.is_set()
                self._say()
                if self._found:
                    self._store.set("watch/verdict", json.dumps(asdict(self._found)))
                if closing:
                    return
                *beats, verdict = self._store.multi_get([*keys, "watch/verdict"])
                self._heard = {rank: Beat(**json.loads(beat)) for rank, beat in zip(self._others, beats)}
                if verdict and not self._world.is_main:
                    self._told = Verdict(**json.loads(verdict))
                self._wake.wait(PERIOD_S)
                self._wake.clear()
        except RuntimeError:  # DistError, and what a store of another kind raises
            self._store_lost = True

    def _look(self) -> None:
        clock, last = 0.0, time.monotonic()
        while not self._closing.wait(PERIOD_S):
            now = time.monotonic()
            clock += min(now - last, 2 * PERIOD_S)  # a process that was suspended has not listened
            last = now
            beats = {**self._heard, self._world.rank: self._here()}
            if self._world.is_main and (code := max(beat.asked for beat in beats.values())):
                with _place.holding:
                    if not _place.held:
                        self._end(Verdict(asked=code))
            verdict = self._told or self._judge.look(clock, beats, self._store_lost)
            if verdict:
                with self._lock:
                    if not self._closing.is_set():
                        self._end(verdict)

    def _end(self, verdict: Verdict) -> NoReturn:
        if verdict.line:
            self._report(verdict)
        if self._world.is_main:
            self._found = verdict
            self._wake.set()
            time.sleep(_LINGER_S)
        os._exit(verdict.exit_code)

    def _report(self, verdict: Verdict) -> None:
        world = self._world
        first_of_node = world.rank - world.local_rank
        # Not by print or logging: whoever is stuck may hold their locks.
        if world.rank not in verdict.lost and all(rank in verdict.lost for rank in range(first_of_node, world.rank)):
            os.write(2, f"error: {verdict.line}\n".encode())
        if world.rank in verdict.lost or (world.is_main and not verdict.lost):
            os.write(2, f"rank {world.rank} is here:\n".encode())
            faulthandler.dump_traceback(2)
