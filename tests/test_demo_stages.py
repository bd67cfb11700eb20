"""The demo's stages: what is done is not passed off as the result of other settings."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from videodit import demo_stages
from videodit.demo_stages import Stages
from videodit.errors import UserError

SETTINGS: dict[str, dict[str, Any]] = {
    "render": {"--num_clips": 3},
    "dit": {"depth of --dit_config": 2, "size": (4, 4)},
}


def begin(out: Path, settings: dict[str, dict[str, Any]], *names: str) -> None:
    stages = Stages(out, settings)
    for name in names:
        with stages.stage(name, Console(quiet=True)):
            pass


def test_settings_of_a_stage_that_has_not_begun_may_change(tmp_path: Path) -> None:
    begin(tmp_path, SETTINGS, "render")
    later = SETTINGS | {"dit": {"depth of --dit_config": 3}}
    begin(tmp_path, later, "dit")
    assert Stages(tmp_path, later).done == ["render", "dit"]


def test_settings_of_a_stage_that_was_interrupted_may_not(tmp_path: Path) -> None:
    stages = Stages(tmp_path, SETTINGS)
    with pytest.raises(KeyboardInterrupt), stages.stage("dit", Console(quiet=True)):
        raise KeyboardInterrupt
    assert Stages(tmp_path, SETTINGS).done == []
    with pytest.raises(UserError) as caught:
        Stages(tmp_path, SETTINGS | {"dit": {"depth of --dit_config": 3, "size": (4, 4)}})
    assert str(caught.value) == (
        f"depth of --dit_config is 3, but the dit stage in --out {tmp_path} was begun with 2: "
        f"set it back, choose another --out, or remove {tmp_path}"
    )


def test_a_kill_loses_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_stages, "KEEP_EVERY_S", 0.01)
    file, deadline = tmp_path / "stages.json", time.monotonic() + 60
    with Stages(tmp_path, SETTINGS).stage("render", Console(quiet=True)):
        while "render" not in json.loads(file.read_text())["seconds"]:
            assert time.monotonic() < deadline
        killed = Stages(tmp_path, SETTINGS)  # as the next start finds it
    assert killed.done == [] and killed.seconds["render"] > 0
    with killed.stage("render", Console(quiet=True)):
        before = killed.seconds["render"]
    assert killed.done == ["render"] and killed.seconds["render"] > before > 0


def test_settings_that_nobody_noted(tmp_path: Path) -> None:
    (tmp_path / "stages.json").write_text(json.dumps({"seconds": {"render": 1.0}, "done": ["render"]}))
    with pytest.raises(UserError, match=r"did not note its settings: choose another --out, or remove"):
        Stages(tmp_path, SETTINGS)


@pytest.mark.parametrize("text", ["{", "[]", '{"done": []}'])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "stages.json").write_text(text)
    with pytest.raises(UserError, match=r"stages\.json is damaged \(.*\): remove"):
        Stages(tmp_path, SETTINGS)
