"""From what the ranks said, and when: which of them is lost, if any."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

PERIOD_S = 1.0
"""Seconds between what a rank says."""
GRACE_S = 3.5
"""Once a connection broke, a rank that says nothing for so long is gone."""
EXIT_CODE = 1
"""Of the ranks that a lost rank leaves behind: launchers take it for a failure, and start the run again."""

_AGAIN = "start the same command again: it goes on from what was saved"


@dataclass(frozen=True)
class Beat:
    """What a rank says.

    Attributes:
        number: of the beat; grows as long as the process lives.
        step, phase: where the rank is.
        order: what it has begun: phases and collectives. The rank that the others wait for has begun the least.
        ticks: other signs that it is not stuck.
        host: its machine.
        state: "" at work, "cut off" from another rank, "failed", or "done".
        why: the error in one line, if it failed or is cut off.
        asked: exit code with which it was asked to end; 0 if it was not.
    """

    number: int = 0
    step: int = 0
    phase: str = "start"
    order: Sequence[int] = (0, 0)
    ticks: int = 0
    host: str = ""
    state: str = ""
    why: str = ""
    asked: int = 0


@dataclass(frozen=True)
class Verdict:
    """That the run ends; false if it does not.

    Attributes:
        line: why, for people; "" if somebody asked for it.
        lost: the ranks that it ends for.
        asked: exit code with which somebody asked for it; 0 if nobody did.
    """

    line: str = ""
    lost: Sequence[int] = ()
    asked: int = 0

    def __bool__(self) -> bool:
        return bool(self.line or self.asked)

    @property
    def exit_code(self) -> int:
        """Of the ranks that end."""
        return self.asked or EXIT_CODE


class Judge:
    """Decides whether a rank is lost.

    Args:
        rank: this one.
        size: ranks of the run.
        limit_s: how long a rank may be silent, or stay where it is while others wait for it.
    """

    def __init__(self, rank: int, size: int, limit_s: float) -> None:
        self._rank, self._size, self._limit_s = rank, size, limit_s
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}  # when a rank's last new beat came
        self._moved: dict[int, float] = {}  # when it last was somewhere new
        self._broken_since: float | None = None

    def look(self, now: float, beats: Mapping[int, Beat], store_lost: bool = False) -> Verdict:
        """Takes in the newest beats.

        Args:
            now: seconds on a clock that stands while this process does.
            beats: of this rank and those that it listens to.
            store_lost: whether the connection to the store broke.
        """
        for rank, beat in beats.items():
            old = self._beats.get(rank)
            if old is None or beat.number != old.number or rank == self._rank:
                self._heard[rank] = now
            if old is None or _position(beat) != _position(old):
                self._moved[rank] = now
        self._beats = dict(beats)
        if self._broken_since is None and (store_lost or self._cut_off()):
            self._broken_since = now
        if self._broken_since is not None:
            verdict = self._broken(now, now - self._broken_since, store_lost)
        else:
            verdict = self._silent(now, self._limit_s)
        return verdict or self._stuck(now) or Verdict()

    def _cut_off(self) -> list[int]:
        return sorted(rank for rank, beat in self._beats.items() if beat.state == "cut off")

    def _broken(self, now: float, for_s: float, store_lost: bool) -> Verdict | None:
        """After a connection broke: mostly because the process at its other end has ended."""
        if store_lost and self._rank == 0 and for_s > GRACE_S:
            return Verdict(f"the run's store is gone: the launcher on this node has ended; {_AGAIN}")
        verdict = self._silent(now, GRACE_S)
        if verdict is None and for_s > 4 * GRACE_S and self._cut_off():
            rank = self._cut_off()[0]
            return Verdict(
                f"{self._name([rank])} lost a connection {self._at(rank)}: {self._beats[rank].why}; {_AGAIN}"
            )
        return verdict

    def _silent(self, now: float, limit_s: float) -> Verdict | None:
        listened = [rank for rank, beat in self._beats.items() if beat.state != "done"]
        since = min((self._heard[rank] for rank in listened), default=now)
        if now - since <= limit_s:
            return None
        lost = sorted(rank for rank in listened if self._heard[rank] <= since + 2 * PERIOD_S)  # those of one node
        failed = [rank for rank in lost if self._beats[rank].state == "failed"]
        if failed:
            return Verdict(f"{self._name(failed[:1])} ended {self._at(failed[0])}: {self._beats[failed[0]].why}", lost)
        at = f"last seen {self._at(lost[0])}; {_AGAIN}"
        if self._broken_since is not None:
            return Verdict(f"{self._name(lost)} {'is' if len(lost) == 1 else 'are'} gone, {at}", lost)
        verb = "has" if len(lost) == 1 else "have"
        silent = f"{verb} given no sign of life for {now - since:.0f} s (frozen, or its node or network is down)"
        return Verdict(f"{self._name(lost)} {silent}, {at}", lost)

    def _stuck(self, now: float) -> Verdict | None:
        working = {rank: beat for rank, beat in self._beats.items() if beat.state != "done"}
        if self._rank != 0 or len(working) < 2:
            return None
        least = min(tuple(beat.order) for beat in working.values())
        last = sorted(rank for rank, beat in working.items() if tuple(beat.order) == least)
        if any(now - self._heard[rank] > 3 * PERIOD_S for rank in last):
            return None  # frozen or gone rather than stuck: `_silent` tells so when its time has come
        for_s = now - max(self._moved[rank] for rank in last)
        if for_s <= self._limit_s:
            return None
        if len(last) == len(working):
            return Verdict(f"no rank has moved for {for_s:.0f} s: all are {self._at(last[0])}; {_AGAIN}")
        verb = "has" if len(last) == 1 else "have"
        line = f"{self._name(last)} {verb} not moved for {for_s:.0f} s {self._at(last[0])}, while the others wait"
        return Verdict(f"{line}; {_AGAIN}", last)

    def _name(self, ranks: Sequence[int]) -> str:
        hosts = ", ".join(dict.fromkeys(self._beats[rank].host for rank in ranks))
        return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))} ({hosts})"

    def _at(self, rank: int) -> str:
        beat = self._beats[rank]
        return f"at step {beat.step} in {beat.phase}" if beat.step else f"in {beat.phase}"


def _position(beat: Beat) -> tuple[object, ...]:
    return tuple(beat.order), beat.ticks
