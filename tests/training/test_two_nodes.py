"""Two nodes, each a network namespace with one rank, joined by a cable: it is pulled out, a node dies, or a rank."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.forked_ranks import Rank, Ranks, alive, children, free_port, steps_of, wait_until
from tests.training.toy import assert_same, whole
from videodit.training.checkpoint import load_latest
from videodit.training.run_folder import read_metrics

ROOT = Path(__file__).resolve().parents[2]
SAVE_EVERY = 10
NAMES = [f"videodit-{os.getpid()}-{node}" for node in range(2)]
ADDRESSES = ["10.213.7.1", "10.213.7.2"]


def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *arguments], capture_output=True, text=True)


@pytest.fixture(scope="module")
def nodes() -> Iterator[list[str]]:
    """Files of the two namespaces; `cable` is the interface of each."""
    if shutil.which("ip") is None:
        pytest.skip("no ip command (Debian's iproute2)")
    made = ip("netns", "add", NAMES[0])
    if made.returncode:
        pytest.skip(f"network namespaces cannot be made here (CAP_NET_ADMIN): {made.stderr.strip()}")
    try:
        commands = [["netns", "add", NAMES[1]]]
        commands += [f"link add cable netns {NAMES[0]} type veth peer name cable netns {NAMES[1]}".split()]
        for name, address in zip(NAMES, ADDRESSES):
            commands += [["-n", name, *command.split()] for command in ("link set lo up", "link set cable up")]
            commands += [["-n", name, "address", "add", f"{address}/24", "dev", "cable"]]
        for command in commands:
            done = ip(*command)
            assert not done.returncode, (command, done.stderr)
        yield [f"/run/netns/{name}" for name in NAMES]
    finally:
        for name in NAMES:
            ip("netns", "delete", name)


def plug(state: str) -> None:
    """Pulls the second node's end of the cable out ("down") or puts it in ("up")."""
    assert not ip("-n", NAMES[1], "link", "set", "cable", state).returncode


class Training:
    """Starts the same run again and again, and another one without any fault beside it."""

    def __init__(self, ranks: Ranks, nodes: list[str], folder: Path) -> None:
        self._ranks, self._nodes, self.run, self.straight = ranks, nodes, folder / "run", folder / "straight"
        root = folder / "data"
        self._latents = tiny.make_latents(
            root / "latents", tiny.make_shards(root / "shards"), tiny.make_vae(root / "vae")
        )

    def command(self, run_dir: Path, max_steps: int) -> list[str]:
        options = [f"--run_dir={run_dir}", f"--data.shards={self._latents}", f"--max_steps={max_steps}", "--dtype=fp32"]
        options += ["--global_batch_size=4", "--micro_batch_size=2", "--hang_timeout_s=8", "--sample_every=0"]
        options += [f"--save_every={SAVE_EVERY}", "--optim.schedule=constant", "--optim.warmup_steps=0"]
        return ["train", "dit", *options, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS]

    def start(self, run_dir: Path, max_steps: int = 1_000_000) -> list[Rank]:
        return self._ranks.start(self.command(run_dir, max_steps), 2, ADDRESSES[0], self._nodes)

    def wait(self, steps: int, pair: list[Rank]) -> None:
        wait_until(lambda: steps_of(self.run) > steps, lambda: pair[0].stderr + pair[1].stderr)

    def check_the_end(self) -> None:
        """Goes on to the next checkpoint: it is as if nothing had ever happened."""
        last = max(int(path.name[5:]) for path in (self.run / "checkpoints").glob("step-*")) + SAVE_EVERY
        pairs = [self.start(folder, last) for folder in (self.run, self.straight)]
        assert [rank.wait() for pair in pairs for rank in pair] == [0] * 4, pairs[0][0].stderr
        assert not any(rank.lines for pair in pairs for rank in pair)
        self.compare(last)

    def compare(self, last: int) -> None:
        ends = [load_latest(folder) for folder in (self.run, self.straight)]
        assert all(end is not None and end.step == last for end in ends)
        assert_same(*(whole(end) for end in ends if end is not None))


def test_two_nodes_lose_their_network(ranks: Ranks, nodes: list[str], tmp_path: Path) -> None:
    training = Training(ranks, nodes, tmp_path)
    pair = training.start(training.run)
    training.wait(SAVE_EVERY, pair)
    plug("down")
    time.sleep(2)  # the fault itself, nothing is waited for
    plug("up")
    training.wait(steps_of(training.run) + 2, pair)  # TCP bridges it
    plug("down")
    assert [rank.wait() for rank in pair] == [1, 1]
    plug("up")
    for rank, other in zip(pair, (1, 0)):
        (line,) = rank.lines
        assert line.startswith(f"error: rank {other} (") and "given no sign of life" in line
        assert "Traceback" not in rank.stderr
    training.check_the_end()


@pytest.mark.parametrize("dying", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_of_two_nodes_dies(ranks: Ranks, nodes: list[str], tmp_path: Path, dying: int) -> None:
    """The first of them has the store, by which the other learns of it."""
    training = Training(ranks, nodes, tmp_path)
    pair = training.start(training.run)
    training.wait(SAVE_EVERY, pair)
    pair[dying].signal(signal.SIGKILL)
    left = pair[1 - dying]
    assert left.wait() == 1
    (line,) = left.lines
    assert line.startswith(f"error: rank {dying} (") and " is gone" in line and "Traceback" not in left.stderr
    training.check_the_end()


@pytest.mark.slow
@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_launchers_start_a_run_again_by_themselves(
    ranks: Ranks, nodes: list[str], tmp_path: Path, rendezvous: str
) -> None:
    """A rank of the first node is killed, which has the store, and one of the second: nobody types anything."""
    training, last = Training(ranks, nodes, tmp_path), 12 * SAVE_EVERY
    launcher = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=2", f"--rdzv-backend={rendezvous}"]
    launcher += [f"--rdzv-endpoint={ADDRESSES[0]}:{free_port()}"]
    outputs, agents = [tmp_path / f"node-{node}" for node in range(2)], []
    try:
        for node, (name, address) in enumerate(zip(NAMES, ADDRESSES)):
            own = [f"--node-rank={node}"] if rendezvous == "static" else [f"--rdzv-conf=is_host={node == 0}"]
            command = ["ip", "netns", "exec", name, sys.executable, "tools/launch.py", *launcher, *own]
            command += [f"--local-addr={address}", "-m", "videodit", *training.command(training.run, last)]
            with outputs[node].open("w") as output:
                agents.append(subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output))

        def report() -> str:
            return "\n".join(output.read_text()[-3000:] for output in outputs)

        for kill, node in enumerate((1, 0), 1):
            wait_until(lambda steps=4 * SAVE_EVERY * kill: newest_step(training.run) > steps, report)
            (pid,) = [pid for pid in children(agents[node].pid) if alive(pid)]
            os.kill(pid, signal.SIGKILL)
        assert [agent.wait(240) for agent in agents] == [0, 0], report()
    finally:
        for agent in agents:
            agent.kill()
    assert "is gone" in report() and "Traceback" not in report()
    straight = training.start(training.straight, last)
    assert [rank.wait() for rank in straight] == [0, 0]
    training.compare(last)


def newest_step(run_dir: Path) -> int:
    """Read from the last line, for lines of steps that are made again are cut."""
    lines = read_metrics(run_dir)
    return int(lines[-1]["step"]) if lines else 0
