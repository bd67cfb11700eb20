"""A disk that takes nothing more costs what was to be written, never the run: /dev/full stands in the files' places."""

import os
import signal
import warnings
from pathlib import Path

import pytest

from tests.training.test_trainers import dit_config, metrics, stop_at, vae_config
from videodit.parallel.mesh import World
from videodit.training.checkpoint import steps_in
from videodit.training.dit_trainer import train_dit
from videodit.training.run_folder import RunFolder, read_metrics
from videodit.training.vae_trainer import train_vae

ALONE = World(0, 1, 0, None)  # type: ignore[arg-type]


def fill(file: Path) -> None:
    """What is written there has no space left, in the kernel's words."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.symlink_to("/dev/full")


@pytest.mark.parametrize("kind", ["dit", "vae"])
def test_samples(kind: str, shards: Path, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a stop right after: it says where the next start goes on, as the last checkpoint finds no space either."""
    run, part = tmp_path / "run", f".mp4.part{os.getpid()}"
    fill(run / f"samples/step-00000002{'/00' if kind == 'dit' else ''}{part}")
    fill(run / "checkpoints/.tmp-step-00000003-0000")
    monkeypatch.setattr("secrets.token_hex", lambda size: "0000")  # of the name of what is being written
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # which would clear the way
    stop_at(3, signal.SIGTERM, monkeypatch)
    with warnings.catch_warnings(record=True) as caught, pytest.raises(SystemExit) as stopped:
        warnings.simplefilter("default")
        changes = {"max_steps": 4, "sample_every": 2, "save_every": 2}
        if kind == "dit":
            train_dit(dit_config(run, latents, prompts=["a"], sample_raw=True, **changes))
        else:
            train_vae(vae_config(run, shards, eval_shards=str(shards), **changes))
    assert stopped.value.code == 143
    assert [line["step"] for line in metrics(run)] == [1, 2, 3] and steps_in(run) == [2]
    said = [str(warning.message) for warning in caught if "no " in str(warning.message)]
    assert len(said) == 2 and said[0].startswith("no samples at step 2: [Errno 28] No space left on device"), said
    assert said[1].startswith("no checkpoint at step 3: ") and "the same command goes on from step 2" in said[1]


def test_metrics(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "model: 1", ALONE) as run:
        for step in range(1, 6):
            run.log(step, {"train/loss": 0.5})
        fill(tmp_path / "metrics.tmp")
        run.cut_metrics(3)  # a run that goes back
        assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]
        lines = (tmp_path / "metrics.jsonl").read_text().replace('"step": 1', '"st')
        (tmp_path / "metrics.jsonl").write_text(lines)
        with pytest.warns(UserWarning, match="keeps lines after step 2: .*No space left.* training goes on"):
            run.cut_metrics(2)
        (tmp_path / "metrics.jsonl").unlink()
        fill(tmp_path / "metrics.jsonl")
        with pytest.warns(UserWarning, match="cannot be written: .*No space left") as caught:
            run.log(4, {"train/loss": 0.5})
            run.log(5, {"train/loss": 0.5})
            run.close()  # where the lines that wait have no space either
    assert len(caught) == 1
