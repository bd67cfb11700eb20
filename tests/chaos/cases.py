"""Kills and stops of real processes: `python -m tests.chaos.cases OUT`; OUT/report.json has name -> "" or traceback.

The cases share one process, since importing torch and DeepSpeed costs seconds: the trainings are forks of it.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.chaos.harness import LIMIT_S, Run, Undisturbed, campaign, check_end, make_latents, parser
from tests.chaos.processes import Job, adopt_orphans, wait_for_no_descendants
from videodit.training.checkpoint import steps_in

STOPPED = [143, 143]


@dataclass
class World:
    """What the cases share."""

    latents: Path
    references: dict[int, Undisturbed]
    """on so many ranks"""


def killed(folder: Path, world: World, ranks: int, kills: int) -> None:
    """Killed at random moments, a run ends as one that nobody disturbed."""
    options = parser().parse_args([str(folder), f"--kills={kills}"])
    campaign(folder, world.latents, ranks, options, world.references[ranks])


def signalled(run: Run, rank: int, number: int, when: Callable[[Job], bool]) -> list[int]:
    """Starts a run on two ranks and sends one of them a signal; the exit codes of both."""
    log = run.folder.with_suffix(".log")
    job = Job(run.arguments, 2, log, fork=True)
    deadline = time.monotonic() + LIMIT_S
    while not when(job):
        assert job.codes() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    os.kill(job.pids[rank], number)
    codes = job.wait(LIMIT_S)
    wait_for_no_descendants()
    return codes


def stopped_while_training(folder: Path, world: World, number: int, rank: int) -> None:
    """All ranks leave after the running step, with a checkpoint of it."""
    run = Run(folder / "run", world.latents, 100_000, 100_000, "--sample_every=0")
    assert signalled(run, rank, number, lambda _: len(run.lines()) >= 2) == STOPPED
    assert steps_in(run.folder) == [len(run.lines())] and not run.hidden()


def stopped_before_the_first_step(folder: Path, world: World) -> None:
    """All ranks leave without a step and without a checkpoint."""
    run = Run(folder / "run", world.latents, 8, 2)

    def listens(_: Job) -> bool:  # all ranks have met, and the first has the folder
        lock = run.folder / ".lock"
        return lock.exists() and bool(lock.read_text())

    assert signalled(run, 1, signal.SIGUSR1, listens) == STOPPED
    assert run.folder.exists() and not run.lines() and not steps_in(run.folder)


def stopped_while_sampling(folder: Path, world: World) -> None:
    """Samples that would take a minute are broken off; the checkpoint has the weights, not their average."""
    run = Run(folder / "run", world.latents, 8, 2)
    endless = Run(folder / "run", world.latents, 8, 2, "--sampling.num_steps=5000")
    # By the time that the checkpoint is there, the look for a stop at the end of the step is over.
    assert signalled(endless, 1, signal.SIGTERM, lambda _: 4 in steps_in(run.folder)) == STOPPED
    assert steps_in(run.folder) == [2, 4] and len(run.lines()) == 4
    log = folder / "again.log"
    assert Job(run.arguments, 2, log, fork=True).wait(LIMIT_S) == [0, 0], log.read_text()[-3000:]
    check_end(run, world.references[2].run, 8)


CASES: dict[str, Callable[[Path, World], None]] = {
    "killed on 1 rank": partial(killed, ranks=1, kills=3),
    "killed on 2 ranks": partial(killed, ranks=2, kills=2),
    "SIGUSR1 to rank 1": partial(stopped_while_training, number=signal.SIGUSR1, rank=1),
    "SIGTERM to rank 0": partial(stopped_while_training, number=signal.SIGTERM, rank=0),
    "before the first step": stopped_before_the_first_step,
    "while sampling": stopped_while_sampling,
}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    adopt_orphans()
    latents = make_latents(out / "data")
    defaults = parser().parse_args([str(out)])
    shared = World(latents, {n: Undisturbed.make(out / f"undisturbed-{n}", latents, n, defaults) for n in (1, 2)})
    report = {}
    for position, (name, case) in enumerate(CASES.items()):
        start, place = time.monotonic(), out / f"case-{position}"
        place.mkdir()
        try:
            case(place, shared)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - start:.1f} s", report[name], flush=True)
    (out / "report.json").write_text(json.dumps(report))
