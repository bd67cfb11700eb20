"""wandb beside real runs: servers that are not there or never answer, a full disk, and that it gets everything."""

import json
import shutil
import socket
import subprocess
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny
from tests.training import wandb_files
from tests.training.test_trainers import dit_config, metrics, vae_config
from videodit.training import tracker
from videodit.training.dit_trainer import train_dit
from videodit.training.run_folder import read_metrics
from videodit.training.tracker import TrackerConfig, _can_be_online
from videodit.training.vae_trainer import train_vae

AUTO = TrackerConfig(mode="auto")
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount"]


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of a run waits until wandb's process has started and written, however slow the machine is."""
    monkeypatch.setattr(tracker, "FINISH_LIMIT_S", 240.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Takes connections, and never answers; wandb is told that it is its server, and has a key for it."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        yield hole


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """All lines, samples' too, without times."""
    times = ("perf/", "data/wait_s")
    return [{key: value for key, value in line.items() if not key.startswith(times)} for line in read_metrics(run_dir)]


def warned(seen: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in seen if "wandb" in str(warning.message)]


def check_sent(run_dir: Path) -> list[dict[str, Any]]:
    """Every number of metrics.jsonl is in wandb's files, line by line; what they have."""
    lines, sent = read_metrics(run_dir), wandb_files.history(run_dir)
    assert len(lines) == len(sent) > 0
    for line, row in zip(lines, sent):
        numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
        assert numbers.items() <= row.items(), line
    return sent


@pytest.mark.slow
def test_a_server_that_is_gone(
    latents: Path, tmp_path: Path, server: socket.socket, recwarn: pytest.WarningsRecorder
) -> None:
    """The run is what it is without wandb, which has everything in its files."""
    server.close()
    sampled = {"max_steps": 2, "prompts": ["a", "b"], "sample_every": 2, "sample_raw": True}
    config = dit_config(tmp_path / "auto", latents, tracker=AUTO, **sampled)
    train_dit(config)
    train_dit(replace(config, run_dir=str(tmp_path / "disabled"), tracker=TrackerConfig(mode="disabled")))
    assert not warned(list(recwarn))
    assert figures(tmp_path / "auto") == figures(tmp_path / "disabled")
    sent = check_sent(tmp_path / "auto")
    for name in ("samples/ema", "samples/raw"):
        (row,) = [row for row in sent if f"{name}.captions" in row]
        assert row[f"{name}.captions"] == ["a", "b"] and len(row[f"{name}.videos"]) == 2


@pytest.mark.slow
def test_no_login(latents: Path, tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    with warnings.catch_warnings(record=True) as seen:
        train_dit(dit_config(tmp_path / "run", latents, max_steps=2, tracker=AUTO))
    assert not warned(seen) and len(metrics(tmp_path / "run")) == 2
    check_sent(tmp_path / "run")


@pytest.mark.slow
def test_a_server_that_never_answers(
    latents: Path, tmp_path: Path, server: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It costs one warning at the end."""
    monkeypatch.setattr(tracker, "FINISH_LIMIT_S", 2.0)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        train_dit(dit_config(tmp_path / "run", latents, max_steps=2, tracker=AUTO))
    assert len(warned(seen)) == 1 and "send it later" in warned(seen)[0]
    train_dit(dit_config(tmp_path / "disabled", latents, max_steps=2))
    assert figures(tmp_path / "run") == figures(tmp_path / "disabled")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["4k", "64k"])
def test_its_disk_is_full(latents: Path, tmp_path: Path, size: str) -> None:
    run = tmp_path / "full"
    (run / "wandb").mkdir(parents=True)
    setup = f"mount -t tmpfs -o size={size} tmpfs {run}/wandb"
    if not shutil.which("unshare") or subprocess.run([*UNSHARE, "sh", "-ec", setup], capture_output=True).returncode:
        pytest.skip("no private mounts here (unshare --user --mount), so no full disk")
    options = [f"--data.shards={latents}", "--max_steps=2", "--global_batch_size=4", "--micro_batch_size=2"]
    options += [*tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS, "--prompts", '["a"]', "--dtype=fp32"]
    for name, mode in (("full", "offline"), ("disabled", "disabled")):
        command = tiny.command(["train", "dit", f"--run_dir={tmp_path / name}", *options, f"--tracker.mode={mode}"])
        inside = [*UNSHARE, "sh", "-ec", f'{setup}; exec "$@"', "sh", *command]
        done = subprocess.run(inside, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count("wandb is off from here") <= (mode == "offline"), done.stderr
    assert figures(run) == figures(tmp_path / "disabled") and len(metrics(run)) == 2


@pytest.mark.slow
def test_a_vae_run_has_its_reconstructions(shards: Path, tmp_path: Path) -> None:
    offline = TrackerConfig(mode="offline")
    train_vae(
        vae_config(tmp_path / "run", shards, max_steps=2, sample_every=2, eval_shards=str(shards), tracker=offline)
    )
    sent = check_sent(tmp_path / "run")
    assert "eval/psnr_db" in {key for row in sent for key in row}
    (row,) = [row for row in sent if "samples/ema.captions" in row]
    assert row["samples/ema.captions"] == ["above: clip, below: reconstruction"]
    assert json.loads((tmp_path / "run/wandb/sent.json").read_text())["lines"] == len(sent)


def test_online_takes_a_server_and_a_login(monkeypatch: pytest.MonkeyPatch) -> None:
    """auto asks for no login, which may wait for the server, where nobody listens; a proxy listens for the server."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]

        def online(url: str, login: bool | None) -> tuple[bool, int]:
            asked = []
            settings = SimpleNamespace(settings=SimpleNamespace(base_url=url))
            wandb = SimpleNamespace(setup=lambda: settings, login=lambda prompt: asked.append(prompt) or login)
            return _can_be_online(wandb), len(asked)

        assert online(f"http://127.0.0.1:{port}", True) == (True, 1)
        assert online(f"http://127.0.0.1:{port}/path", False) == (False, 1)
        assert online(f"http://127.0.0.1:{port}", None) == (False, 1)
        for proxy in (f"http://127.0.0.1:{port}", f"127.0.0.1:{port}"):
            monkeypatch.setenv("HTTPS_PROXY", proxy)
            assert online("https://host.invalid", True) == (True, 1)
        monkeypatch.setenv("NO_PROXY", "host.invalid")
        assert online("https://host.invalid", True) == (False, 0)
        assert online("http://host.invalid", True) == (False, 0)
        monkeypatch.delenv("NO_PROXY")
    assert online(f"http://127.0.0.1:{port}", True) == (False, 0)
    assert online("https://host.invalid", True) == (False, 0)
