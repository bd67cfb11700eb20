"""Two nodes, each a network namespace with one rank, joined by a cable: it is pulled out, and a node dies."""

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.forked_ranks import Ranks, steps_of, wait_until
from tests.training.toy import assert_same, whole
from videodit.training.checkpoint import load_latest

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


def test_two_nodes_lose_their_network_and_each_other(nodes: list[str], tmp_path: Path) -> None:
    root = tmp_path / "data"
    latents = tiny.make_latents(root / "latents", tiny.make_shards(root / "shards"), tiny.make_vae(root / "vae"))

    def command(run_dir: Path, max_steps: int) -> list[str]:
        options = [f"--run_dir={run_dir}", f"--data.shards={latents}", f"--max_steps={max_steps}", "--dtype=fp32"]
        options += ["--global_batch_size=4", "--micro_batch_size=2", "--hang_timeout_s=8", "--sample_every=0"]
        options += [f"--save_every={SAVE_EVERY}", "--optim.schedule=constant", "--optim.warmup_steps=0"]
        return ["train", "dit", *options, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS]

    run = tmp_path / "run"
    ranks = Ranks(tmp_path)
    try:
        # A short loss is bridged by TCP; a long one ends the run on both sides.
        pair = ranks.start(command(run, 1_000_000), 2, ADDRESSES[0], nodes)
        wait_until(lambda: steps_of(run) > SAVE_EVERY, lambda: pair[0].stderr + pair[1].stderr)
        plug("down")
        time.sleep(2)  # the fault itself, nothing is waited for
        plug("up")
        at = steps_of(run)
        wait_until(lambda: steps_of(run) > at + 2, lambda: pair[0].stderr + pair[1].stderr)
        plug("down")
        assert [rank.wait() for rank in pair] == [1, 1]
        for rank, other in zip(pair, (1, 0)):
            (line,) = rank.lines
            assert line.startswith(f"error: rank {other} (") and "given no sign of life" in line
            assert "Traceback" not in rank.stderr
        plug("up")

        # The same command goes on; then a node dies.
        at = steps_of(run)
        pair = ranks.start(command(run, 1_000_000), 2, ADDRESSES[0], nodes)
        wait_until(lambda: steps_of(run) > at + SAVE_EVERY, lambda: pair[0].stderr + pair[1].stderr)
        pair[1].signal(signal.SIGKILL)
        assert pair[0].wait() == 1
        (line,) = pair[0].lines
        assert line.startswith("error: rank 1 (") and " is gone" in line and "Traceback" not in pair[0].stderr

        # And to the end: as a run to which nothing ever happened.
        last = max(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")) + SAVE_EVERY
        runs = [ranks.start(command(folder, last), 2, ADDRESSES[0], nodes) for folder in (run, tmp_path / "straight")]
        assert [rank.wait() for pair in runs for rank in pair] == [0] * 4, runs[0][0].stderr
        assert not any(rank.lines for pair in runs for rank in pair)
        ends = [load_latest(folder) for folder in (run, tmp_path / "straight")]
        assert all(end is not None and end.step == last for end in ends)
        assert_same(*(whole(end) for end in ends if end is not None))
    finally:
        ranks.close()
