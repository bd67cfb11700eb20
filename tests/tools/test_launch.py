"""tools/launch.py: exit code, restarts, a SIGTERM that waits for the trainers; DeepSpeed's launcher on a hostfile."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import tiny

ROOT = Path(__file__).resolve().parents[2]

# Ranks as the trainers are: told to stop they take their time, then end with 128 + the signal's number.
RANK = """
import os, pathlib, signal, sys, time
folder, action = pathlib.Path(sys.argv[1]), sys.argv[2]
stop = []
signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
rank = int(os.environ["RANK"])
(folder / f"up-{rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}").write_text("")
if action == "wait" or rank == 0 and action != "0":
    while not stop:
        time.sleep(0.02)
if action == "wait":
    (folder / f"told-{rank}").write_text("")
    while not (folder / "save").exists():
        time.sleep(0.02)
    (folder / f"saved-{rank}").write_text("")
    sys.exit(128 + stop[0])
if rank == 0:
    sys.exit(0)
if action == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(int(action))
"""


def launch(folder: Path, action: str) -> list[str]:
    (folder / "rank.py").write_text(RANK)
    options = ["--standalone", "--nproc-per-node", "2", "--monitor-interval", "0.05", "--max-restarts=1"]
    return [sys.executable, str(ROOT / "tools/launch.py"), *options, str(folder / "rank.py"), str(folder), action]


@pytest.mark.parametrize("action, code", [("0", 0), ("2", 2), ("7", 7), ("143", 143), ("kill", 137)])
def test_the_exit_code_is_that_of_the_rank_that_failed(tmp_path: Path, action: str, code: int) -> None:
    done = subprocess.run(launch(tmp_path, action), capture_output=True, text=True, timeout=120)
    assert done.returncode == code, done.stderr
    # Which rank it was is told where the trainer may not have said anything.
    crashed = action in ("7", "kill")
    assert ("rank      : 1" in done.stderr) == crashed
    # Only what may go better the next time is started again.
    assert len(list(tmp_path.glob("up-1-*"))) == (2 if crashed else 1)


def test_a_stop_reaches_the_ranks_and_waits_for_them(tmp_path: Path) -> None:
    # torchrun's own way would be to send SIGKILL after this many seconds.
    with subprocess.Popen(
        launch(tmp_path, "wait"), env={**os.environ, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "0"}
    ) as process:
        try:
            tiny.wait_until(lambda: len(list(tmp_path.glob("up-*"))) == 2, process)
            process.send_signal(signal.SIGUSR1)  # which the ranks get as SIGTERM
            tiny.wait_until(lambda: len(list(tmp_path.glob("told-*"))) == 2, process)
            process.send_signal(signal.SIGTERM)  # schedulers repeat it
            (tmp_path / "save").write_text("")
            assert process.wait(120) == 143
        finally:
            process.kill()
    assert len(list(tmp_path.glob("saved-*"))) == len(list(tmp_path.glob("up-*"))) == 2  # nor started again


def test_a_sigterm_before_there_are_ranks_ends_it(tmp_path: Path) -> None:
    """It waits for the other node, in C++, where Python handles no signals."""
    (tmp_path / "rank.py").write_text(RANK)
    options = ["--nnodes=2", "--node-rank=0", "--rdzv-backend=static", "--rdzv-endpoint=127.0.0.1:0"]
    command = [sys.executable, ROOT / "tools/launch.py", *options, tmp_path / "rank.py", tmp_path, "wait"]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            handled = 1 << (signal.SIGTERM - 1)
            status = Path(f"/proc/{process.pid}/status")
            tiny.wait_until(lambda: bool(int(status.read_text().split("SigCgt:")[1].split()[0], 16) & handled), process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(120) == 143
        finally:
            process.kill()
    assert not list(tmp_path.glob("up-*"))


def train_command(tmp_path: Path, launcher: Sequence[str]) -> list[str]:
    root = tmp_path / "data"
    latents = tiny.make_latents(root / "latents", tiny.make_shards(root / "shards"), tiny.make_vae(root / "vae"))
    options = [f"--run_dir={tmp_path}/run", f"--data.shards={latents}", "--max_steps=100000", "--save_every=100000"]
    options += ["--global_batch_size=4", "--micro_batch_size=2", "--data.num_workers=1", "--optim.warmup_steps=0"]
    return [*launcher, "videodit", "train", "dit", *options, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS]


@pytest.mark.slow
def test_a_real_run_is_stopped_with_a_checkpoint(tmp_path: Path) -> None:
    launcher = [sys.executable, str(ROOT / "tools/launch.py"), "--standalone", "--nproc-per-node", "2", "-m"]
    figures = tmp_path / "run/metrics.jsonl"
    with subprocess.Popen(train_command(tmp_path, launcher)) as process:
        try:
            tiny.wait_until(lambda: figures.exists() and figures.read_text().count("\n") > 2, process)
            process.send_signal(signal.SIGTERM)
            assert process.wait(240) == 143
        finally:
            process.kill()
    last = json.loads(figures.read_text().splitlines()[-1])["step"]
    assert (tmp_path / f"run/checkpoints/step-{last:08d}/manifest.json").exists()


@pytest.mark.slow
def test_deepspeeds_launcher_starts_the_ranks_of_a_hostfile(tmp_path: Path) -> None:
    """The hostfile's format and command, on one node, which needs no ssh."""
    example = (ROOT / "tools/hostfile.example").read_text()
    comments = [line for line in example.splitlines() if line.startswith("#")]
    hosts = [line for line in example.splitlines() if line not in comments]
    assert hosts == ["node-1 slots=8", "node-2 slots=8"]
    (tmp_path / "hostfile").write_text("\n".join([*comments, "localhost slots=2", ""]))
    assert "--no_local_rank --module videodit train dit" in example
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--hostfile", str(tmp_path / "hostfile")]
    launcher += ["--no_ssh_check", "--master_addr=127.0.0.1", "--no_local_rank", "--module"]
    command = [*train_command(tmp_path, launcher), "--max_steps=2"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=240, env={**os.environ, "DS_ACCELERATOR": "cpu"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((tmp_path / "run/checkpoints/step-00000002/state.json").read_text())
    assert state["world_size"] == 2
