"""Who is blamed for what, from what ranks say and when: time is a number here."""

from collections.abc import Callable
from dataclasses import replace

import hypothesis.strategies as st
from hypothesis import given, settings

from videodit.parallel.verdict import GRACE_S, Beat, Judge, Verdict

LIMIT_S = 60
Says = Callable[[float], Beat | None]  # a rank's beat by the second; None if it says nothing


def trial(says: list[Says], seconds: int, rank: int = 0) -> tuple[int, Verdict]:
    """The first verdict and its second, for a judge who hears every rank each second."""
    judge, heard = Judge(rank, len(says), LIMIT_S), {}
    for now in range(seconds):
        for other, beat in enumerate(say(now) for say in says):
            if beat is not None:
                heard[other] = replace(beat, number=now + 1, host=f"node-{other // 2}")
        verdict = judge.look(float(now), heard)
        if verdict.line:
            return now, verdict
    return seconds, Verdict()


def training(now: float) -> Beat:
    return Beat(step=int(now), phase="data", order=(int(now), 0))


def waiting(since: int) -> Says:
    """Trains, then waits in a collective that it has begun."""
    return lambda now: training(now) if now < since else Beat(step=since, phase="optimizer", order=(since, 9))


def stuck(since: int) -> Says:
    return lambda now: training(min(now, since))


def silent(since: int) -> Says:
    return lambda now: training(now) if now < since else None


def test_a_stuck_rank_is_named_after_the_limit() -> None:
    now, verdict = trial([waiting(10), waiting(10), stuck(10), waiting(10)], 200)
    assert now == 10 + LIMIT_S + 1 and verdict.lost == [2]
    assert "rank 2 (node-1) has not moved for 61 s at step 10 in data, while the others wait" in verdict.line


def test_a_rank_that_freezes_in_a_long_step_is_silent_not_stuck() -> None:
    def frozen(now: float) -> Beat | None:
        return stuck(10)(now) if now < 30 else None  # its last move is long ago when it falls silent

    now, verdict = trial([waiting(10), frozen], 200)
    assert now == 29 + LIMIT_S + 1 and verdict.lost == [1]
    assert "has given no sign of life for 61 s" in verdict.line


def test_a_rank_that_ticks_is_not_stuck_and_who_waits_for_it_neither() -> None:
    def samples(now: float) -> Beat:
        return replace(training(min(now, 10)), phase="samples", ticks=int(now / (LIMIT_S - 1)))

    assert not trial([samples, waiting(10)], 1000)[1].line


def test_where_all_are_at_the_same_place_nobody_is_named() -> None:
    now, verdict = trial([stuck(10), stuck(10)], 200)
    assert not verdict.lost and verdict.line.startswith("no rank has moved for 61 s: all are at step 10 in data")


def test_a_node_that_falls_silent_is_named_whole() -> None:
    now, verdict = trial([waiting(10), waiting(10), silent(10), silent(11)], 200)
    assert verdict.lost == [2, 3] and now == 9 + LIMIT_S + 1
    assert verdict.line.startswith("ranks 2, 3 (node-1) have given no sign of life for 61 s")
    now, verdict = trial([silent(10), waiting(10)], 200, rank=1)
    assert verdict.lost == [0]


def test_a_broken_connection_is_explained_in_seconds() -> None:
    def cut_off(now: float) -> Beat:
        return training(now) if now < 10 else Beat(step=10, order=(10, 9), state="cut off", why="peer closed")

    now, verdict = trial([waiting(10), cut_off, silent(10)], 200)
    assert verdict.lost == [2] and now <= 10 + GRACE_S + 1
    assert verdict.line.startswith("rank 2 (node-1) is gone, last seen at step 9 in data")

    def failed(now: float) -> Beat | None:
        return training(now) if now < 10 else Beat(step=10, state="failed", why="UserError: no") if now < 11 else None

    _, verdict = trial([waiting(10), cut_off, failed], 200)
    assert verdict.lost == [2] and verdict.line == "rank 2 (node-1) ended at step 10 in start: UserError: no"
    now, verdict = trial([waiting(10), cut_off], 200)  # nobody is gone
    assert not verdict.lost and "rank 1 (node-0) lost a connection at step 10" in verdict.line


def test_who_is_done_is_not_missed() -> None:
    def done(now: float) -> Beat | None:
        return training(now) if now < 10 else Beat(step=10, order=(10, 0), state="done") if now < 11 else None

    assert not trial([stuck(10), done, done], 1000)[1].line  # rank 0 exports
    assert not trial([done, stuck(10)], 1000, rank=1)[1].line


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, LIMIT_S - 2), min_size=4, max_size=12), st.integers(1, 4))
def test_slow_steps_below_the_limit_are_no_hang(durations: list[int], size: int) -> None:
    """Each step one rank, another each time, takes as long as drawn while the others wait for it."""

    def says(rank: int) -> Says:
        def say(now: float) -> Beat:
            step = 0
            while step < len(durations) - 1 and now >= durations[step]:
                now -= durations[step]
                step += 1
            return Beat(step=step, order=(2 * step + (step % size != rank), step))

        return say

    assert not trial([says(rank) for rank in range(size)], sum(durations))[1].line
