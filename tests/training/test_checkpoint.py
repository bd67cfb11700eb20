"""Faults injected into checkpoints: kills, damage, full disks. The engine is real, one rank, stage 1."""

import errno
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training import toy
from tests.training.toy import save
from videodit.errors import UserError
from videodit.parallel.mesh import World, init_process, shutdown
from videodit.training import checkpoint_writer as module
from videodit.training.checkpoint import Checkpoint, digest_of, load_latest, read_full, steps_in
from videodit.training.checkpoint_writer import CheckpointWriter
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
        assert not save(tmp_path, step, engine, extra={"step": step})
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


def break_disk(path: Path) -> None:
    """A read error: /proc/self/mem gives EIO at 0, and has the size that the manifest is told."""
    (path / "rank-00000.safetensors").unlink()
    (path / "rank-00000.safetensors").symlink_to("/proc/self/mem")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["rank-00000.safetensors"]["bytes"] = 0
    (path / "manifest.json").write_text(json.dumps(manifest))


TENSORS = "rank-00000.safetensors"
# name -> what is done to a checkpoint, and the file that is named
DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "tensors cut": (cut_tensors, TENSORS),
    "bit flipped": (flip_bit, TENSORS),
    "tensors on a broken disk": (break_disk, TENSORS),
    "tensors missing": (lambda path: (path / TENSORS).unlink(), TENSORS),
    "state missing": (lambda path: (path / "state.json").unlink(), "state.json"),
    "killed before the manifest": (lambda path: (path / "manifest.json").unlink(), "manifest.json"),
    "manifest empty": (lambda path: (path / "manifest.json").write_text(""), "manifest.json"),
    "manifest another thing": (lambda path: (path / "manifest.json").write_text("[1]"), "manifest.json"),
}


@pytest.mark.parametrize("name", list(DAMAGE))
def test_damage_falls_back_and_is_named(run: Path, name: str) -> None:
    damage, file = DAMAGE[name]
    damage(newest(run))
    with pytest.warns(UserWarning, match=f"step-00000002 is passed over: {file} (is|cannot be read)"):
        found = load_latest(run)
    assert found is not None and found.step == 1 and found.state["extra"] == {"step": 1}


def test_no_good_checkpoint_is_an_error_not_a_fresh_start(run: Path) -> None:
    for step in steps_in(run):
        flip_bit(run / "checkpoints" / f"step-{step:08d}")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="step-00000002.*step-00000001"):
        load_latest(run)


def test_no_checkpoint_is_a_fresh_start(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["save_file", "_publish"])
def test_full_disk_keeps_the_old_one(run: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    writer = CheckpointWriter(run, engine)
    with monkeypatch.context() as injected:
        injected.setattr(module, call, full)
        writer.save(3)
        written = writer.wait()
    assert written is not None and "No space left" in written.problem
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-00000001", "step-00000002"]
    found = load_latest(run)
    assert found is not None and found.step == 2
    writer.save(4)
    written = writer.wait()
    assert written is not None and not written.problem and steps_in(run) == [2, 4]


def test_what_a_kill_left_is_removed_and_does_not_count(run: Path, engine: Engine) -> None:
    for name in (".tmp-step-00000003-0123abcd", ".old-step-00000001"):
        shutil.copytree(newest(run), run / "checkpoints" / name)
    assert steps_in(run) == [1, 2]
    CheckpointWriter(run, engine)
    assert steps_in(run) == [1, 2] and not list((run / "checkpoints").glob(".*"))


def test_training_goes_on_while_a_checkpoint_is_written(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written is the state at the save, not that of the steps since; and nothing counts before it is whole."""
    go_on = threading.Event()
    write = module.save_file

    def write_later(*args: Any) -> None:
        assert go_on.wait(60)
        write(*args)

    monkeypatch.setattr(module, "save_file", write_later)
    engine = toy.make_engine(world, 1)
    toy.train(engine, world, 1, 2)
    writer = CheckpointWriter(tmp_path, engine)
    writer.save(2)
    toy.train(engine, world, 3, 5)
    assert writer.poll() is None and steps_in(tmp_path) == []
    with pytest.raises(RuntimeError, match="before the save before it"):
        writer.save(5)
    go_on.set()
    written = writer.wait()
    assert written is not None and (written.step, written.problem) == (2, "") and writer.wait() is None
    found = load_latest(tmp_path)
    again = toy.make_engine(world, 1)
    toy.train(again, world, 1, 2)
    assert found is not None
    toy.assert_same(toy.whole(found), toy.full_state(again))


def test_an_abandoned_save_leaves_nothing(run: Path, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = CheckpointWriter(run, engine)
    write = module.save_file
    monkeypatch.setattr(module, "save_file", lambda *args: (writer.abandon(), write(*args)))
    writer.save(3)
    written = writer.wait()
    assert written is not None and written.problem == "the run was stopped"
    assert steps_in(run) == [1, 2] and not list((run / "checkpoints").glob(".*"))


def test_retention(tmp_path: Path, engine: Engine) -> None:
    for step in (1, 2, 3, 4):
        assert not save(tmp_path, step, engine, keep_last=3)
    assert steps_in(tmp_path) == [2, 3, 4]
    for step in (5, 6, 7, 8, 9):
        assert not save(tmp_path, step, engine, keep_last=2, keep_every=3)
    assert steps_in(tmp_path) == [3, 6, 8, 9]
    assert not save(tmp_path, 10, engine, keep_last=0)
    assert steps_in(tmp_path) == [3, 6, 8, 9, 10]


def test_a_damaged_newer_one_does_not_cost_a_good_one(run: Path, engine: Engine) -> None:
    """After step 2 was passed over, training goes on from 1, now saving at other steps."""
    (run / "checkpoints/step-00000002").rename(run / "checkpoints/step-00000005")
    assert not save(run, 3, engine, keep_last=1)
    assert steps_in(run) == [3, 5]


def test_saving_a_step_again_replaces_it(run: Path, engine: Engine) -> None:
    assert not save(run, 2, engine, extra={"again": True})
    found = load_latest(run)
    assert found is not None and found.state["extra"] == {"again": True}


def test_read_any_range(run: Path) -> None:
    found = Checkpoint.open(newest(run))
    whole = read_full(found, "weight")["up.weight"].flatten()
    assert torch.equal(found.read("weight", "up.weight", 13, 40), whole[13:53])
    with pytest.raises(UserError, match="no ema0 for conv.weight"):
        read_full(found, "ema0")


def test_buffers_come_back(tmp_path: Path, world: World) -> None:
    module, measured = toy.make_toy(), torch.tensor([0.5, -2.0, 1e-3])
    module.register_buffer("statistics", measured.clone())
    engine = Engine(module, toy.optim_config(), zero_stage=1, dtype="fp32", world=world, max_steps=1)
    assert not save(tmp_path, 1, engine)
    module.statistics.zero_()
    found = load_latest(tmp_path)
    assert found is not None
    found.restore(engine)
    assert torch.equal(module.statistics, measured)


def test_another_model_is_passed_over_and_named(run: Path, engine: Engine) -> None:
    with pytest.raises(UserError, match=r"up.weight of shape \(19, 5\), the model \(3, 3\)"), pytest.warns(UserWarning):
        load_latest(run, {**engine.shapes, "up.weight": (3, 3)})
    found = load_latest(run, engine.shapes)
    assert found is not None and found.step == 2
    found.state["shapes"]["up.weight"] = [3, 3]
    with pytest.raises(UserError, match="up.weight"):
        found.restore(engine)
    rewrite_state(newest(run), found.state)
    with pytest.warns(UserWarning, match="step-00000002 is passed over: has up.weight"):
        found = load_latest(run, engine.shapes)
    assert found is not None and found.step == 1


def rewrite_state(path: Path, state: dict[str, Any]) -> None:
    """Another state.json, with the manifest that belongs to it."""
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = digest_of(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_damage_is_named_where_a_checkpoint_is_asked_for(run: Path) -> None:
    (newest(run) / "state.json").write_text(json.dumps({}))
    with pytest.raises(UserError, match="state.json is damaged"):
        Checkpoint.open(newest(run))


def test_what_a_checkpoint_says_is_on_the_disk(engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files and their folder are synced before the rename that shows them, and the folder above after it."""
    done: list[tuple[str, Path]] = []
    synced: dict[Path, int] = {}  # when its contents had last changed
    fsync, rename = os.fsync, os.rename

    def see_fsync(handle: int) -> None:
        fsync(handle)
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        done.append(("fsync", path))
        synced[path] = os.fstat(handle).st_mtime_ns

    def see_rename(source: Path, target: Path) -> None:
        assert {path: path.stat().st_mtime_ns for path in (source, *source.iterdir())} == synced
        rename(source, target)
        done.append(("rename", target))

    monkeypatch.setattr(os, "fsync", see_fsync)
    monkeypatch.setattr(os, "rename", see_rename)
    assert not save(tmp_path, 1, engine)
    target = tmp_path / "checkpoints/step-00000001"
    renamed = done.index(("rename", target))
    assert done[renamed + 1 :] == [("fsync", target.parent)]
    assert {path.name for path in target.iterdir()} == {"rank-00000.safetensors", "state.json", "manifest.json"}
    assert renamed == 4  # three files and their folder
