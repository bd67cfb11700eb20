"""Trainings that are killed at random moments and started again until they are done.

    python -m tests.chaos.harness OUT --real --kills 50 --steps 30

Each run has to end with the weights and figures of one that nobody disturbed. Kills go on, over as many runs as it
takes, until there are enough; OUT/report.json counts them. What a run was doing when it was hit is read from its
folder. Moments are drawn over a run's whole life, and densely around saves, which are short: see `Moment`.
"""

import argparse
import json
import random
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import videodit.training.export  # noqa: F401  # brings torch, DeepSpeed and the trainers, for the forks
from tests import tiny
from tests.chaos.processes import Job, adopt_orphans, shared_memory, wait_for_no_descendants
from tests.training.toy import assert_same, whole
from videodit.training.checkpoint import Checkpoint, find_damage, folder_of, steps_in
from videodit.training.run_folder import read_metrics

LIMIT_S = 300.0
SAMPLE_EVERY = 4
ONE_ALONE = 0.25
"""Share of kills that hit one process only, a rank or a reader of data: the others have to end by themselves."""
TIMES = ("perf/", "data/wait_s")
"""What may differ between two runs of the same thing."""


@dataclass(frozen=True)
class Moment:
    """When to kill: so long after something happens in the run folder.

    Attributes:
        after: start (of the processes), step (the first one that is logged), write (a checkpoint is begun), publish (it
            is there, and the old one is about to go).
        count: the how manieth time that it happens.
        delay_s: seconds from then on.
    """

    after: str
    count: int
    delay_s: float

    @classmethod
    def draw(cls, rng: random.Random, start_s: float, train_s: float) -> "Moment":
        """Args: start_s, train_s: how long the undisturbed run took to its first step, and from there to its end."""
        after = rng.choice(("start", "step", "write", "write", "publish"))
        longest = {"start": start_s, "step": train_s / 2, "write": 0.03, "publish": 0.005}[after]
        return cls(after, rng.randint(1, 3), rng.uniform(0, longest))


class Run:
    """A run folder under attack: of a DiT on latents, or of a VAE on clips."""

    def __init__(self, folder: Path, data: Path, steps: int, save_every: int, *more: str, kind: str = "dit") -> None:
        self.folder, self.save_every = folder, save_every
        options = [
            f"--run_dir={folder}",
            f"--data.shards={data}",
            f"--max_steps={steps}",
            f"--sample_every={SAMPLE_EVERY}",
        ]
        options += [f"--save_every={save_every}", "--global_batch_size=4", "--micro_batch_size=2"]
        options += ["--data.num_workers=1", "--optim.name=adamw", "--dtype=fp32"]
        own = {
            "dit": ['--prompts=["a"]', *tiny.DIT_OPTIONS],
            "vae": [f"--eval_shards={data}", "--eval_clips=2", f"--data.buckets={tiny.BUCKET}", *tiny.VAE_OPTIONS],
        }[kind]
        self.arguments = ["train", kind, *options, *own, *tiny.RUN_OPTIONS, *more]

    def lines(self) -> list[str]:
        """Whole lines of metrics.jsonl that are steps."""
        file = self.folder / "metrics.jsonl"
        whole_lines = file.read_text().split("\n")[:-1] if file.exists() else []
        return [line for line in whole_lines if "train/loss" in line]

    def hidden(self) -> list[str]:
        """Folders that no checkpoint is: what is being written, and what is being removed."""
        return sorted(path.name for path in (self.folder / "checkpoints").glob(".*"))

    def wait_for(self, moment: Moment, job: Job) -> bool:
        """Waits for a moment; False if the run ends before it."""
        seen, happened = self._signs(moment.after), 0
        deadline = time.monotonic() + LIMIT_S
        while moment.after != "start" and happened < (1 if moment.after == "step" else moment.count):
            if job.codes() is not None:
                return False
            assert time.monotonic() < deadline, "nothing happens"
            signs = self._signs(moment.after)
            happened += bool(signs - seen)
            seen |= signs
            time.sleep(0.0005)
        end = time.monotonic() + moment.delay_s
        while time.monotonic() < end:
            if job.codes() is not None:
                return False
            time.sleep(min(0.002, max(0.0, end - time.monotonic())))
        return True

    def _signs(self, of: str) -> set[str]:
        if of == "step":
            return {str(len(self.lines()))}
        if of == "write":
            return set(self.hidden())
        return {str(step) for step in steps_in(self.folder)}


def attack(
    run: Run, ranks: int, rng: random.Random, kills: int, times: tuple[float, float], fork: bool
) -> Counter[str]:
    """Kills a run up to so many times, then lets it end; returns what the kills hit. Asserts all that has to hold."""
    hit: Counter[str] = Counter()
    log = run.folder.with_suffix(".log")
    while True:
        newest = max(steps_in(run.folder), default=0)
        kept = [line for line in run.lines() if json.loads(line)["step"] <= newest]
        before = shared_memory()
        job = Job(run.arguments, ranks, log, fork=fork)
        done = kills == 0 or not run.wait_for(Moment.draw(rng, *times), job)
        if not done:
            kills -= 1
            alone = rng.random() < ONE_ALONE and job.kill_one(rng)
            if alone:
                done = job.wait(LIMIT_S) == [0] * len(job.pids)
            else:
                job.kill()
        else:
            assert job.wait(LIMIT_S) == [0] * len(job.pids), log.read_text()[-3000:]
        wait_for_no_descendants()
        left = shared_memory() - before
        assert not left, f"shared memory is left: {left}"
        lines = run.lines()
        if len(lines) > len(kept) or done:
            # Had it gone on from an older checkpoint, or from none, the times in these lines would be others.
            assert lines[: len(kept)] == kept, f"step {newest} was there, but the run did not go on from it"
        check_checkpoints(run, len(lines))
        if done:
            return hit
        hit[what_was_hit(run, len(lines) - len(kept))] += 1


def check_checkpoints(run: Run, logged: int) -> None:
    """Those that are there are good, and one is there for every save but the last two that were due."""
    steps = steps_in(run.folder)
    for step in steps:
        assert not find_damage(folder_of(run.folder, step)), step
    due = max(logged - 1, 0) // run.save_every * run.save_every  # a step's line is there before its save begins
    assert max(steps, default=0) >= due - run.save_every, (steps, logged)


def what_was_hit(run: Run, new_steps: int) -> str:
    """What the run was doing, as its folder shows it."""
    if not new_steps:
        return "starting"  # what is hidden was left by the kill before
    hidden = run.hidden()
    if any(name.startswith(".old-") for name in hidden):
        return "removing an old checkpoint"
    return "writing a checkpoint" if hidden else "training, sampling"


def figures_of(run: Run) -> list[dict[str, Any]]:
    """All lines of metrics.jsonl, without times."""
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in read_metrics(run.folder)]


def check_end(run: Run, reference: Run, steps: int) -> None:
    """The run is bit for bit the undisturbed one, and left nothing behind."""
    figures = [figures_of(r) for r in (run, reference)]
    assert [line["step"] for line in figures[0] if "train/loss" in line] == list(range(1, steps + 1))
    assert figures[0] == figures[1]
    assert not run.hidden() and not list(run.folder.glob("*.tmp"))
    samples, models = (
        [
            {str(file.relative_to(r.folder)): file.read_bytes() for file in r.folder.glob(which)}
            for r in (run, reference)
        ]
        for which in ("samples/**/*.mp4", "model/*")
    )
    assert samples[0] == samples[1] and len(samples[0]) == steps // SAMPLE_EVERY + bool(steps % SAMPLE_EVERY)
    assert models[0] == models[1]  # a VAE's
    states = [whole(Checkpoint.open(folder_of(r.folder, steps))) for r in (run, reference)]
    assert_same(*states)


@dataclass
class Undisturbed:
    """A run that nobody kills, and how long it took to its first step and from there to its end."""

    run: Run
    start_s: float
    train_s: float

    @classmethod
    def make(
        cls, folder: Path, data: Path, ranks: int, options: argparse.Namespace, kind: str = "dit"
    ) -> "Undisturbed":
        run = Run(folder, data, options.steps, options.save_every, kind=kind)
        log = folder.with_suffix(".log")
        start = time.monotonic()
        job = Job(run.arguments, ranks, log, fork=not options.real)
        assert run.wait_for(Moment("step", 1, 0.0), job), log.read_text()[-3000:]
        first = time.monotonic()
        assert job.wait(LIMIT_S) == [0] * len(job.pids), log.read_text()[-3000:]
        wait_for_no_descendants()
        return cls(run, first - start, time.monotonic() - first)


def campaign(
    out: Path, data: Path, ranks: int, options: argparse.Namespace, reference: Undisturbed, kind: str = "dit"
) -> dict[str, object]:
    """Runs on so many ranks until there were enough kills: their figures."""
    begin = time.monotonic()
    rng, hit, runs = random.Random(f"{options.seed} {ranks}"), Counter[str](), 0
    while (left := options.kills - hit.total()) > 0:
        run = Run(out / f"{ranks}-ranks-{runs}", data, options.steps, options.save_every, kind=kind)
        times = (reference.start_s, reference.train_s)
        hit += attack(run, ranks, rng, min(left, options.kills_a_run), times, not options.real)
        check_end(run, reference.run, options.steps)
        runs += 1
        print(f"{ranks} ranks: {hit.total()} kills, {runs} runs ended as undisturbed: {dict(hit)}", flush=True)
    return {"kills": hit.total(), "runs": runs, "hit": dict(hit), "seconds": time.monotonic() - begin}


def make_latents(folder: Path) -> Path:
    """What the runs train on."""
    return tiny.make_latents(folder / "latents", tiny.make_shards(folder / "clips"), tiny.make_vae(folder / "vae"))


def parser() -> argparse.ArgumentParser:
    """Of the options, with the short form's defaults."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("out", type=Path, help="folder that must not exist")
    made.add_argument("--kills", type=int, default=3, help="for each number of ranks (default: %(default)s)")
    made.add_argument("--kills-a-run", type=int, default=8, help="at most (default: %(default)s)")
    made.add_argument("--ranks", type=int, nargs="+", default=[1, 2], help="numbers of ranks (default: %(default)s)")
    made.add_argument("--kind", choices=("dit", "vae"), default="dit", help="what is trained (default: %(default)s)")
    made.add_argument("--steps", type=int, default=8, help="of each run (default: %(default)s)")
    made.add_argument("--save-every", type=int, default=2, help="steps (default: %(default)s)")
    made.add_argument("--real", action="store_true", help="start the command line, not forks of this process")
    made.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    return made


def main() -> None:
    options = parser().parse_args()
    adopt_orphans()
    latents, kind = make_latents(options.out / "data"), options.kind
    data = latents if kind == "dit" else latents.with_name("clips")
    report = {}
    for ranks in options.ranks:
        reference = Undisturbed.make(options.out / f"{ranks}-ranks", data, ranks, options, kind)
        report[f"{ranks} ranks"] = campaign(options.out, data, ranks, options, reference, kind)
    (options.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
