"""The run folder's lock, config check and metrics; the meters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from videodit.errors import UserError
from videodit.parallel.mesh import World
from videodit.training.meters import StepMeter, count_flops, memory_gib, peak_flops
from videodit.training.run_folder import RunFolder, read_metrics

ALONE = World(0, 1, 0, torch.device("cpu"))
OTHER = World(1, 2, 1, torch.device("cpu"))


def test_second_process_is_refused_with_the_holders_pid(tmp_path: Path) -> None:
    code = (
        "import sys; from videodit.parallel.mesh import World; from videodit.training.run_folder import RunFolder;"
        "folder = RunFolder.open(sys.argv[1], 'model: 1', World(0, 1, 0, None)); print('held', flush=True); input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout and holder.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"{tmp_path}.*{holder.pid}"):
        RunFolder.open(tmp_path, "model: 1", ALONE)
    holder.kill()  # a killed run leaves no stale lock
    holder.communicate()
    RunFolder.open(tmp_path, "model: 1", ALONE).close()


def test_resume_with_another_model_is_refused(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "model: {depth: 4}\nlr: 1", ALONE).close()
    RunFolder.open(tmp_path, "model: {depth: 5}\nlr: 1", ALONE).close()  # nothing was trained yet
    (tmp_path / "checkpoints" / "step-00000010").mkdir()
    RunFolder.open(tmp_path, "model: {depth: 5}\nlr: 2", ALONE).close()  # only fixed keys count
    with pytest.raises(UserError, match=r"model\.depth is 6.*with 5"):
        RunFolder.open(tmp_path, "model: {depth: 6}\nlr: 1", ALONE)
    assert "depth: 5" in (tmp_path / "config.yaml").read_text()
    with RunFolder.open(tmp_path, "model: {depth: 5}\nlr: 2", ALONE) as run:
        assert "lr: 1" in (tmp_path / "config.yaml").read_text()  # until the checkpoint has taken the settings
        run.accept_config()
    assert "lr: 2" in (tmp_path / "config.yaml").read_text()


def test_a_run_of_the_other_kind_and_another_seed_are_refused(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, "model: 1\nseed: 0\nprompts: []", ALONE).close()
    (tmp_path / "checkpoints" / "step-00000010").mkdir()
    with pytest.raises(UserError, match="holds a run of train dit, this is train vae: choose another run_dir"):
        RunFolder.open(tmp_path, "model: 2\nseed: 0", ALONE)
    with pytest.raises(UserError, match="seed is 1, but .* was trained with 0: set seed back to 0"):
        RunFolder.open(tmp_path, "model: 1\nseed: 1\nprompts: []", ALONE)


@pytest.mark.parametrize(
    ("name", "what"), [("index.jsonl", "shards"), ("latents.json", "latents"), ("model_index.json", "a model")]
)
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"run_dir .* holds {what}, no run: choose another run_dir"):
        RunFolder.open(tmp_path, "model: 1", ALONE)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_frozen_values_may_change_only_before_the_first_checkpoint(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "model: 1", ALONE) as run:
        run.freeze("batches.json", {"17x64x64": 8, "1x64x64": 32}, "clips a step", "set batch sizes and data back")
        run.freeze("batches.json", {"17x64x64": 4, "1x64x64": 16}, "clips a step", "set batch sizes and data back")
        (tmp_path / "checkpoints" / "step-00000010").mkdir()
        run.freeze("batches.json", {"17x64x64": 4, "1x64x64": 16}, "clips a step", "set batch sizes and data back")
        for other in ({"17x64x64": 4, "1x64x64": 8}, {"17x64x64": 4}):
            with pytest.raises(UserError, match=r"clips a step of 1x64x64: (8|None), but run_dir .* with 16"):
                run.freeze("batches.json", other, "clips a step", "set batch sizes and data back")
    assert json.loads((tmp_path / "batches.json").read_text()) == {"17x64x64": 4, "1x64x64": 16}


@pytest.mark.parametrize("content", ["", '{"17x64x64": [', "\x00" * 8])
def test_what_a_power_loss_left_is_one_line(tmp_path: Path, content: str) -> None:
    """Neither taken for a run without settings, nor a traceback."""
    (tmp_path / "checkpoints/step-00000010").mkdir(parents=True)
    message = "is empty or damaged: restore it or, if this command has the settings that the run began with, delete it"
    with RunFolder.open(tmp_path, "model: {depth: 5}", ALONE) as run:
        (tmp_path / "order.json").write_text(content)
        for read in (lambda: run.freeze("order.json", {"streams": 4}), lambda: run.frozen("order.json")):
            with pytest.raises(UserError, match=f"{tmp_path}/order.json {message}"):
                read()
        (tmp_path / "order.json").unlink()
        run.freeze("order.json", {"streams": 4})
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=f"{tmp_path}/config.yaml {message}"):
        RunFolder.open(tmp_path, "model: {depth: 5}", ALONE)
    (tmp_path / "config.yaml").unlink()
    RunFolder.open(tmp_path, "model: {depth: 5}", ALONE).close()


def test_what_a_rename_names_is_on_the_disk_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power loss leaves files empty whose content nobody synced, and old names in a folder that nobody did."""
    synced: list[str] = []
    sync, rename = os.fsync, os.replace

    def note_sync(handle: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{handle}"))
        sync(handle)

    def check_and_rename(source: Path, target: Path) -> None:
        assert synced and synced[-1] == str(source)
        rename(source, target)
        renamed.append(len(synced))

    renamed: list[int] = []
    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", check_and_rename)
    with RunFolder.open(tmp_path, "model: 1", ALONE) as run:
        run.freeze("order.json", {"streams": 4})
        run.accept_config()
        run.note_evaluated(4)
    assert len(renamed) >= 3
    for count in renamed:
        assert Path(synced[count]).is_dir()


def test_a_file_or_an_unwritable_place_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="run_dir"):
            RunFolder.open(path, "model: 1", ALONE)


def test_metrics_are_cut_back_with_a_torn_line(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "model: 1", ALONE) as run:
        for step in range(1, 6):
            run.log(step, {"train/loss": torch.tensor(0.5), "bad": float("nan")})
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write('{"step": 6, "train/lo')
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5]
        run.cut_metrics(3)
        run.log(4, {"train/loss": 1})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0] == {"step": 1, "train/loss": 0.5, "bad": None}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    run = RunFolder(tmp_path, None, OTHER.is_main, "model: 1")
    run.log(1, {"a": 1})
    run.cut_metrics(0)
    assert not list(tmp_path.iterdir())


def test_flops_of_a_linear_layer() -> None:
    layer, x = torch.nn.Linear(8, 16, bias=False), torch.ones(4, 8)
    assert count_flops(lambda: layer(x)) == 2 * 4 * 8 * 16
    assert count_flops(lambda: layer(x).sum().backward()) == 2 * 2 * 4 * 8 * 16  # x needs no gradient


def test_known_gpus() -> None:
    assert peak_flops("NVIDIA H200") == peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("NVIDIA H20") == 148e12
    assert peak_flops("Something else") is None


def test_step_meter_splits_the_step() -> None:
    meter = StepMeter(torch.device("cpu"), world_size=2)
    with meter.phase("forward"):
        pass
    meter.restart()  # what was before does not count
    meter.data_ready()
    for _ in range(2):
        with meter.phase("forward"):
            torch.ones(100).sum()
        with meter.phase("backward"):
            torch.ones(100_000).sum()
    metrics = meter.step(tokens=100, flops=10**9)
    parts = ("data/wait_s", "perf/forward_s", "perf/backward_s", "perf/other_s")
    assert sum(metrics[name] for name in parts) == pytest.approx(metrics["perf/step_s"])
    assert all(metrics[name] > 0 for name in parts)
    assert "perf/forward_s" not in meter.step()
    assert metrics["perf/step_s"] == pytest.approx(metrics["data/wait_s"] + metrics["perf/compute_s"])
    assert metrics["perf/tokens_per_s"] == pytest.approx(100 / metrics["perf/step_s"])
    assert metrics["perf/tflops_per_rank"] == pytest.approx(5e-4 / metrics["perf/step_s"])
    assert metrics["perf/memory_gib"] == pytest.approx(memory_gib(torch.device("cpu")), rel=0.5)
    assert "perf/mfu" not in metrics  # no known peak on a CPU
