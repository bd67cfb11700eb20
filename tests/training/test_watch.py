"""Real ranks that are killed, frozen or stuck: the others end with one line, nothing is left, and torchrun goes on."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch.distributed as dist

from tests import tiny
from tests.forked_ranks import Rank, Ranks, alive, children, exists, free_port, steps_of, wait_until
from tests.training.toy import assert_same, whole
from videodit.parallel.verdict import PERIOD_S
from videodit.training.checkpoint import load_latest
from videodit.training.run_folder import read_metrics

STEPS = 40
LIMIT_S = 5  # hang_timeout_s


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    return tiny.make_latents(root / "latents", tiny.make_shards(root / "shards"), tiny.make_vae(root / "vae"))


def options(run_dir: Path, latents: Path, max_steps: int = 100_000) -> list[str]:
    changes = [f"--run_dir={run_dir}", f"--data.shards={latents}", f"--max_steps={max_steps}", "--save_every=5"]
    changes += ["--global_batch_size=4", "--micro_batch_size=2", f"--hang_timeout_s={LIMIT_S}", "--dtype=fp32"]
    changes += ["--data.num_workers=1", "--data.cache_gib=0", "--sample_every=0", "--optim.warmup_steps=0"]
    return ["train", "dit", *changes, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS]


class Lost:
    """A run in which something was done to a rank."""

    def __init__(self, ranks: Ranks, run_dir: Path, latents: Path, size: int) -> None:
        self.run_dir, self.ranks = run_dir, ranks.start(options(run_dir, latents), size)
        self.seen: set[int] = set()

    def ready(self) -> None:
        """Waits until it trains."""
        wait_until(lambda: steps_of(self.run_dir) > 2, lambda: self.ranks[0].stderr)
        self.seen = {pid for rank in self.ranks for pid in rank.family()}
        assert len(self.seen) == 2 * len(self.ranks)  # each has a worker

    def trained_s(self) -> float:
        lines = read_metrics(self.run_dir)
        return float(lines[-1]["perf/wall_s"] - lines[0]["perf/wall_s"])

    def end(self, *survivors: int) -> list[Rank]:
        """Waits for the survivors, which fail; kills what torchrun would kill. Nothing else is left."""
        left = [self.ranks[rank] for rank in survivors]
        assert [rank.wait() for rank in left] == [1] * len(left)
        for rank in self.ranks:
            if rank not in left and alive(rank.pid):
                rank.signal(signal.SIGKILL)
        wait_until(lambda: not any(map(exists, self.seen)))
        assert not [path.name for pid in self.seen for path in Path("/dev/shm").glob(f"*_{pid}_*")]
        return left


@pytest.mark.slow
def test_of_a_rank_that_is_killed(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    runs = {
        name: Lost(ranks, tmp_path / name, latents, size) for name, size in {"killed": 3, "killed first": 2}.items()
    }
    for run in runs.values():
        run.ready()
    for run in runs.values():
        wait_until(lambda run=run: run.trained_s() > 3 * PERIOD_S)  # what is told once a period has been heard
    runs["killed"].ranks[2].signal(signal.SIGKILL)
    runs["killed first"].ranks[0].signal(signal.SIGKILL)  # it holds the store
    first, second = runs["killed"].end(0, 1)
    assert len(first.lines) == 1 and not second.lines  # one line a node
    assert first.lines[0].startswith("error: rank 2 (") and " is gone, last seen at step " in first.lines[0]
    (left,) = runs["killed first"].end(1)
    assert len(left.lines) == 1 and left.lines[0].startswith("error: rank 0 (") and " is gone" in left.lines[0]
    for run in runs.values():
        assert all("Traceback" not in rank.stderr for rank in run.ranks)


def test_of_a_rank_that_is_frozen_or_stuck(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    """Two runs at a time, for each waits for seconds."""
    runs = {name: Lost(ranks, tmp_path / name, latents, 2) for name in ("frozen", "stuck")}
    for run in runs.values():
        run.ready()
    runs["frozen"].ranks[1].signal(signal.SIGSTOP)
    os.kill(children(runs["stuck"].ranks[1].pid)[0], signal.SIGSTOP)  # its worker: the rank waits for data
    (left,) = runs["frozen"].end(0)
    assert len(left.lines) == 1 and left.lines[0].startswith("error: rank 1 (")
    assert "given no sign of life for" in left.lines[0]
    left, stuck = runs["stuck"].end(0, 1)
    assert len(left.lines) == 1 and left.lines[0].startswith("error: rank 1 (")
    assert "not moved for" in left.lines[0] and " in data, while the others wait" in left.lines[0]
    assert not stuck.lines and "rank 1 is here:" in stuck.stderr and "in read_all" in stuck.stderr
    for run in runs.values():
        assert all("Traceback" not in rank.stderr for rank in run.ranks)


def test_before_the_ranks_have_met(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    """A stop ends a rank at once, wherever it is, and a rank whose first one is gone says so."""
    port = free_port()
    first, other, stopped = ranks.start(options(tmp_path / "run", latents), 4, absent=1, port=port)
    wait_until(lambda: accepts(port), lambda: first.stderr)
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    wait_until(lambda: store.check(["meeting/ask/1", "meeting/ask/2"]), lambda: other.stderr)
    stopped.signal(signal.SIGUSR1)
    assert stopped.wait() == 143 and not stopped.stderr
    first.signal(signal.SIGKILL)
    assert other.wait() == 1
    (line,) = other.lines
    assert "rank 1 of 4 lost the others" in line and f"127.0.0.1:{port}" in line and "Traceback" not in other.stderr


@contextmanager
def in_its_first_collective(ranks: Ranks, latents: Path, run_dir: Path) -> Iterator[list[Rank]]:
    """Rank 0 reads a config.yaml that does not come to an end; rank 1 waits for what it says."""
    (run_dir / "checkpoints/step-00000001").mkdir(parents=True)
    os.mkfifo(run_dir / "config.yaml")
    pair, pipes = ranks.start(options(run_dir, latents), 2), []

    def is_read() -> bool:
        try:
            pipes.append(os.open(run_dir / "config.yaml", os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            return False
        return True

    wait_until(is_read, lambda: pair[0].stderr)
    yield pair
    os.close(pipes[0])


def test_of_a_rank_that_is_killed_in_its_first_collective(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    """Before a second is over, too: rank 1 may have heard nothing of rank 0 but that it began to watch."""
    with in_its_first_collective(ranks, latents, tmp_path) as (first, other):
        first.signal(signal.SIGKILL)
        assert other.wait() == 1
    (line,) = other.lines
    assert line.startswith("error: rank 0 (") and " is gone, last seen in start" in line
    assert "Traceback" not in other.stderr


def test_a_stop_while_the_main_threads_wait_in_c(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    """One waits for the disk, the other, which is told, for it: both end, with the code that is requeued on."""
    with in_its_first_collective(ranks, latents, tmp_path) as pair:
        pair[1].signal(signal.SIGUSR1)
        assert [rank.wait() for rank in pair] == [143, 143]
    assert not any(rank.lines or "Traceback" in rank.stderr for rank in pair)


def test_a_stop_in_the_first_compile(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    """All ranks end at once without a checkpoint, and the compiler's processes with them."""
    run_dir, cache = tmp_path / "run", tmp_path / "cache"
    command = [*options(run_dir, latents), "--compile=true", "--hang_timeout_s=100"]
    pair = ranks.start(command, 2, environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
    wait_until(lambda: any(cache.rglob("*.cpp")), lambda: pair[0].stderr)
    seen = [pid for rank in pair for pid in rank.family()]
    seen += [pid for child in seen for pid in children(child)]
    pair[1].signal(signal.SIGTERM)
    assert [rank.wait() for rank in pair] == [143, 143], pair[0].stderr
    wait_until(lambda: not any(map(exists, seen)))
    assert not steps_of(run_dir) and not list(run_dir.glob("checkpoints/*"))
    assert not any(rank.lines or "Traceback" in rank.stderr for rank in pair)


def test_torchrun_starts_a_run_again_that_lost_a_rank(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    straight = ranks.start(options(tmp_path / "straight", latents, STEPS), 2)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "-m", "videodit"]
    command = [sys.executable, "-m", *torchrun, *options(tmp_path / "killed", latents, STEPS)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as agent:
        try:
            wait_until(lambda: steps_of(tmp_path / "killed") > STEPS // 2)
            seen = [pid for rank in children(agent.pid) for pid in [rank, *children(rank)]]
            assert len(seen) == 4
            os.kill(next(pid for pid in children(agent.pid) if is_rank(pid, 1)), signal.SIGKILL)
            _, stderr = agent.communicate(timeout=240)
        finally:
            agent.kill()
    assert agent.returncode == 0, stderr
    (line,) = [line for line in stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: rank 1 (") and " is gone" in line and "Traceback" not in stderr
    assert not any(map(alive, seen))
    assert [rank.wait() for rank in straight] == [0, 0] and not any(rank.lines for rank in straight)
    ends = [load_latest(tmp_path / name) for name in ("straight", "killed")]
    assert all(end is not None and end.step == STEPS for end in ends)
    assert_same(*(whole(end) for end in ends if end is not None))


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return not probe.connect_ex(("127.0.0.1", port))


def is_rank(pid: int, rank: int) -> bool:
    return f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
