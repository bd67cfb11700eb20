"""`videodit encode` in real processes: any number of ranks and kill -9 change no byte, and a second one is told off."""

import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests import tiny
from tests.forked_ranks import Rank, Ranks, alive, wait_until
from tests.generation.test_encode_resume import contents
from videodit.data.mp4 import encode_mp4
from videodit.data.shapes.render import render
from videodit.data.shapes.world import captions, sample_spec
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import json_bytes

PER_SHARD, NUM_SHARDS = 3, 12
LAST = f"shard-{NUM_SHARDS - 1:06d}"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE, and shards of videos and a few pictures."""
    root = tmp_path_factory.mktemp("encode")
    tiny.make_vae(root / "vae")
    with ShardWriter(root / "shards", clips_per_shard=PER_SHARD) as writer:
        for number in range(PER_SHARD * NUM_SHARDS):
            frames = 1 if number % 5 == 0 else tiny.FRAMES
            spec = sample_spec(np.random.default_rng(number))
            clip = encode_mp4(render(spec, num_frames=tiny.FRAMES, size=tiny.SIZE)[:frames], 8.0)
            facts = {"fps": 8.0, "num_frames": frames, "height": tiny.SIZE, "width": tiny.SIZE}
            writer.write(f"c{number}", {"mp4": clip, "json": json_bytes({"captions": captions(spec), **facts})})
    return root


def options(root: Path, out: Path) -> list[str]:
    buckets = f"--data.buckets=[{tiny.BUCKET},1x32x32]"
    folders = [f"--vae={root / 'vae'}", f"--data.shards={root / 'shards'}", f"--out={out}"]
    return ["encode", *folders, buckets, "--batch_size=2", "--device=cpu", "--hang_timeout_s=5"]


@pytest.fixture(scope="module")
def straight(ranks: Ranks, root: Path) -> dict[str, str]:
    """What one undisturbed rank makes."""
    (rank,) = ranks.start(options(root, root / "straight"), 1)
    assert rank.wait() == 0, rank.stderr
    assert f"{PER_SHARD * NUM_SHARDS} clips encoded in {root / 'straight'}" in rank.stderr  # all that it prints
    return contents(root / "straight")


def finished(out: Path) -> dict[str, tuple[int, int]]:
    """The shards that have a record, and what changes when one is written again."""
    facts = {path.stem: (out / f"{path.stem}.tar").stat() for path in out.glob("records/*.json")}
    return {name: (found.st_ino, found.st_mtime_ns) for name, found in facts.items()}


def stopped_half_way(running: list[Rank], out: Path) -> dict[str, tuple[int, int]]:
    """Stops ranks once some shards are finished: which these are."""
    wait_until(lambda: len(finished(out)) > 2, lambda: running[0].stderr)
    for rank in running:
        rank.signal(signal.SIGSTOP)
    wait_until(lambda: all(state(rank.pid) == "T" for rank in running))
    assert len(finished(out)) < NUM_SHARDS
    return finished(out)


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


@pytest.mark.parametrize("size", [2, pytest.param(5, marks=pytest.mark.slow)])
def test_any_number_of_ranks_makes_the_same_bytes(
    ranks: Ranks, root: Path, straight: dict[str, str], tmp_path: Path, size: int
) -> None:
    running = ranks.start(options(root, tmp_path / "out"), size)
    assert [rank.wait() for rank in running] == [0] * size, running[0].stderr
    assert contents(tmp_path / "out") == straight
    assert ["clips encoded" in rank.stderr for rank in running] == [True] + [False] * (size - 1)


def test_killed_half_way_it_goes_on(ranks: Ranks, root: Path, straight: dict[str, str], tmp_path: Path) -> None:
    """Two ranks are stopped, a second process is told so, then they are killed, and one rank does the rest."""
    out = tmp_path / "out"
    running = ranks.start([*options(root, out), "--data.num_workers=1"], 2)
    before = stopped_half_way(running, out)
    family = [pid for rank in running for pid in rank.family()]
    assert len(family) == 4
    (second,) = ranks.start(options(root, out), 1)
    assert second.wait() == 2
    told = f"error: out {out} is in use by process {running[0].pid}: wait for it, or choose another out"
    assert second.lines == [told] and "Traceback" not in second.stderr
    for rank in running:
        rank.signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, family)))
    (again,) = ranks.start(options(root, out), 1)
    assert again.wait() == 0, again.stderr
    assert f"{PER_SHARD * (NUM_SHARDS - len(before))} clips encoded" in again.stderr
    assert contents(out) == straight
    after = finished(out)
    assert {name: after[name] for name in before} == before and len(after) == NUM_SHARDS


def test_a_rank_that_fails_ends_the_others(ranks: Ranks, root: Path, straight: dict[str, str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    taken = out / "records" / f"{LAST}.json"
    taken.mkdir(parents=True)
    running = ranks.start(options(root, out), 2)
    assert [rank.wait() for rank in running] == [1, 2]
    assert running[1].lines == [f"error: rank 1: {taken} cannot be used (Is a directory): choose another path"]
    (line,) = running[0].lines
    assert line.startswith("error: rank 1 (") and f" ended in encoding: UserError: {taken}" in line
    taken.rmdir()
    running = ranks.start(options(root, out), 2)
    assert [rank.wait() for rank in running] == [0, 0] and contents(out) == straight


@pytest.mark.slow
def test_under_torchrun_as_a_user_types_it(root: Path, straight: dict[str, str], tmp_path: Path) -> None:
    command = tiny.command(options(root, tmp_path / "out"), ranks=2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{PER_SHARD * NUM_SHARDS} clips encoded in {tmp_path / 'out'}, as {tiny.BUCKET}, 1x32x32\n"
    assert contents(tmp_path / "out") == straight
