"""A run of two ranks goes on with one, three or four, at another ZeRO stage, micro batch and number of workers."""

import shutil
from pathlib import Path

import pytest

from tests import tiny
from tests.forked_ranks import Ranks
from videodit.training.run_folder import read_metrics

CLIPS, BATCH = 40, 32  # an epoch is two steps, the second one ragged
CUT, STEPS = 10, 30


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    shards = tiny.make_shards(root / "shards", CLIPS)
    return tiny.make_latents(root / "latents", shards, tiny.make_vae(root / "vae"))


def train(ranks: Ranks, size: int, run_dir: Path, latents: Path, **settings: object) -> None:
    options = {"global_batch_size": BATCH, "micro_batch_size": 8, "save_every": CUT, "sample_every": 0}
    options |= {"optim.warmup_steps": 0, "optim.lr": 1e-4, "keep_last": 10, "max_steps": STEPS, **settings}
    changes = [f"--{name}={value}" for name, value in options.items()]
    argv = ["train", "dit", f"--run_dir={run_dir}", f"--data.shards={latents}", *changes]
    for rank in ranks.start([*argv, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS], size):
        assert rank.wait() == 0, rank.stderr


@pytest.mark.parametrize(("dtype", "within"), [("fp32", 1e-5), pytest.param("bf16", 1e-2, marks=pytest.mark.slow)])
def test_it_goes_on_with_any_number_of_ranks(
    ranks: Ranks, latents: Path, tmp_path: Path, dtype: str, within: float
) -> None:
    straight = tmp_path / "straight"
    train(ranks, 2, straight, latents, zero_stage=2, dtype=dtype)
    expected = read_metrics(straight)[CUT:]
    assert len({line["data/digest"] for line in expected}) == len(expected)  # each epoch has an order of its own
    others: dict[int, dict[str, object]] = {
        1: {"zero_stage": 1, "micro_batch_size": 5},
        3: {"zero_stage": 3, "micro_batch_size": 4, "data.num_workers": 1, "data.cache_gib": 0},
        4: {"zero_stage": 1, "micro_batch_size": 8},
    }
    for size, settings in others.items():
        run = tmp_path / f"{size}-ranks"
        shutil.copytree(straight, run)
        for step in range(2 * CUT, STEPS + 1, CUT):
            shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
        train(ranks, size, run, latents, dtype=dtype, **settings)
        got = read_metrics(run)
        assert [line["step"] for line in got] == list(range(1, STEPS + 1))
        assert [line["data/digest"] for line in got[CUT:]] == [line["data/digest"] for line in expected]
        for line, other in zip(got[CUT:], expected, strict=True):
            assert line["train/loss"] == pytest.approx(other["train/loss"], rel=within), (size, line["step"])
