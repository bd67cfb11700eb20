"""Faults injected into checkpoints: kills, damage, full disks. The engine is real, one rank, stage 1."""

import errno
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.training import toy
from videodit.errors import UserError
from videodit.parallel.mesh import World, init_process, shutdown
from videodit.training import checkpoint as module
from videodit.training.checkpoint import Checkpoint, load_latest, read_full, save, steps_in
from videodit.training.engine import Engine


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_process("cpu")
    shutdown()


@pytest.fixture(scope="module")
def engine(world: World) -> Engine:
    engine = toy.make_engine(world, 1)
    toy.train(engine, world, 1, 1)
    return engine


@pytest.fixture()
def run(tmp_path: Path, engine: Engine) -> Path:
    for step in (1, 2):
        assert save(tmp_path, step, engine, extra={"step": step})
    return tmp_path


def newest(run: Path) -> Path:
    return run / "checkpoints" / "step-00000002"


def cut_tensors(path: Path) -> None:
    file = path / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-7])


def flip_bit(path: Path) -> None:
    file = path / "rank-00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "tensors cut": cut_tensors,
    "bit flipped": flip_bit,
    "tensors missing": lambda path: (path / "rank-00000.safetensors").unlink(),
    "state missing": lambda path: (path / "state.json").unlink(),
    "killed before the manifest": lambda path: (path / "manifest.json").unlink(),
    "manifest empty": lambda path: (path / "manifest.json").write_text(""),
    "manifest another thing": lambda path: (path / "manifest.json").write_text("[1]"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_falls_back_and_is_named(run: Path, name: str) -> None:
    DAMAGE[name](newest(run))
    with pytest.warns(UserWarning, match="step-00000002 is passed over"):
        found = load_latest(run)
    assert found is not None and found.step == 1 and found.state["extra"] == {"step": 1}


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(run: Path) -> None:
    for step in steps_in(run):
        flip_bit(run / "checkpoints" / f"step-{step:08d}")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="step-00000002.*step-00000001"):
        load_latest(run)


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None


@pytest.mark.parametrize("call", ["_save_tensors", "_publish"])
def test_full_disk_keeps_the_old_one(run: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, call, full)
    with pytest.warns(UserWarning, match="No space left"):
        assert not save(run, 3, engine)
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    found = load_latest(run)
    assert found is not None and found.step == 2


def test_a_kill_while_writing_leaves_nothing_that_counts(run: Path, engine: Engine) -> None:
    shutil.copytree(newest(run), run / "checkpoints" / ".tmp-step-00000003")
    assert steps_in(run) == [1, 2]
    assert save(run, 3, engine)
    assert steps_in(run) == [2, 3] and not list((run / "checkpoints").glob(".*"))


def test_keep_last(tmp_path: Path, engine: Engine) -> None:
    for step in (1, 2, 3, 4):
        assert save(tmp_path, step, engine, keep_last=3)
    assert steps_in(tmp_path) == [2, 3, 4]
    assert save(tmp_path, 5, engine, keep_last=0)
    assert steps_in(tmp_path) == [2, 3, 4, 5]


def test_saving_a_step_again_replaces_it(run: Path, engine: Engine) -> None:
    assert save(run, 2, engine, extra={"again": True})
    found = load_latest(run)
    assert found is not None and found.state["extra"] == {"again": True}


def test_read_any_range(run: Path) -> None:
    found = Checkpoint.open(newest(run))
    whole = read_full(found, "weight")["up.weight"].flatten()
    assert torch.equal(found.read("weight", "up.weight", 13, 40), whole[13:53])
    with pytest.raises(UserError, match="no ema0 for conv.weight"):
        read_full(found, "ema0")


def test_another_model_is_refused(run: Path, engine: Engine) -> None:
    state = newest(run) / "state.json"
    found = Checkpoint.open(newest(run))
    found.state["shapes"]["up.weight"] = [3, 3]
    with pytest.raises(UserError, match="up.weight"):
        found.restore(engine)
    state.write_text(json.dumps({}))
    with pytest.raises(UserError, match="state.json is damaged"):
        Checkpoint.open(newest(run))
