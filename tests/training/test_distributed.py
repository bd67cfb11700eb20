"""Two gloo ranks under torchrun, and what they saved on one rank."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.training import toy
from tests.training.distributed_cases import CASES, SLOW_CASES
from videodit.parallel.mesh import World, init_process, shutdown
from videodit.training.checkpoint import load_latest, read_full
from videodit.training.ema import PowerEMA

ROOT = Path(__file__).parents[2]


def launch(folder: Path, *args: str) -> dict[str, str]:
    tiny.make_latents(folder / "latents", tiny.make_shards(folder / "clips", 3), tiny.make_vae(folder / "vae"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.training.distributed_cases", str(folder), *args]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, str] = json.loads((folder / "report.json").read_text())
    return report


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    launch(folder)
    return folder


@pytest.fixture(scope="module")
def slow_report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return launch(tmp_path_factory.mktemp("slow_ranks"), "slow")


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_process("cpu")
    shutdown()


def test_a_process_ends_with_its_code_while_gloo_still_works() -> None:
    # With sys.exit 9 of 10 of these are aborted: a thread of gloo frees a tensor while the interpreter is taken down.
    script = """
import atexit, torch, torch.distributed as dist
from videodit.parallel.mesh import init_process, leave, shutdown
atexit.register(print, "said goodbye")
init_process("cpu")
kept = dist.group.WORLD  # as DeepSpeed does: nobody waits for the group's threads
for _ in range(20):
    dist.all_reduce(torch.ones(1_000_000), async_op=True)
shutdown()
leave(0)
"""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for _ in range(2):
        done = subprocess.run(
            [*command, "--no-python", sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
        )
        assert done.returncode == 0 and done.stdout.count("said goodbye") == 2, done.stderr[-4000:]
    alone = "from videodit.parallel.mesh import init_process, leave; init_process('cpu'); leave(3)"
    assert subprocess.run([sys.executable, "-c", alone], cwd=ROOT).returncode == 3


@pytest.mark.parametrize("name", list(CASES))
def test_two_ranks(folder: Path, name: str) -> None:
    problem = json.loads((folder / "report.json").read_text())[name]
    assert not problem, problem


@pytest.mark.slow
@pytest.mark.parametrize("name", list(SLOW_CASES))
def test_two_ranks_rest(slow_report: dict[str, str], name: str) -> None:
    assert not slow_report[name], slow_report[name]


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_two_ranks_to_one(folder: Path, world: World, tmp_path: Path, name: str, stage: int) -> None:
    if name == "muon" and stage == 0:
        pytest.skip("DeepSpeed has Muon at stages 1 to 3 only")
    checkpoint = load_latest(folder / name)
    assert checkpoint is not None and checkpoint.state["world_size"] == 2
    engine = toy.make_engine(world, stage, name=name)
    ema = PowerEMA(engine.slices())
    checkpoint.restore(engine, ema)
    assert not toy.save(tmp_path, 2, engine, ema)
    again = load_latest(tmp_path)
    assert again is not None and again.state["optimizer_step"] == 2
    toy.assert_same(toy.whole(checkpoint), toy.whole(again))
    toy.assert_same(read_full(checkpoint, "ema1"), read_full(again, "ema1"))


def test_one_rank_without_torchrun_trains_as_plain_torch(world: World) -> None:
    import torch

    weights, norms = toy.train_plain(3)
    engine = toy.make_engine(world, 1)
    results = toy.train(engine, world, 1, 3, micro=4)
    torch.testing.assert_close(torch.tensor([r.grad_norm for r in results]), torch.tensor(norms), rtol=1e-5, atol=0)
    for name, weight in read_state(engine).items():
        torch.testing.assert_close(weight, weights[name].flatten(), rtol=1e-5, atol=2e-6)


def read_state(engine: toy.Engine) -> dict:
    state = toy.full_state(engine)
    return {key.removeprefix("weight/"): value for key, value in state.items() if key.startswith("weight/")}
