"""The part of a step that goes into communication: measured now and then, and training does not notice."""

from pathlib import Path

import pytest

from tests import tiny
from tests.forked_ranks import Ranks
from tests.training.toy import assert_same, whole
from videodit.training.checkpoint import load_latest
from videodit.training.communication import covered
from videodit.training.run_config import RunConfig
from videodit.training.run_folder import read_metrics

NAME = "perf/communication_s"


def test_several_at_once_count_once() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2)]) == 4
    assert covered([(0, 10), (2, 3), (8, 12), (12, 13), (20, 21)]) == 14


def test_two_ranks_measure_some_steps_and_train_the_same(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    started = {}
    for name, every in (("measured", 2), ("not", 0)):
        options = [f"--run_dir={tmp_path / name}", f"--data.shards={latents}", "--max_steps=2", "--zero_stage=2"]
        options += ["--global_batch_size=4", "--micro_batch_size=2", f"--communication_every={every}"]
        options += ["--dtype=fp32", "--data.num_workers=0"]
        started[name] = ranks.start(["train", "dit", *options, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS], 2)
    for run in started.values():
        for rank in run:
            assert rank.wait() == 0, rank.stderr
            assert "profiler" not in rank.stderr
    lines = {name: read_metrics(tmp_path / name) for name in started}
    assert [NAME in line for line in lines["measured"]] == [False, True]
    assert not any(NAME in line for line in lines["not"])
    line = lines["measured"][1]
    assert 0 < line[NAME] < sum(line[f"perf/{part}_s"] for part in ("forward", "backward", "optimizer", "other"))
    figures = [
        [(line["train/loss"], line["train/grad_norm"], line["data/digest"]) for line in lines[name]]
        for name in ("measured", "not")
    ]
    assert figures[0] == figures[1] and len(figures[0]) == 2
    ends = [load_latest(tmp_path / name) for name in ("measured", "not")]
    assert_same(*(whole(end) for end in ends if end is not None))


def test_a_negative_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="communication_every -1 is negative: use 0 for no measurement"):
        RunConfig(run_dir="run", communication_every=-1)
