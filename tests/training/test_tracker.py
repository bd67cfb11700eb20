"""wandb beside training: what it gets, after a resume too, and that nothing that happens to it reaches training."""

import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from tests.training import wandb_files
from tools.send_metrics import send
from videodit.data.mp4 import write_mp4
from videodit.parallel.mesh import World
from videodit.training import tracker as tracker_module
from videodit.training.run_folder import RunFolder
from videodit.training.sent import read_sent
from videodit.training.tracker import Tracker, TrackerConfig

ALONE = World(0, 1, 0, torch.device("cpu"))
OTHER = World(1, 2, 1, torch.device("cpu"))


@contextmanager
def tracked(run_dir: Path, resume_at: int = 0) -> Iterator[RunFolder]:
    """A run folder that is being sent, as a run opens it."""
    with RunFolder.open(run_dir, "model: 1\ntracker: {project: tests}", ALONE) as folder:
        folder.cut_metrics(resume_at)
        tracker = Tracker(TrackerConfig(mode="offline"), run_dir, {"optim": {"lr": 0.5}, "code": {"x": "1"}}, ALONE)
        tracker.start()
        yield folder
        tracker.finish()


def rows(run_dir: Path) -> list[dict[str, object]]:
    """(wandb's step, ours, loss) of what was sent."""
    return [
        {key: row[key] for key in ("_step", "step", "train/loss") if key in row} for row in wandb_files.history(run_dir)
    ]


def test_the_mode_is_checked() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        TrackerConfig(mode="sometimes")  # type: ignore[arg-type]


def test_other_ranks_and_disabled_trackers_do_nothing(tmp_path: Path) -> None:
    for config, world in ((TrackerConfig(mode="offline"), OTHER), (TrackerConfig(mode="disabled"), ALONE)):
        tracker = Tracker(config, tmp_path, {}, world)
        tracker.start()
        tracker.check()
        tracker.finish()
    assert not list(tmp_path.iterdir())


def test_a_killed_run_goes_on_as_one_curve(tmp_path: Path) -> None:
    """Steps beyond the checkpoint are run, logged and sent again: wandb's own step never goes back."""
    with tracked(tmp_path) as folder:
        for step in (1, 2, 3, 4):
            folder.log(step, {"train/loss": 10.0 - step, "data/digest": "abc"})
    with tracked(tmp_path, resume_at=2) as folder:
        for step in (3, 4, 5):
            folder.log(step, {"train/loss": 20.0 - step})
    assert len(wandb_files.files(tmp_path)) == 2
    assert {file.stem.removeprefix("run-") for file in wandb_files.files(tmp_path)} == {
        (tmp_path / "wandb/run_id.txt").read_text()
    }
    first = [{"_step": n, "step": n + 1, "train/loss": 9.0 - n} for n in range(4)]
    assert rows(tmp_path) == [*first, *({"_step": 1 + n, "step": n, "train/loss": 20.0 - n} for n in (3, 4, 5))]
    assert read_sent(tmp_path) == {"lines": 5, "rewritten": 2}
    config = wandb_files.config(tmp_path)
    assert config["optim"] == {"lr": 0.5} and config["code"] == {"x": "1"}


def test_figures_and_samples_are_sent_later_and_once(tmp_path: Path) -> None:
    """A run without a tracker: everything is sent, the second time nothing, then what is new."""
    with RunFolder.open(tmp_path, "model: 1\ntracker: {project: tests}", ALONE) as folder:
        write_mp4(tmp_path / "samples/00.mp4", torch.zeros(5, 16, 16, 3, dtype=torch.uint8).numpy(), 8.0)
        folder.log(1, {"train/loss": 1.0, "train/grad_norm": float("nan")})
        folder.log(1, {"samples/ema": {"a circle": "samples/00.mp4", "gone": "samples/01.mp4"}})
        assert send(tmp_path, "offline") == 2
        assert send(tmp_path, "offline") == 0
        folder.log(2, {"train/loss": 2.0})
        assert send(tmp_path, "offline") == 1
    history = wandb_files.history(tmp_path)
    assert [row["_step"] for row in history] == [0, 1, 2] and [row["step"] for row in history] == [1, 1, 2]
    assert "train/grad_norm" not in history[0]
    assert history[1]["samples/ema.captions"] == ["a circle"]
    assert list((tmp_path / "wandb").rglob(Path(history[1]["samples/ema.videos"][0]["path"]).name))
    with pytest.raises(ValueError, match="is not a run folder"):
        send(tmp_path / "gone")


def test_a_process_that_died_costs_one_warning(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path, "model: 1", ALONE) as folder:
        tracker = Tracker(TrackerConfig(mode="offline"), tmp_path, {}, ALONE)
        tracker.start()
        assert tracker._process is not None
        tracker._process.kill()
        tracker._process.wait()
        with pytest.warns(UserWarning, match="wandb is off .* send it later with: python tools/send_metrics.py"):
            tracker.check()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tracker.check()
            tracker.finish()
        folder.log(1, {"train/loss": 1.0})
    assert send(tmp_path, "offline") == 1


def test_no_room_for_its_files_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "wandb").write_text("a file where the folder should be")
    tracker = Tracker(TrackerConfig(mode="offline"), tmp_path, {}, ALONE)
    with pytest.warns(UserWarning, match="wandb is off from here"):
        tracker.start()
    tracker.finish()


def test_a_server_that_never_answers_is_not_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections are taken, and nothing comes back: steps are logged at once, the end waits for its limit only."""
    monkeypatch.setattr(tracker_module, "FINISH_LIMIT_S", 2.0)
    with socket.create_server(("127.0.0.1", 0)) as hole:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        with RunFolder.open(tmp_path, "model: 1", ALONE) as folder:
            tracker = Tracker(TrackerConfig(mode="online"), tmp_path, {}, ALONE)
            tracker.start()
            for step in range(1, 101):
                folder.log(step, {"train/loss": 1.0})
                tracker.check()
            connection, _ = hole.accept()  # it has tried
            process = tracker._process
            assert process is not None
            with pytest.warns(UserWarning, match="it did not take all figures"):
                tracker.finish()
            connection.close()
        assert process.poll() is not None  # and not left behind
    assert send(tmp_path, "offline") == 100
