"""Kills and stops of real processes: `python -m tests.chaos.cases OUT [slow]`.

OUT/report.json has name -> "" or traceback; OUT/figures.json name -> seconds from the end of the running step until its
checkpoint is there, of cases that stop a run while it trains.

The cases share one process, since importing torch and DeepSpeed costs seconds: the trainings are forks of it.
"""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

from tests import tiny
from tests.chaos.harness import LIMIT_S, Run, Undisturbed, campaign, check_end, figures_of, make_latents, parser
from tests.chaos.processes import Job, adopt_orphans, command_of, descendants, shared_memory, wait_for_no_descendants
from tests.training.toy import assert_same, whole
from videodit.training.checkpoint import Checkpoint, folder_of, steps_in

STOPPED = [143, 143]


class World:
    """What the cases share: data, and runs that nobody disturbs, made when they are first asked for."""

    def __init__(self, out: Path) -> None:
        self._out = out
        self._made: dict[tuple[str, int], Undisturbed] = {}
        self.latents = make_latents(out / "data")
        self.figures: dict[str, float] = {}

    def data(self, kind: str) -> Path:
        return self.latents if kind == "dit" else self.latents.with_name("clips")

    @cached_property
    def held_out(self) -> Path:
        """Latents of other clips, many enough to be measured for longer than a checkpoint is written."""
        root = self._out / "held_out"
        return tiny.make_latents(
            root / "latents", tiny.make_shards(root / "clips", 64, first=50), self.latents.with_name("vae")
        )

    def reference(self, ranks: int, kind: str = "dit") -> Undisturbed:
        if (kind, ranks) not in self._made:
            defaults, folder = parser().parse_args([str(self._out)]), self._out / f"undisturbed-{kind}-{ranks}"
            self._made[kind, ranks] = Undisturbed.make(folder, self.data(kind), ranks, defaults, kind)
        return self._made[kind, ranks]


def killed(folder: Path, world: World, ranks: int, kills: int, kind: str = "dit") -> None:
    """Killed at random moments, a run ends as one that nobody disturbed."""
    options = parser().parse_args([str(folder), f"--kills={kills}"])
    campaign(folder, world.data(kind), ranks, options, world.reference(ranks, kind), kind)


def started(run: Run, ranks: int, when: Callable[[Job], bool]) -> Job:
    """Starts a run and waits for a moment in it."""
    log = run.folder.with_suffix(".log")
    job = Job(run.arguments, ranks, log, fork=True)
    deadline = time.monotonic() + LIMIT_S
    while not when(job):
        assert job.codes() is None and time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.002)
    return job


def signalled(run: Run, rank: int, number: int, when: Callable[[Job], bool]) -> list[int]:
    """Starts a run on two ranks and sends one of them a signal; the exit codes of both. Nothing of them is left."""
    before = shared_memory()
    job = started(run, 2, when)
    os.kill(job.pids[rank], number)
    codes = job.wait(LIMIT_S)
    wait_for_no_descendants()
    assert shared_memory() <= before
    return codes


def stopped_while_training(folder: Path, world: World, number: int, rank: int, kind: str = "dit") -> None:
    """All ranks leave after the running step, with a checkpoint of it."""
    run = Run(folder / "run", world.data(kind), 100_000, 100_000, "--sample_every=0", kind=kind)
    assert signalled(run, rank, number, lambda _: len(run.lines()) >= 2) == STOPPED
    assert steps_in(run.folder) == [len(run.lines())] and not run.hidden()
    # The last line is written at the end of the step; the folder of checkpoints changes last when one gets its name.
    ended, there = ((run.folder / name).stat().st_mtime for name in ("metrics.jsonl", "checkpoints"))
    world.figures[f"{kind}: {signal.Signals(number).name} to rank {rank}"] = there - ended


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
    check_end(run, world.reference(2).run, 8)


def stopped_while_measuring(folder: Path, world: World) -> None:
    """A held-out loss that would take long is broken off, and measured when the run goes on, which ends as ever."""
    figures = [f"--eval_shards={world.held_out}", "--eval_every=4", "--sample_every=0"]
    run = Run(folder / "run", world.latents, 8, 2, *figures, "--eval_clips=2")
    slow = Run(folder / "run", world.latents, 8, 2, *figures)
    assert signalled(slow, 1, signal.SIGTERM, lambda _: 4 in steps_in(run.folder)) == STOPPED
    assert steps_in(run.folder) == [2, 4] and len(run.lines()) == 4
    assert "eval/" not in (run.folder / "metrics.jsonl").read_text()
    log = folder / "again.log"
    assert Job(run.arguments, 2, log, fork=True).wait(LIMIT_S) == [0, 0], log.read_text()[-3000:]
    straight = world.reference(2).run
    lines, wanted = figures_of(run), [line for line in figures_of(straight) if "train/loss" in line]
    assert [line["step"] for line in lines if "eval/loss_ema" in line] == [4, 8]
    assert [line for line in lines if "train/loss" in line] == wanted
    assert_same(*(whole(Checkpoint.open(folder_of(which.folder, 8))) for which in (run, straight)))


def killed_beside_wandb(folder: Path, world: World) -> None:
    """wandb's processes end by themselves when training is killed, and the run goes on."""
    run = Run(folder / "run", world.latents, 8, 2, "--tracker.mode=offline")
    job = started(run, 1, lambda _: bool(list(run.folder.glob("wandb/offline-run-*"))) and len(run.lines()) > 1)
    tracker = [pid for pid in descendants() if b"videodit.training.tracker" in command_of(pid)]
    assert len(tracker) == 1
    os.kill(job.pids[0], signal.SIGKILL)
    assert job.wait(LIMIT_S) == [-signal.SIGKILL]
    wait_for_no_descendants()
    log = folder / "again.log"
    assert Job(run.arguments, 1, log, fork=True).wait(LIMIT_S) == [0], log.read_text()[-3000:]
    wait_for_no_descendants()
    check_end(run, world.reference(1).run, 8)


CASES: dict[str, Callable[[Path, World], None]] = {
    "killed on 1 rank": partial(killed, ranks=1, kills=3),
    "killed on 2 ranks": partial(killed, ranks=2, kills=2),
    "SIGUSR1 to rank 1": partial(stopped_while_training, number=signal.SIGUSR1, rank=1),
    "SIGTERM to rank 0": partial(stopped_while_training, number=signal.SIGTERM, rank=0),
    "before the first step": stopped_before_the_first_step,
    "while sampling": stopped_while_sampling,
    "VAE killed on 1 rank": partial(killed, ranks=1, kills=1, kind="vae"),
}
SLOW_CASES: dict[str, Callable[[Path, World], None]] = {
    "while measuring": stopped_while_measuring,
    "VAE killed on 2 ranks": partial(killed, ranks=2, kills=4, kind="vae"),
    "SIGUSR1 to rank 1 of a VAE": partial(stopped_while_training, number=signal.SIGUSR1, rank=1, kind="vae"),
    "SIGTERM to rank 0 of a VAE": partial(stopped_while_training, number=signal.SIGTERM, rank=0, kind="vae"),
    "killed beside wandb": killed_beside_wandb,
}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    adopt_orphans()
    shared = World(out)
    chosen = SLOW_CASES if sys.argv[2:] == ["slow"] else CASES
    report = {}
    for position, (name, case) in enumerate(chosen.items()):
        start, place = time.monotonic(), out / f"case-{position}"
        place.mkdir()
        try:
            case(place, shared)
            report[name] = ""
        except Exception:
            report[name] = traceback.format_exc()
        print(f"{name}: {time.monotonic() - start:.1f} s", report[name], flush=True)
    (out / "report.json").write_text(json.dumps(report))
    (out / "figures.json").write_text(json.dumps(shared.figures, indent=1))
    print(shared.figures)
