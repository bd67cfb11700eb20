"""A run of two ranks goes on with one, three or four, at another ZeRO stage, micro batch and number of workers."""

import shutil
import signal
from pathlib import Path

import pytest

from tests import tiny
from tests.forked_ranks import Rank, Ranks, alive, wait_until
from tests.training.toy import assert_same, whole
from videodit.training.checkpoint import Checkpoint, folder_of, steps_in
from videodit.training.run_folder import read_metrics

CLIPS, BATCH = 40, 32  # an epoch is two steps, the second one ragged
CUT, STEPS = 11, 31  # in the middle of an epoch


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    shards = tiny.make_shards(root / "shards", CLIPS)
    return tiny.make_latents(root / "latents", shards, tiny.make_vae(root / "vae"))


def start(ranks: Ranks, size: int, run_dir: Path, latents: Path, **settings: object) -> list[Rank]:
    options = {"global_batch_size": BATCH, "micro_batch_size": 8, "save_every": CUT, "sample_every": 0}
    options |= {"optim.warmup_steps": 0, "optim.lr": 1e-4, "keep_last": 10, "max_steps": STEPS, **settings}
    changes = [f"--{name}={value}" for name, value in options.items()]
    argv = ["train", "dit", f"--run_dir={run_dir}", f"--data.shards={latents}", *changes]
    started: list[Rank] = ranks.start([*argv, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS], size)
    return started


def train(ranks: Ranks, size: int, run_dir: Path, latents: Path, **settings: object) -> None:
    for rank in start(ranks, size, run_dir, latents, **settings):
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
        for step in steps_in(run):
            if step > CUT:
                shutil.rmtree(folder_of(run, step))
        train(ranks, size, run, latents, dtype=dtype, **settings)
        got = read_metrics(run)
        assert [line["step"] for line in got] == list(range(1, STEPS + 1))
        assert [line["data/digest"] for line in got[CUT:]] == [line["data/digest"] for line in expected]
        for line, other in zip(got[CUT:], expected, strict=True):
            assert line["train/loss"] == pytest.approx(other["train/loss"], rel=within), (size, line["step"])


@pytest.mark.slow
def test_loaded_weights_are_those_of_the_checkpoint_bit_for_bit(ranks: Ranks, latents: Path, tmp_path: Path) -> None:
    """The step after the load has the learning rate 0: what it saves are the weights that were loaded."""
    straight = tmp_path / "straight"
    train(ranks, 2, straight, latents, zero_stage=2, dtype="fp32", max_steps=CUT)
    loaded = weights(straight, CUT)
    for size, stage in ((1, 2), (3, 3), (4, 1)):
        run = tmp_path / f"{size}-ranks"
        shutil.copytree(straight, run)
        still = {"optim.schedule": "linear", "max_steps": CUT + 1}
        train(ranks, size, run, latents, zero_stage=stage, dtype="fp32", **still)
        assert read_metrics(run)[CUT]["train/skipped"] == 0
        assert_same(weights(run, CUT + 1), loaded)


def weights(run: Path, step: int) -> dict:
    state = whole(Checkpoint.open(folder_of(run, step)))
    return {name: value for name, value in state.items() if name.startswith("weight/")}


def test_killed_in_an_epoch_of_two_buckets_at_zero_2_it_goes_on_with_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    clips = tiny.make_shards(tmp_path / "clips", 24, frames=(9, 9, 5))
    data = tiny.make_latents(tmp_path / "data", clips, tiny.make_vae(tmp_path / "vae"), [tiny.BUCKET, "5x32x32"])
    epoch, every, steps = 5, 3, 13  # 16 clips and 8: a ragged step in each bucket
    settings: dict[str, object] = {"global_batch_size": 6, "micro_batch_size": 2, "zero_stage": 2, "dtype": "fp32"}
    settings |= {"data.num_workers": 1, "data.cache_gib": 0, "save_every": every}
    straight, run = tmp_path / "straight", tmp_path / "run"
    train(ranks, 2, straight, data, max_steps=steps, **settings)
    expected = read_metrics(straight)
    assert len({line["data/bucket"] for line in expected[:epoch]}) == 2
    assert expected[0]["data/digest"] not in {line["data/digest"] for line in expected[epoch:]}

    both = start(ranks, 2, run, data, max_steps=100_000, **settings)
    wait_until(lambda: bool(steps_in(run)), lambda: both[0].stderr + both[1].stderr)
    family = [pid for rank in both for pid in rank.family()]
    for rank in both:
        rank.signal(signal.SIGKILL)
    assert [rank.wait() for rank in both] == [-signal.SIGKILL] * 2
    wait_until(lambda: not any(map(alive, family)))
    newest = max(steps_in(run))
    assert newest < steps and newest % epoch, newest
    train(ranks, 1, run, data, max_steps=steps, **settings | {"micro_batch_size": 6})
    got = read_metrics(run)
    for name in ("step", "data/bucket", "data/digest"):
        assert [line[name] for line in got] == [line[name] for line in expected], name
    for line, other in zip(got, expected, strict=True):
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5), line["step"]


@pytest.mark.slow
def test_a_vae_goes_on_in_an_epoch_with_another_number_of_ranks(ranks: Ranks, tmp_path: Path) -> None:
    """Decoded by workers, random windows and crops, two buckets."""
    shards = tiny.make_shards(tmp_path / "clips", 12, frames=(9, 9, 5))
    cut, steps = 4, 9  # an epoch of 8 and 4 clips is three steps

    def train_vae(size: int, run: Path, **settings: object) -> None:
        options = {"data.shards": shards, "data.buckets": f"[{tiny.BUCKET},5x16x16]", "run_dir": run}
        options |= {"data.num_workers": 1, "global_batch_size": 6, "save_every": cut, "sample_every": 0}
        options |= {"optim.warmup_steps": 0, "optim.lr": 1e-4, "dtype": "fp32", "max_steps": steps, **settings}
        argv = ["train", "vae", *(f"--{name}={value}" for name, value in options.items())]
        for rank in ranks.start([*argv, *tiny.VAE_OPTIONS, *tiny.RUN_OPTIONS], size):
            assert rank.wait() == 0, rank.stderr

    straight = tmp_path / "straight"
    train_vae(2, straight, zero_stage=2, micro_batch_size=2, keep_last=10)
    expected = read_metrics(straight)
    assert len({line["data/bucket"] for line in expected[:3]}) == 2
    others: dict[int, dict[str, object]] = {
        1: {"zero_stage": 1, "micro_batch_size": 3, "data.num_workers": 0},
        3: {"zero_stage": 3, "micro_batch_size": 1, "data.cache_decoded": False},
    }
    for size, settings in others.items():
        run = tmp_path / f"{size}-ranks"
        shutil.copytree(straight, run)
        for step in steps_in(run):
            if step > cut:
                shutil.rmtree(folder_of(run, step))
        train_vae(size, run, **settings)
        got = read_metrics(run)
        for name in ("step", "data/bucket", "data/digest"):
            assert [line[name] for line in got] == [line[name] for line in expected], (size, name)
        for line, other in zip(got, expected, strict=True):
            assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-5), (size, line["step"])
