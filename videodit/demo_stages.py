"""The demo's stages: how long each took, which are done, and the settings that each was begun with."""

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from videodit.errors import UserError, user_error
from videodit.training.run_folder import differences

KEEP_EVERY_S = 5.0
"""How much of a stage's time a kill can lose."""


class Stages:
    """Times each stage in OUT/stages.json, over interruptions, and remembers which are done, and with which settings.

    Args:
        out: the demo's folder.
        settings: stage -> what its result depends on besides the stages before, by the names that messages give.
    Raises:
        UserError: if a stage that was begun has other settings now: its result would be passed off as theirs. If the
            file is damaged.
    """

    def __init__(self, out: Path, settings: Mapping[str, Mapping[str, Any]]) -> None:
        self._out, self._path, self._settings = out, out / "stages.json", settings
        self.seconds: dict[str, float] = {}
        self.done: list[str] = []
        self._begun: dict[str, Any] = {}
        if self._path.is_file():
            try:
                record = json.loads(self._path.read_text())
                self.seconds, self.done, self._begun = record["seconds"], record["done"], record.get("settings", {})
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{self._path} is damaged ({error}): remove {out}, or choose another --out") from None
            self._check()

    @contextmanager
    def stage(self, name: str, console: Console) -> Iterator[bool]:
        """Yields whether there is something to do."""
        if name in self.done:
            console.print(f"[dim]{name}: done before, in {self.seconds[name]:.0f} s[/dim]")
            yield False
            return
        console.print(f"[bold]{name}[/bold]")
        started = time.perf_counter() - self.seconds.get(name, 0.0)
        self._begun[name] = self._settings[name]
        self._write()  # a kill leaves no time to
        ended = threading.Event()

        def keep_time() -> None:
            while not ended.wait(KEEP_EVERY_S):
                self.seconds[name] = time.perf_counter() - started
                with contextlib.suppress(UserError):  # a full disk is for the stage to say
                    self._write()

        keeper = threading.Thread(target=keep_time, daemon=True)
        keeper.start()
        try:
            yield True
            self.done.append(name)
        finally:
            ended.set()
            keeper.join()
            self.seconds[name] = time.perf_counter() - started
            self._write()

    def _check(self) -> None:
        fix = f"choose another --out, or remove {self._out}"
        for name in [*self._begun, *self.seconds]:
            if name not in self._begun:
                raise UserError(f"--out {self._out} is of an older videodit, which did not note its settings: {fix}")
            # As JSON gives it back: tuples are lists.
            now = json.loads(json.dumps(self._settings[name]))
            for key, before, after in differences("", self._begun[name], now):
                raise UserError(
                    f"{key.lstrip('.')} is {json.dumps(after)}, but the {name} stage in --out {self._out} was begun "
                    f"with {json.dumps(before)}: set it back, {fix}"
                )

    def _write(self) -> None:
        record = {"seconds": self.seconds, "done": self.done, "settings": self._begun}
        temp = self._path.with_suffix(".tmp")
        try:
            temp.write_text(json.dumps(record, indent=2))
            temp.replace(self._path)
        except OSError as error:
            raise user_error(error, self._path) from None
