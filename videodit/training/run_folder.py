"""The folder of one run: its lock, its resolved config, its metrics.jsonl."""

import contextlib
import fcntl
import json
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import yaml

from videodit.errors import UserError
from videodit.parallel.mesh import World, broadcast_object
from videodit.training.checkpoint import FOLDER, steps_in
from videodit.training.durable import write_durably

EVALUATED = "samples/.evaluated"
KINDS = {False: "train vae", True: "train dit"}
"""Verb of a run by whether its config has prompts."""
OTHERS = {
    "ingest.json": "shards",
    "index.jsonl": "shards",
    "latents.json": "latents",
    "model_index.json": "a model",
    "model.safetensors": "a model",
}
"""Files of folders that are no run folders, and what they hold."""
SKIPPED = "skipped.jsonl"
"""Name of the list of skipped steps."""


class RunFolder:
    """A run folder that this run holds alone; only rank 0 writes, the other ranks' calls do nothing.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path, lock: IO[str] | None, is_main: bool, config_text: str) -> None:
        self.path = path
        self._lock, self._is_main, self._config_text = lock, is_main, config_text
        self._metrics: IO[str] | None = None
        self._warned = False

    @classmethod
    def open(
        cls,
        path: str | Path,
        config_text: str,
        world: World,
        *,
        fixed_keys: Sequence[str] = ("model", "text", "flow", "seed"),
    ) -> "RunFolder":
        """Makes the folder, locks it, and, for a run that begins, writes config.yaml. Call on every rank.

        Args:
            config_text: the resolved config as YAML.
            fixed_keys: top-level keys that a run with checkpoints must not change.
        Raises:
            UserError: on every rank: another process holds the folder, it cannot be written, or a fixed key changed.
        """
        path, lock, problem = Path(path), None, ""
        if world.is_main:
            try:
                other = next((what for name, what in OTHERS.items() if (path / name).is_file()), None)
                if other:
                    raise UserError(f"run_dir {path} holds {other}, no run: choose another run_dir")
                for folder in (path, path / FOLDER, path / "samples"):
                    folder.mkdir(parents=True, exist_ok=True)
                lock = _lock(path)
                if steps_in(path):
                    _check_config(path, config_text, fixed_keys)
                else:
                    write_durably(path / "config.yaml", config_text)
            except UserError as error:
                problem = str(error)
            except FileExistsError:
                problem = f"run_dir {path} is a file; choose another run_dir"
            except OSError as error:
                problem = f"run_dir {path} cannot be written ({error.strerror}); choose another run_dir"
        problem = broadcast_object(problem)
        if problem:
            if lock:
                lock.close()
            raise UserError(problem)
        return cls(path, lock, world.is_main, config_text)

    def accept_config(self) -> None:
        """Writes config.yaml of a run that goes on, once its checkpoint has taken the new settings."""
        if self._is_main:
            write_durably(self.path / "config.yaml", self._config_text)

    def freeze(
        self,
        name: str,
        values: Mapping[str, Any],
        what: str = "",
        fix: str = "set it back",
        *,
        free: tuple[str, ...] = (),
    ) -> None:
        """Writes values that must not change while the run goes on. Call on every rank.

        Args:
            name: of the file, JSON.
            values: what to keep; rank 0's count.
            what: the values' name in messages, if their keys are not enough.
            fix: what to do where they differ, in messages.
            free: endings of the keys that may still change.
        Raises:
            UserError: on every rank, if the run has checkpoints and began with others.
        """
        problem = ""
        if self._is_main:
            try:
                self._freeze(self.path / name, dict(values), what, fix, free)
            except UserError as error:
                problem = str(error)
        problem = broadcast_object(problem)
        if problem:
            raise UserError(problem)

    def _freeze(self, file: Path, values: dict[str, Any], what: str, fix: str, free: tuple[str, ...]) -> None:
        old = _read_kept(file, json.loads) if file.exists() and steps_in(self.path) else values
        changed = [item for item in differences("", old, values) if not item[0].endswith(free)]
        if changed:
            key, before, after = changed[0]
            name = f"{what} of {key.lstrip('.')}" if what else key.lstrip(".")
            raise UserError(
                f"{name}: {after}, but run_dir {self.path} was trained with {before}: {fix}, or choose another run_dir"
            )
        write_durably(file, json.dumps(values, indent=1) + "\n")

    def frozen(self, name: str) -> dict[str, Any]:
        """What a run that goes on has frozen under this name; {} if it begins, or has not. Call on every rank.

        Raises:
            UserError: on every rank, if the file is damaged.
        """
        file = self.path / name
        values, problem = {}, ""
        if self._is_main and file.exists() and steps_in(self.path):
            try:
                values = _read_kept(file, json.loads)
            except UserError as error:
                problem = str(error)
        values, problem = broadcast_object((values, problem))
        if problem:
            raise UserError(problem)
        return values

    def note_clips(self, clips: Mapping[str, int]) -> None:
        """Warns of clips that came or went since the run was started last. A full disk costs the note.

        Args:
            clips: how many there are, by bucket and stage.
        """
        if not self._is_main:
            return
        file, before = self.path / "clips.json", dict(clips)
        if file.exists() and steps_in(self.path):
            with contextlib.suppress(UserError):  # of a damaged file: other ranks would wait
                before = _read_kept(file, json.loads)
        for name, was, now in differences("", before, dict(clips)):
            warnings.warn(
                f"{name.lstrip('.')} has {now or 0} clips, {was or 0} when this run was started last: they come in "
                "another order from here on, in this epoch some of them twice or not at all",
                stacklevel=2,
            )
        with contextlib.suppress(OSError):
            write_durably(file, json.dumps(clips, indent=1) + "\n")

    def evaluated_step(self) -> int:
        """The last step whose samples and held-out figures are complete; 0 if none was noted. Call on every rank."""
        file = self.path / EVALUATED
        return broadcast_object(int(file.read_text() or 0) if self._is_main and file.exists() else 0)

    def note_evaluated(self, step: int) -> None:
        """Notes that samples and held-out figures of a step are complete. A full disk costs the note."""
        if self._is_main:
            with contextlib.suppress(OSError):
                write_durably(self.path / EVALUATED, f"{step}\n")

    def last_metric(self, name: str) -> float:
        """The newest value of a figure in metrics.jsonl; 0 if it has none, and on other ranks than 0."""
        file = self.path / "metrics.jsonl"
        if self._is_main and file.exists():
            for line in reversed(file.read_text().splitlines()):
                if _step_of(line) < math.inf and name in (figures := json.loads(line)):
                    return float(figures[name])
        return 0.0

    def cut_metrics(self, step: int, *, evaluated: bool = True) -> int:
        """Drops the lines of metrics.jsonl after a step (0: all), for those steps are about to be run again.

        Args:
            step: the last one that stays.
            evaluated: whether its held-out figures stay too; they are lines of their own, without a loss.
        Returns:
            how many steps that were; 0 on other ranks than 0.
        """
        file = self.path / "metrics.jsonl"
        if not self._is_main or not file.exists():
            return 0
        self._close_metrics()
        written = file.read_text()
        kept = [line for line in written.splitlines() if _step_of(line) <= step]
        if not evaluated:
            kept = [line for line in kept if _step_of(line) < step or "train/loss" in json.loads(line)]
        text = "".join(f"{line}\n" for line in kept)
        try:
            if written.startswith(text):  # but for a torn line in between; needs no space
                os.truncate(file, len(text.encode()))
            else:
                write_durably(file, text)
        except OSError as error:
            warnings.warn(f"metrics.jsonl keeps lines after step {step}: {error}; training goes on", stacklevel=2)
        steps = {_step_of(line) for line in written.splitlines()}
        return sum(step < other < math.inf for other in steps)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl; numbers that are not finite become null. A full disk costs a warning."""
        if not self._is_main:
            return
        line = json.dumps({"step": step, **{key: _json_value(value) for key, value in metrics.items()}})
        with self._metrics_may_be_lost():
            if self._metrics is None:
                self._metrics = (self.path / "metrics.jsonl").open("a", buffering=1)
            self._metrics.write(f"{line}\n")

    def log_skipped(self, step: int, record: Mapping[str, Any]) -> None:
        """Appends one line to skipped.jsonl, and warns; what a run that goes back or resumes has written stays."""
        if not self._is_main:
            return
        line = json.dumps({"step": step, **{key: _json_value(value) for key, value in record.items()}})
        try:
            with (self.path / SKIPPED).open("a") as file:
                file.write(f"{line}\n")
        except OSError as error:
            warnings.warn(f"{SKIPPED} cannot be written: {error}; training goes on", stacklevel=2)
        warnings.warn(f"step {step} is skipped: {record['reason']}; its samples are in {SKIPPED}", stacklevel=2)

    def close(self) -> None:
        """Gives the folder free."""
        self._close_metrics()
        if self._lock:
            self._lock.close()
            self._lock = None

    def _close_metrics(self) -> None:
        metrics, self._metrics = self._metrics, None
        if metrics:
            with self._metrics_may_be_lost():
                metrics.close()

    @contextlib.contextmanager
    def _metrics_may_be_lost(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._warned:
                warnings.warn(f"metrics.jsonl cannot be written: {error}; training goes on", stacklevel=4)
            self._warned = True

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl; a torn last line is left out."""
    file = Path(path) / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if _step_of(line) < math.inf]


def _lock(path: Path) -> IO[str]:
    # The kernel drops the lock with the process, so a killed run leaves nothing behind to clean up.
    lock = (path / ".lock").open("a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        holder = lock.read().strip() or "unknown"
        lock.close()
        raise UserError(f"run_dir {path} is in use by process {holder}; stop it, or choose another run_dir") from None
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    return lock


def _check_config(path: Path, text: str, fixed_keys: Sequence[str]) -> None:
    file = path / "config.yaml"
    if file.exists():
        old, new = _read_kept(file, yaml.safe_load), yaml.safe_load(text) or {}
        kinds = [KINDS["prompts" in config] for config in (old, new)]
        if kinds[0] != kinds[1]:
            raise UserError(f"run_dir {path} holds a run of {kinds[0]}, this is {kinds[1]}: choose another run_dir")
        for key in fixed_keys:
            for name, before, after in differences(key, old.get(key), new.get(key)):
                raise UserError(
                    f"{name} is {after}, but run_dir {path} was trained with {before}: "
                    f"set {name} back to {before}, or choose another run_dir"
                )


def _read_kept(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """What a run wrote when it began. Raises UserError if that is no longer there."""
    values = None
    with contextlib.suppress(ValueError, yaml.YAMLError):
        values = parse(file.read_text())
    if not isinstance(values, dict):
        raise UserError(
            f"{file} is empty or damaged: restore it or, if this command has the settings that the run began with, "
            "delete it"
        )
    return values


def differences(name: str, old: Any, new: Any) -> list[tuple[str, Any, Any]]:
    """The values that differ between two nested configs: their dotted names below name, and both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(set(old) | set(new), key=str)
        return [item for key in keys for item in differences(f"{name}.{key}", old.get(key), new.get(key))]
    return [] if old == new else [(name, old, new)]


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by a kill


def _json_value(value: Any) -> Any:
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
