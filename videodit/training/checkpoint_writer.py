"""Writes checkpoints while training goes on: it is held up by the copy to host memory only.

`CheckpointWriter.save` copies this rank's state; a thread of each rank then writes, syncs and hashes it in a folder
beside its place, and rank 0 renames the folder once every rank's part is there. So a kill at any moment leaves the old
checkpoints whole, and nothing under the new one's name. The threads talk in a group of their own.
"""

import contextlib
import json
import os
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from videodit.parallel.mesh import background_group, broadcast_object, gather_objects
from videodit.training.checkpoint import FOLDER, digest_of, folder_of, state_buffers, steps_in
from videodit.training.durable import sync
from videodit.training.tensor_file import save_file

if TYPE_CHECKING:
    from videodit.training.ema import PowerEMA
    from videodit.training.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True)
class Written:
    """How a save ended, the same on every rank.

    Attributes:
        step: of the checkpoint.
        seconds: from the copy's end to the new checkpoint's appearance and the old ones' removal.
        problem: why there is no checkpoint; "" if there is one.
    """

    step: int
    seconds: float
    problem: str


class CheckpointWriter:
    """Writes a run's checkpoints. Make it on every rank, after the run folder's lock was taken.

    What an earlier run was writing when it was killed is removed. The host memory that the copy takes (the size of the
    rank's part of a checkpoint) is kept from one save to the next.

    Args:
        run_dir: the run.
        engine: whose weights and moments are saved.
        ema: averages that are saved with them.
        keep_last: as many of the newest checkpoints stay; 0 keeps all.
        keep_every: those of steps that it divides stay too; 0 for none.
    """

    def __init__(
        self,
        run_dir: str | Path,
        engine: "Engine",
        ema: "PowerEMA | None" = None,
        *,
        keep_last: int = 2,
        keep_every: int = 0,
    ) -> None:
        self._run_dir, self._engine, self._ema = Path(run_dir), engine, ema
        self._keep_last, self._keep_every = keep_last, keep_every
        self._is_main = engine.rank == 0
        self._group = background_group()
        # A rank of a killed run may live on for a while: what it still writes must not go where this run does.
        self._run_id = broadcast_object(secrets.token_hex(4))
        self._host: dict[str, torch.Tensor] = {}
        self._thread: threading.Thread | None = None
        self._result: Written | Exception | None = None
        self._publishing, self._abandoned = threading.Lock(), False
        if self._is_main:
            for left in [*self._folder.glob(".tmp-*"), *self._folder.glob(".old-*")]:
                shutil.rmtree(left, ignore_errors=True)

    @property
    def _folder(self) -> Path:
        return self._run_dir / FOLDER

    def save(self, step: int, extra: dict[str, Any] | None = None) -> None:
        """Copies the state to host memory and starts writing it. Call on every rank, after `wait`.

        A full disk costs this checkpoint, never the run: see what `poll` or `wait` returns.

        Args:
            step: optimizer steps taken.
            extra: anything JSON can hold that the trainer needs to go on; rank 0's counts.
        """
        if self._thread:
            raise RuntimeError(f"step {step} is saved before the save before it was waited for")
        self._copy_to_host()
        state = self._describe(step, extra or {}) if self._is_main else {}
        self._thread = threading.Thread(target=self._run, args=(step, state), name=f"save step {step}", daemon=True)
        self._thread.start()

    def poll(self) -> Written | None:
        """How the save under way ended, once; None if it goes on, or there is none."""
        return None if self._thread is None or self._thread.is_alive() else self.wait()

    def wait(self) -> Written | None:
        """Waits for the end of the save under way, and tells it once; None if there is none.

        Raises:
            RuntimeError: if a rank is gone.
        """
        if self._thread is None:
            return None
        self._thread.join()
        self._thread, result = None, self._result
        if isinstance(result, Exception):
            raise result
        return result

    def abandon(self) -> None:
        """Lets the save under way come to nothing, unless it is being published, without waiting for it."""
        with self._publishing:
            self._abandoned = True

    def drop_after(self, step: int) -> None:
        """Removes the checkpoints after a step, for the run goes on from there in another way. Call after `wait`."""
        for later in steps_in(self._run_dir) if self._is_main else ():
            if later > step:
                _remove(folder_of(self._run_dir, later))

    def _copy_to_host(self) -> None:
        kept, self._host, on_gpu = self._host, {}, False
        for key, tensor in _tensors_by_key(self._engine, self._ema):
            on_gpu |= tensor.is_cuda
            host = kept.get(key)
            if host is None:
                # Pinned memory takes a GPU's tensors several times as fast.
                host = torch.empty(tensor.numel(), pin_memory=tensor.is_cuda)
            self._host[key] = host.copy_(tensor, non_blocking=True)
        if on_gpu:
            torch.cuda.synchronize()

    def _describe(self, step: int, extra: dict[str, Any]) -> dict[str, Any]:
        return {
            "format": 1,
            "step": step,
            "optimizer_step": self._engine.optimizer_step,
            "world_size": self._engine.world_size,
            "zero_stage": self._engine.zero_stage,
            "shapes": self._engine.shapes,
            "buffers": {name: list(value.shape) for name, value in state_buffers(self._engine.module).items()},
            "ema_profiles": list(self._ema.profiles) if self._ema else [],
            "extra": extra,
        }

    def _run(self, step: int, state: dict[str, Any]) -> None:
        """The thread."""
        start, problem = time.perf_counter(), ""
        temp = self._folder / f".tmp-step-{step:08d}-{self._run_id}"
        try:
            try:
                self._write(temp, step, state)
            except OSError as error:
                problem = str(error)
                if self._is_main:
                    shutil.rmtree(temp, ignore_errors=True)
            self._result = Written(step, time.perf_counter() - start, problem)
        except Exception as error:
            self._result = error

    def _write(self, temp: Path, step: int, state: dict[str, Any]) -> None:
        """Raises OSError, on every rank, if the checkpoint cannot be written."""

        def make_folder() -> None:
            if self._is_main:
                temp.mkdir(parents=True)

        def write_part() -> dict[str, Any]:
            file = temp / f"rank-{self._engine.rank:05d}.safetensors"
            save_file(self._host, file)
            return {file.name: digest_of(file)}

        def publish() -> None:
            if self._is_main:
                with self._publishing:
                    if self._abandoned:
                        raise OSError("the run was stopped")
                    _publish(temp, folder_of(self._run_dir, step), state, files)

        self._together(make_folder)
        files = {name: entry for part in self._together(write_part) for name, entry in part.items()}
        self._together(publish)
        if self._is_main:
            for old in self._superseded(step):
                with contextlib.suppress(OSError):  # the next save tries again
                    _remove(folder_of(self._run_dir, old))

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Does this rank's part and waits for the others'; returns all results. OSError on every rank if one fails."""
        result, problem = None, ""
        try:
            result = work()
        except OSError as error:
            problem = str(error)
        reports = gather_objects((result, problem), self._group)
        for rank, (_, problem) in enumerate(reports):
            if problem:
                raise OSError(f"rank {rank}: {problem}" if len(reports) > 1 else problem)
        return [done for done, _ in reports]  # type: ignore[misc]

    def _superseded(self, step: int) -> list[int]:
        if not self._keep_last:
            return []
        # Those after this step were passed over when the run was resumed: they neither count nor go.
        until_now = [old for old in steps_in(self._run_dir) if old <= step]
        return [old for old in until_now[: -self._keep_last] if not self._keep_every or old % self._keep_every]


def _tensors_by_key(engine: "Engine", ema: "PowerEMA | None") -> Iterator[tuple[str, torch.Tensor]]:
    """This rank's tensors, flat, with their keys in its file; one by one, for of 8-bit moments they are copies."""
    slices = engine.slices()
    for part in slices:
        yield f"weight/{part.name}@{part.start}", part.weight.detach()
        for kind, moment in part.state.items():
            yield f"{kind}/{part.name}@{part.start}", moment().detach()
    for kind, averages in (ema.state() if ema else {}).items():
        for part, average in zip(slices, averages, strict=True):
            yield f"{kind}/{part.name}@{part.start}", average.detach()
    if engine.rank == 0:
        for name, value in state_buffers(engine.module).items():
            yield f"buffer/{name}@0", value.detach().flatten()


def _publish(temp: Path, target: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Writes state and manifest, then makes the folder appear under its name in one rename."""
    (temp / "state.json").write_text(json.dumps(state, indent=1))
    sync(temp / "state.json")
    files["state.json"] = digest_of(temp / "state.json")
    (temp / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=1))
    sync(temp / "manifest.json")
    sync(temp)
    if target.exists():
        _remove(target)
    os.rename(temp, target)
    sync(target.parent)


def _remove(path: Path) -> None:
    """Takes the folder out of sight first, so that a kill in between leaves no half of one."""
    gone = path.with_name(f".old-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)
