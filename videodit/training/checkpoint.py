"""Checkpoints that are complete or do not count, and load at any ZeRO stage and number of ranks.

RUN/checkpoints/step-00001000/
    rank-00000.safetensors …   slices KIND/NAME@START, flat fp32: weight, exp_avg, exp_avg_sq, momentum_buffer, ema0 …
    state.json                 step, optimizer_step, shapes, ema profiles, and what the trainer adds
    manifest.json              sha256 and size of each file; written last

A checkpoint is written beside its place, synced and renamed, so that a kill at any moment leaves the old ones whole.
No deepspeed here: exporting needs none.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from videodit.errors import UserError
from videodit.parallel.mesh import any_rank, barrier, broadcast_object, gather_objects

if TYPE_CHECKING:
    from videodit.training.ema import PowerEMA
    from videodit.training.engine import Engine

FOLDER = "checkpoints"


@dataclass
class Checkpoint:
    """A complete, verified checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps taken, the trainer's count.
        state: contents of state.json.
    """

    path: Path
    step: int
    state: dict[str, Any]
    _index: dict[tuple[str, str], list[tuple[int, int, Path, str]]] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: str | Path) -> "Checkpoint":
        """Verifies every file against the manifest and reads the index.

        Raises:
            UserError: if the checkpoint is incomplete or damaged; names the file.
        """
        path = Path(path)
        problem = find_damage(path)
        if problem:
            raise UserError(f"checkpoint {path} cannot be used: {problem}")
        state = json.loads((path / "state.json").read_text())
        return cls(path, state["step"], state)

    def _slices(self) -> dict[tuple[str, str], list[tuple[int, int, Path, str]]]:
        if not self._index:
            index = defaultdict(list)
            for file in sorted(self.path.glob("rank-*.safetensors")):
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():
                        kind, rest = key.split("/", 1)
                        name, start = rest.rsplit("@", 1)
                        length = tensors.get_slice(key).get_shape()[0]
                        index[kind, name].append((int(start), int(start) + length, file, key))
            self._index = {key: sorted(pieces) for key, pieces in index.items()}
        return self._index

    def read(self, kind: str, name: str, start: int, length: int) -> torch.Tensor:
        """Any range of a flattened parameter, put together from whatever slices were saved.

        Returns:
            (length,) float32.
        Raises:
            UserError: if the checkpoint does not hold all of it (another model, another optimizer).
        """
        out = torch.empty(length)
        covered = 0
        for piece_start, piece_stop, file, key in self._slices().get((kind, name), []):
            low, high = max(start, piece_start), min(start + length, piece_stop)
            if low >= high:
                continue
            with safe_open(file, framework="pt") as tensors:
                part = tensors.get_slice(key)[low - piece_start : high - piece_start]
            out[low - start : high - start] = part
            covered += high - low
        if covered != length:
            raise UserError(
                f"checkpoint {self.path} has no {kind} for {name}[{start}:{start + length}]: "
                "it is of another model or optimizer; choose another run_dir"
            )
        return out

    def restore(self, engine: "Engine", ema: "PowerEMA | None" = None) -> dict[str, Any]:
        """Puts weights, moments and averages back, bit-exact. Call on every rank.

        Returns:
            what `save` was given as extra.
        Raises:
            UserError: if the model's parameters or the averages' profiles are others.
        """
        shapes = {name: tuple(shape) for name, shape in self.state["shapes"].items()}
        for name in sorted(set(shapes) | set(engine.shapes)):
            if shapes.get(name) != engine.shapes.get(name):
                raise UserError(
                    f"checkpoint {self.path} has {name} of shape {shapes.get(name)}, the model "
                    f"{engine.shapes.get(name)}: "
                    "use the model config of the run, or choose another run_dir"
                )
        profiles = tuple(ema.profiles) if ema else tuple(self.state["ema_profiles"])
        if profiles != tuple(self.state["ema_profiles"]):
            kept = self.state["ema_profiles"]
            raise UserError(
                f"ema_profiles is {list(profiles)}, but checkpoint {self.path} has {kept}: "
                f"set ema_profiles back to {kept}, or choose another run_dir"
            )
        engine.load_slices(self.read, self.state["optimizer_step"])
        read = read_buffers(self)
        for name, buffer in _buffers(engine.module).items():
            buffer.copy_(read[name])
        if ema:
            for kind, averages in ema.state().items():
                for part, average in zip(engine.slices(), averages, strict=True):
                    average.copy_(self.read(kind, part.name, part.start, average.numel()))
        extra: dict[str, Any] = self.state["extra"]
        return extra


def read_full(checkpoint: Checkpoint, kind: str = "ema0") -> dict[str, torch.Tensor]:
    """Whole tensors by parameter name, for export.

    Args:
        kind: weight, or ema0, ema1 … in the order of the run's profiles.
    Raises:
        UserError: if the checkpoint has no such kind.
    """
    shapes = checkpoint.state["shapes"]
    return {
        name: checkpoint.read(kind, name, 0, torch.Size(shape).numel()).view(shape) for name, shape in shapes.items()
    }


def read_buffers(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Whole buffers (measured statistics and the like) by name, float32."""
    return {
        name: checkpoint.read("buffer", name, 0, torch.Size(shape).numel()).view(shape)
        for name, shape in checkpoint.state["buffers"].items()
    }


def load_average(module: torch.nn.Module, checkpoint: Checkpoint, ema: int = 0) -> None:
    """Fills a module with one of the averages and its buffers, and sets it to evaluation mode."""
    module.load_state_dict({**read_full(checkpoint, f"ema{ema}"), **read_buffers(checkpoint)})
    module.eval().requires_grad_(False)


def save(
    run_dir: str | Path,
    step: int,
    engine: "Engine",
    ema: "PowerEMA | None" = None,
    extra: dict[str, Any] | None = None,
    keep_last: int = 2,
) -> bool:
    """Writes a checkpoint. Call on every rank; a full disk costs a warning and this checkpoint, never the run.

    Args:
        extra: anything JSON can hold that the trainer needs to go on; rank 0's counts.
        keep_last: older ones are removed once this one is complete; 0 keeps all.
    Returns:
        True if the checkpoint is there.
    """
    folder = Path(run_dir) / FOLDER
    target, temp = folder / f"step-{step:08d}", folder / f".tmp-step-{step:08d}"
    ranks = gather_objects(engine.rank)
    error: OSError | None = None
    digest: dict[str, Any] = {}
    try:
        if engine.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)
    except OSError as problem:
        error = problem
    barrier()  # the folder is there for all
    try:
        file = temp / f"rank-{engine.rank:05d}.safetensors"
        _save_tensors(_slices_by_key(engine, ema), file)
        digest = {file.name: _digest(file)}
    except (OSError, SafetensorError) as problem:
        error = error or OSError(str(problem))
    digests = gather_objects(digest)
    if not any_rank(error is not None) and engine.rank == 0:
        state = {
            "format": 1,
            "step": step,
            "optimizer_step": engine.optimizer_step,
            "world_size": len(ranks),
            "zero_stage": engine.zero_stage,
            "shapes": engine.shapes,
            "buffers": {name: list(value.shape) for name, value in _buffers(engine.module).items()},
            "ema_profiles": list(ema.profiles) if ema else [],
            "extra": extra or {},
        }
        try:
            _publish(temp, target, state, {name: entry for part in digests for name, entry in part.items()})
        except OSError as problem:
            error = problem
    if any_rank(error is not None):
        if engine.rank == 0:
            shutil.rmtree(temp, ignore_errors=True)
        if error is not None:
            warnings.warn(f"no checkpoint at step {step}: {error}; training goes on with the last one", stacklevel=2)
        return False
    if engine.rank == 0 and keep_last > 0:
        for old in steps_in(run_dir)[:-keep_last]:
            _remove(folder / f"step-{old:08d}")
    return True


def steps_in(run_dir: str | Path) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, ascending."""
    return sorted(int(path.name[5:]) for path in (Path(run_dir) / FOLDER).glob("step-*") if path.name[5:].isdigit())


def drop_after(run_dir: str | Path, step: int) -> None:
    """Removes the checkpoints after a step, for the run goes on from there in another way. On one rank."""
    for later in steps_in(run_dir):
        if later > step:
            _remove(Path(run_dir) / FOLDER / f"step-{later:08d}")


def load_latest(
    run_dir: str | Path, wanted: Callable[[dict[str, Any]], bool] = lambda state: True
) -> Checkpoint | None:
    """The newest good checkpoint. Call on every rank; rank 0 does the reading and hashing.

    Damaged and incomplete ones are named in a warning and passed over.

    Args:
        run_dir: of the run.
        wanted: asked with the contents of state.json; what it does not want is passed over.
    Returns:
        None if the run has no checkpoint at all, or none that is wanted.
    Raises:
        UserError: if there are checkpoints, and none of them is good: training never starts over in silence.
    """
    rank_zero = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    chosen: tuple[str | None, str] = _choose(Path(run_dir), wanted) if rank_zero else (None, "")
    path, problem = broadcast_object(chosen)
    if problem:
        raise UserError(problem)
    if path is None:
        return None
    state = json.loads((Path(path) / "state.json").read_text())
    return Checkpoint(Path(path), state["step"], state)


def _choose(run_dir: Path, wanted: Callable[[dict[str, Any]], bool]) -> tuple[str | None, str]:
    damage = []
    for step in reversed(steps_in(run_dir)):
        path = run_dir / FOLDER / f"step-{step:08d}"
        problem = find_damage(path)
        if not problem:
            if wanted(json.loads((path / "state.json").read_text())):
                return str(path), ""
            continue
        damage.append(f"{path.name} ({problem})")
        warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=3)
    if not damage:
        return None, ""
    return None, f"no checkpoint in {run_dir / FOLDER} is good: {', '.join(damage)}; delete the folder to start over"


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint folder, "" if nothing: every file is there with the size and sha256 it had."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        for name, entry in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != entry["bytes"] or _digest(path / name) != entry:
                return f"{name} is damaged"
        return "" if "state.json" in manifest["files"] else "state.json is missing"
    except FileNotFoundError:
        return "manifest.json is missing, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"manifest.json cannot be read ({type(problem).__name__})"


def _buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the module's state, by name."""
    kept = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in kept}


def _slices_by_key(engine: "Engine", ema: "PowerEMA | None") -> dict[str, torch.Tensor]:
    slices = engine.slices()
    tensors = {}
    for part in slices:
        for kind, tensor in {"weight": part.weight, **part.state}.items():
            tensors[f"{kind}/{part.name}@{part.start}"] = tensor
    for kind, averages in (ema.state() if ema else {}).items():
        for part, average in zip(slices, averages, strict=True):
            tensors[f"{kind}/{part.name}@{part.start}"] = average
    if engine.rank == 0:
        for name, value in _buffers(engine.module).items():
            tensors[f"buffer/{name}@0"] = value.flatten()
    # Copies: slices are views that share storage, which safetensors refuses.
    return {key: tensor.detach().to("cpu", torch.float32, copy=True) for key, tensor in tensors.items()}


def _save_tensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file)
    _sync(file)


def _publish(temp: Path, target: Path, state: dict[str, Any], files: dict[str, Any]) -> None:
    """Writes state and manifest, then makes the folder appear under its name in one rename."""
    (temp / "state.json").write_text(json.dumps(state, indent=1))
    _sync(temp / "state.json")
    files["state.json"] = _digest(temp / "state.json")
    (temp / "manifest.json").write_text(json.dumps({"format": 1, "files": files}, indent=1))
    _sync(temp / "manifest.json")
    _sync(temp)
    if target.exists():
        _remove(target)
    os.rename(temp, target)
    _sync(target.parent)


def _remove(path: Path) -> None:
    """Takes the folder out of sight first, so that a kill in between leaves no half of one."""
    gone = path.with_name(f".old-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _digest(file: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
