"""wandb in a process of its own that follows the run folder: nothing that happens to it can reach training.

    metrics.jsonl, samples/ --(python -m videodit.training.tracker RUN)--> wandb

The process reads what the run has written anyway, so that a server that is slow, gone or never answers costs training
nothing, and what was not sent can be sent later by the same code (tools/send_metrics.py). RUN/wandb/sent.json counts
the lines of metrics.jsonl that were handed to wandb: no line is sent twice.
"""

import fcntl
import json
import os
import select
import socket
import subprocess
import sys
import time
import uuid
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from videodit.training.sent import cut_sent, read_sent, write_sent

if TYPE_CHECKING:  # the process needs no torch
    from videodit.parallel.mesh import World

POLL_S = 2.0
"""Between two looks at metrics.jsonl."""
RETRY_S = 300.0
"""Between two attempts to reach a server that did not answer."""
INIT_LIMIT_S = 60.0
"""For wandb to answer at the start of a run."""
FINISH_LIMIT_S = 15.0
"""That the end of a run waits for wandb to take the last figures; launchers kill 30 s after they told a run to stop."""
LATER = "metrics.jsonl has everything; send it later with: python tools/send_metrics.py"


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
    """The process that sends a run folder to wandb. On other ranks and when disabled, every call does nothing.

    Args:
        config: mode, project, name.
        run_dir: the run folder.
        run_config: the resolved config and what else wandb should show of the run.
        world: only rank 0 tracks.
    """

    def __init__(
        self, config: TrackerConfig, run_dir: str | Path, run_config: Mapping[str, Any], world: "World"
    ) -> None:
        self._config, self._run_dir, self._run_config = config, Path(run_dir), dict(run_config)
        self._is_main = world.is_main
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the process, or a new one. Call again whenever metrics.jsonl was cut, right after that."""
        self.finish()
        if not self._is_main:
            return
        try:
            cut_sent(self._run_dir)
            if self._config.mode == "disabled":
                return
            folder = self._run_dir / "wandb"
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "run_id.txt").exists():
                (folder / "run_id.txt").write_text(uuid.uuid4().hex[:8])
            settings = {
                "project": self._config.project,
                "name": self._config.name or self._run_dir.resolve().name,
                "mode": self._config.mode,
                "config": self._run_config,
            }
            (folder / "settings.json").write_text(json.dumps(settings, indent=1))
            with (folder / "tracker.log").open("ab") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "videodit.training.tracker", str(self._run_dir.resolve())],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    # Not the service of a caller that uses wandb itself: what ends this must not touch that.
                    env={name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"},
                    start_new_session=True,  # Ctrl-C and the launcher's signals are for training
                )
        except OSError as error:
            self._warn(f"{error}")

    def check(self) -> None:
        """Says once if wandb has failed; call now and then."""
        if self._process is not None and self._process.poll() is not None:
            self._process = None
            self._warn(f"see {self._run_dir / 'wandb/tracker.log'}")

    def finish(self) -> None:
        """Lets wandb take what is left, for at most FINISH_LIMIT_S."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        try:
            # A word, for worker processes may hold the pipe open.
            process.stdin.write(b"finish")
            process.stdin.close()
            code = process.wait(FINISH_LIMIT_S)
        except (OSError, subprocess.TimeoutExpired):
            code = 1
        if code:
            _kill_group(process)
            self._warn("it did not take all figures")

    def _warn(self, problem: str) -> None:
        warnings.warn(f"wandb is off from here: {problem}; {LATER} {self._run_dir}", stacklevel=3)


class Sender:
    """Sends the lines of a run's metrics.jsonl that were not sent before.

    Line n is wandb's step n (more by those that were cut off and written anew, which wandb has twice): wandb ignores
    steps that it has, so a line that may have been lost can be sent again. Charts have the optimizer step as x axis.

    Args:
        run_dir: a run folder with wandb/settings.json and wandb/run_id.txt.
        wait: for another sender to end, such as that of a run that was just killed.
    Raises:
        BlockingIOError: if another sender is at work and is not waited for.
    """

    def __init__(self, run_dir: Path, *, wait: bool = False) -> None:
        self._run_dir = run_dir
        self._lock = (run_dir / "wandb/.lock").open("a")
        fcntl.flock(self._lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        self._settings = json.loads((run_dir / "wandb/settings.json").read_text())
        self._wandb: Any = None
        self._run: Any = None
        self._sent = read_sent(run_dir)
        self._offset = 0

    def connect(self) -> None:
        """Opens the run in wandb, the same one every time; a server says itself which lines it has.

        Raises:
            Exception: whatever wandb raises.
        """
        import wandb

        self._wandb = wandb
        mode: Any = self._settings["mode"]
        mode = mode if mode != "auto" else ("online" if _can_be_online(wandb) else "offline")
        while list((self._run_dir / "wandb").glob(f"*run-{time.strftime('%Y%m%d_%H%M%S')}-*")):
            time.sleep(0.1)  # wandb names its files by the second, and writes over those of the same one
        self._run = wandb.init(
            project=self._settings["project"],
            name=self._settings["name"],
            id=(self._run_dir / "wandb/run_id.txt").read_text().strip(),
            resume="allow" if mode == "online" else None,
            dir=str(self._run_dir),
            config=self._settings["config"],
            mode=mode,
            settings=wandb.Settings(
                init_timeout=INIT_LIMIT_S, finish_timeout=FINISH_LIMIT_S, console="off", silent=True
            ),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        if mode == "online":
            known = max(self._run.step - self._sent["rewritten"], 0)
            self._sent = {**self._sent, "lines": min(self._sent["lines"], known)}

    @property
    def connected(self) -> bool:
        """Whether there is a run to send to."""
        return self._run is not None

    def send_new(self) -> int:
        """Hands over the lines that are new, and gives their number."""
        file = self._run_dir / "metrics.jsonl"
        count = 0
        if not file.exists():
            return count
        with file.open("rb") as stream:
            if not self._offset:
                for _ in range(self._sent["lines"]):
                    stream.readline()
                self._offset = stream.tell()
            stream.seek(self._offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    break  # being written
                self._offset += len(line)
                self._run.log(self._figures(json.loads(line)), step=self._sent["lines"] + self._sent["rewritten"])
                self._sent = {**self._sent, "lines": self._sent["lines"] + 1}
                count += 1
        if count:
            write_sent(self._run_dir, self._sent)
        return count

    def finish(self) -> None:
        """Waits until wandb has everything.

        Raises:
            Exception: whatever wandb raises.
        """
        self._run.finish()

    def _figures(self, line: dict[str, Any]) -> dict[str, Any]:
        figures: dict[str, Any] = {}
        for name, value in line.items():
            if isinstance(value, dict):  # caption -> file
                videos = {caption: self._run_dir / file for caption, file in value.items()}
                figures[name] = [
                    self._wandb.Video(str(path), caption=caption, format="mp4")
                    for caption, path in videos.items()
                    if path.is_file()
                ]
            elif isinstance(value, int | float):
                figures[name] = value
        return figures


def follow(run_dir: Path) -> int:
    """Sends what the run writes until stdin says that it has ended, or closes because it was killed.

    Returns:
        0 if wandb has everything.
    """
    sender = Sender(run_dir, wait=True)
    next_try = 0.0
    ended = False
    while not ended:
        if not sender.connected and time.monotonic() >= next_try:
            try:
                sender.connect()
            except Exception as error:  # wandb raises many kinds
                print(f"wandb cannot be reached, next attempt in {RETRY_S:.0f} s: {error}", flush=True)
                next_try = time.monotonic() + RETRY_S
        ready, _, _ = select.select([0], [], [], POLL_S)
        ended = bool(ready)
        if sender.connected:
            sender.send_new()
    if not sender.connected:
        return 1
    sender.finish()
    return 0


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    try:
        os.killpg(process.pid, 9)  # wandb's own helper processes are in its session
    except OSError:
        pass
    process.wait()


def _can_be_online(wandb: Any) -> bool:
    """A login is stored, and the port of the server, or of the proxy before it, opens within three seconds."""
    server = urlsplit(wandb.setup().settings.base_url)
    proxy = None if proxy_bypass(server.hostname) else getproxies().get(server.scheme)
    first = server if proxy is None else urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        port = first.port or (80 if first.scheme == "http" else 443)
        socket.create_connection((first.hostname, port), timeout=3).close()
    except OSError:
        return False
    return bool(wandb.login(prompt=False))


if __name__ == "__main__":
    sys.exit(follow(Path(sys.argv[1])))
