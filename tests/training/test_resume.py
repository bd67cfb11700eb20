"""Runs on two ranks that were stopped go on bit for bit, at every ZeRO stage and in bf16; a damaged checkpoint."""

import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.forked_ranks import Ranks, steps_of, wait_until
from tests.training.test_trainers import dit_config, metrics, stages, stop_at
from tests.training.toy import assert_same, whole
from videodit.training.checkpoint import folder_of, load_latest, steps_in
from videodit.training.dit_trainer import train_dit


class Stopped:
    """A run that is stopped once it trains, whenever that is; then started again beside one that never was."""

    def __init__(self, ranks: Ranks, folder: Path, kind: str, data: Path, zero_stage: int, dtype: str) -> None:
        own = {"vae": [f"--data.buckets={tiny.BUCKET}", *tiny.VAE_OPTIONS], "dit": tiny.DIT_OPTIONS}[kind]
        options = [f"--data.shards={data}", f"--zero_stage={zero_stage}", f"--dtype={dtype}", "--sample_every=0"]
        options += ["--global_batch_size=4", "--micro_batch_size=1", "--data.num_workers=0", *own, *tiny.RUN_OPTIONS]
        self._command = ["train", kind, *options, "--optim.schedule=constant"]  # it has no end that would move
        self._ranks, self._folder = ranks, folder
        self._run = self._start("stopped", 100_000)

    def _start(self, name: str, steps: int) -> Any:
        return self._ranks.start([*self._command, f"--run_dir={self._folder / name}", f"--max_steps={steps}"], 2)

    def stop(self) -> None:
        first, second = self._run
        wait_until(lambda: steps_of(self._folder / "stopped") >= 2, lambda: first.stderr)
        second.signal(signal.SIGTERM)
        assert [first.wait(), second.wait()] == [143, 143], first.stderr
        (at,) = steps_in(self._folder / "stopped")
        assert f"stopped after step {at}, with a checkpoint: the same command goes on\n" in first.stderr
        assert "stopped after" not in second.stderr
        self._steps = at + 2
        self._runs = {name: self._start(name, self._steps) for name in ("straight", "stopped")}

    def check(self) -> None:
        """The same figures and the same bits in the end."""
        for run in self._runs.values():
            assert [rank.wait() for rank in run] == [0, 0], run[0].stderr
        lines = [metrics(self._folder / name) for name in self._runs]
        assert lines[0] == lines[1] and [line["step"] for line in lines[0]] == list(range(1, self._steps + 1))
        ends = [load_latest(self._folder / name) for name in self._runs]
        assert_same(*(whole(end) for end in ends if end is not None))


def check(ranks: Ranks, folder: Path, cases: Sequence[tuple[str, Path, int, str]]) -> None:
    """Several at once, for each waits for other ranks most of the time."""
    runs = []
    for number, case in enumerate(cases):
        (folder / str(number)).mkdir()
        runs.append(Stopped(ranks, folder / str(number), *case))
    for run in runs:
        run.stop()
    for run in runs:
        run.check()


@pytest.mark.slow
@stages()
def test_two_ranks_go_on_bit_for_bit(
    ranks: Ranks, shards: Path, latents: Path, tmp_path: Path, zero_stage: int, dtype: str
) -> None:
    check(ranks, tmp_path, [(kind, data, zero_stage, dtype) for kind, data in (("vae", shards), ("dit", latents))])


def test_a_damaged_newest_checkpoint_costs_the_steps_after_the_one_before(latents: Path, tmp_path: Path) -> None:
    """The same command names the damage, goes on from the checkpoint before, and ends as a run without any of it."""
    run, straight = (dit_config(tmp_path / name, latents, save_every=2) for name in ("run", "straight"))
    with pytest.MonkeyPatch.context() as monkeypatch, pytest.raises(SystemExit):
        stop_at(5, signal.SIGTERM, monkeypatch)
        train_dit(run)
    assert steps_in(run.run_dir) == [4, 5]
    (file,) = folder_of(run.run_dir, 5).glob("rank-*.safetensors")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1 << 3
    file.write_bytes(data)
    with pytest.warns(UserWarning, match=rf"step-00000005 is passed over: {file.name}"):
        train_dit(run)
    assert "from step 4 of" in (tmp_path / "run/train.log").read_text()
    train_dit(straight)
    assert metrics(tmp_path / "run") == metrics(tmp_path / "straight")
    ends = [load_latest(tmp_path / name) for name in ("run", "straight")]
    assert [end.step for end in ends if end is not None] == [straight.max_steps] * 2
    assert_same(*(whole(end) for end in ends if end is not None))
