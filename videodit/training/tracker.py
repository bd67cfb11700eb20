"""wandb behind a null object: logging that can never stop a run."""

import socket
import uuid
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from videodit.parallel.mesh import World


@dataclass(frozen=True)
class TrackerConfig:
    """Where metrics go besides metrics.jsonl."""

    mode: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto is online with a wandb login and network, else offline (send later: wandb sync RUN/wandb/offline-*)."""
    project: str = "videodit"
    """wandb project."""
    name: str | None = None
    """Name of the run in wandb; by default the run folder's name."""

    def __post_init__(self) -> None:
        if self.mode not in ("auto", "online", "offline", "disabled"):
            raise ValueError(f"tracker.mode is {self.mode!r}; use auto, online, offline or disabled")


class Tracker:
    """One run in wandb. On other ranks, when disabled, and after wandb has failed once, every call does nothing.

    Args:
        config: mode, project, name.
        run_dir: the run folder; the run's id is kept there, so that a resume goes on in the same wandb run.
        run_config: the resolved config, shown in wandb.
        world: only rank 0 tracks.
    """

    def __init__(self, config: TrackerConfig, run_dir: str | Path, run_config: Mapping[str, Any], world: World) -> None:
        self._run: Any = None
        self._wandb: Any = None
        if config.mode != "disabled" and world.is_main:
            self._guard(lambda: self._start(config, Path(run_dir), run_config))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Logs numbers of one optimizer step."""
        if self._run:
            self._guard(lambda: self._run.log({"step": step, **metrics}))

    def video(self, step: int, name: str, path: str | Path, caption: str = "") -> None:
        """Logs a finished .mp4 file."""
        if self._run:
            self._guard(
                lambda: self._run.log({"step": step, name: self._wandb.Video(str(path), caption=caption, format="mp4")})
            )

    def finish(self) -> None:
        """Sends what is left, for at most a minute."""
        if self._run:
            self._guard(lambda: self._run.finish())
        self._run = None

    def _start(self, config: TrackerConfig, run_dir: Path, run_config: Mapping[str, Any]) -> None:
        import wandb

        mode = config.mode if config.mode != "auto" else ("online" if _can_be_online(wandb) else "offline")
        folder = run_dir / "wandb"
        folder.mkdir(parents=True, exist_ok=True)
        id_file = folder / "run_id.txt"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:8])
        self._wandb = wandb
        self._run = wandb.init(
            project=config.project,
            name=config.name or run_dir.resolve().name,
            id=id_file.read_text().strip(),
            resume="allow" if mode == "online" else None,
            dir=str(run_dir),
            config=dict(run_config),
            mode=mode,
            settings=wandb.Settings(init_timeout=60, finish_timeout=60, console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def _guard(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:  # wandb raises many kinds, and none of them is worth a run
            self._run = None
            warnings.warn(f"wandb is off from here ({error}); metrics.jsonl has everything", stacklevel=3)


def _can_be_online(wandb: Any) -> bool:
    """A login is stored, and the server's port opens within three seconds."""
    server = urlsplit(wandb.setup().settings.base_url)
    try:
        socket.create_connection((server.hostname, server.port or 443), timeout=3).close()
    except OSError:
        return False
    return bool(wandb.login(prompt=False))
