"""Checkpoints that are complete or do not count, and load at any ZeRO stage and number of ranks: finding and reading.

RUN/checkpoints/step-00001000/
    rank-00000.safetensors …   slices KIND/NAME@START, flat fp32: weight, exp_avg, exp_avg_sq, momentum_buffer, ema0 …
    state.json                 step, optimizer_step, shapes, ema profiles, and what the trainer adds
    manifest.json              sha256 and size of each file; written last

`checkpoint_writer` writes them. No deepspeed here: exporting needs none.
"""

import hashlib
import json
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from videodit.errors import UserError
from videodit.parallel.mesh import broadcast_object
from videodit.parallel.watch import tick

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
        tick()
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
        problem = _other_model(self.state, engine.shapes)
        if problem:
            raise UserError(
                f"checkpoint {self.path} {problem}: use the model config of the run, or choose another run_dir"
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
        for name, buffer in state_buffers(engine.module).items():
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


def load_average(
    module: torch.nn.Module, checkpoint: Checkpoint, weights: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Fills a module's trainable weights and its buffers, and sets it to evaluation mode.

    Args:
        module: to fill.
        checkpoint: of its run.
        weights: an average by parameter name; None for the first that the checkpoint has.
    """
    average = read_full(checkpoint) if weights is None else weights
    frozen = {name: p for name, p in module.named_parameters() if not p.requires_grad}
    module.load_state_dict({**frozen, **average, **read_buffers(checkpoint)})
    module.eval().requires_grad_(False)


def steps_in(run_dir: str | Path) -> list[int]:
    """Steps that have a checkpoint folder, whole or not, ascending."""
    return sorted(int(path.name[5:]) for path in (Path(run_dir) / FOLDER).glob("step-*") if path.name[5:].isdigit())


def folder_of(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of a step is, once it is complete."""
    return Path(run_dir) / FOLDER / f"step-{step:08d}"


def load_latest(
    run_dir: str | Path,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    wanted: Callable[[dict[str, Any]], bool] = lambda state: True,
) -> Checkpoint | None:
    """The newest good checkpoint. Call on every rank; rank 0 does the reading and hashing.

    Damaged and incomplete ones are named in a warning and passed over, and so are those of another model.

    Args:
        run_dir: the run.
        shapes: of the model's parameters by name; None takes a checkpoint of any model.
        wanted: asked with the contents of state.json; what it does not want is passed over in silence.
    Returns:
        None if the run has no checkpoint at all, or none that is wanted.
    Raises:
        UserError: if there are checkpoints, and none of them is good: training never starts over in silence.
    """
    rank_zero = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    chosen: tuple[str | None, str] = _choose(Path(run_dir), shapes, wanted) if rank_zero else (None, "")
    path, problem = broadcast_object(chosen)
    if problem:
        raise UserError(problem)
    if path is None:
        return None
    state = json.loads((Path(path) / "state.json").read_text())
    return Checkpoint(Path(path), state["step"], state)


def _choose(
    run_dir: Path, shapes: Mapping[str, tuple[int, ...]] | None, wanted: Callable[[dict[str, Any]], bool]
) -> tuple[str | None, str]:
    """Path of the newest good checkpoint that is wanted, and "" or why there is none."""
    damage = []
    for step in reversed(steps_in(run_dir)):
        path = folder_of(run_dir, step)
        problem = find_damage(path)
        if not problem:
            state = json.loads((path / "state.json").read_text())
            problem = "" if shapes is None else _other_model(state, shapes)
            if not problem and wanted(state):
                return str(path), ""
        if not problem:
            continue
        damage.append(f"{path.name} ({problem})")
        warnings.warn(f"checkpoint {path} is passed over: {problem}", stacklevel=3)
    if not damage:
        return None, ""
    return None, (
        f"no checkpoint in {run_dir / FOLDER} is good: {', '.join(damage)}; "
        "restore it, choose another run_dir, or delete the folder to start over"
    )


def _other_model(state: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What shows that a checkpoint is not of the model with these parameters, "" if nothing."""
    saved = {name: tuple(shape) for name, shape in state["shapes"].items()}
    for name in sorted(set(saved) | set(shapes)):
        if saved.get(name) != shapes.get(name):
            return f"has {name} of shape {saved.get(name)}, the model {shapes.get(name)}"
    return ""


def find_damage(path: Path) -> str:
    """What is wrong with a checkpoint folder, "" if nothing: every file is there with the size and sha256 it had."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        files = {str(name): (entry, entry["bytes"]) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        return "manifest.json is missing, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as problem:
        return f"manifest.json cannot be read ({type(problem).__name__})"
    for name, (entry, size) in files.items():
        file = path / name
        try:
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size or digest_of(file) != entry:
                return f"{name} is damaged"
        except OSError as problem:
            return f"{name} cannot be read ({problem.strerror})"
    return "" if "state.json" in files else "state.json is missing"


def state_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Buffers that belong to the module's state, by name."""
    kept = module.state_dict().keys()
    return {name: value for name, value in module.named_buffers() if name in kept}


def digest_of(file: Path) -> dict[str, Any]:
    """A file's entry in the manifest: bytes and sha256. `tick`s while it reads."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            digest.update(chunk)
            tick()
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
