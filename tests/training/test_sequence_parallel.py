"""`train dit` with the tokens of each clip spread over ranks: the losses are those of one rank."""

import subprocess
from pathlib import Path

import pytest

from tests import tiny
from videodit.training.run_folder import read_metrics

STEPS = 3


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sequence")
    vae = tiny.make_vae(folder / "vae")
    tiny.make_latents(folder / "held_out", tiny.make_shards(folder / "other_shards", 3, first=100), vae)
    return tiny.make_latents(folder / "latents", tiny.make_shards(folder / "shards"), vae)


def train(latents: Path, run: Path, ranks: int, *options: str) -> list[dict[str, float]]:
    command = ["train", "dit", "--data.shards", latents, "--run_dir", run, "--max_steps", str(STEPS)]
    command += [
        "--global_batch_size",
        "6",
        "--micro_batch_size",
        "2",
        "--optim.warmup_steps",
        "0",
        "--optim.lr",
        "0.01",
    ]
    command += [
        "--eval_shards",
        latents.parent / "held_out",
        "--dtype",
        "fp32",
        "--sample_every",
        "0",
        *tiny.DIT_OPTIONS,
        *tiny.RUN_OPTIONS,
        *options,
    ]
    done = subprocess.run(tiny.command(command, ranks), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(run)


@pytest.fixture(scope="module")
def alone(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, float]]:
    return train(latents, tmp_path_factory.mktemp("alone") / "run", 1)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, ["--sequence_parallel=2", "--zero_stage=2"]),  # 2 shares of the clips, each on 2 ranks
        pytest.param(2, ["--sequence_parallel=2", "--zero_stage=1"], marks=pytest.mark.slow),
        pytest.param(
            4, ["--sequence_parallel=2", "--zero_stage=3", "--checkpointing=attention"], marks=pytest.mark.slow
        ),
        pytest.param(4, ["--sequence_parallel=4", "--zero_stage=0"], marks=pytest.mark.slow),
    ],
)
def test_losses_and_norms_are_those_of_one_rank(
    ranks: int, options: list[str], latents: Path, alone: list[dict[str, float]], tmp_path: Path
) -> None:
    spread = train(latents, tmp_path / "run", ranks, *options)
    assert len(spread) == len(alone) == STEPS + 1  # and the held-out loss at the end
    held_out, expected = spread.pop(), alone[-1]
    for name in ("eval/loss_q10", "eval/loss_q90", "eval/loss_q90_ema"):
        assert held_out[name] == pytest.approx(expected[name], rel=1e-4)
    for line, expected in zip(spread, alone):
        assert line["data/digest"] == expected["data/digest"]
        for name in ("train/loss", "train/mse", "train/grad_norm"):
            assert line[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), (name, line["step"])


def test_ranks_that_cannot_be_divided_are_one_line(latents: Path, tmp_path: Path) -> None:
    command = ["train", "dit", "--data.shards", latents, "--run_dir", tmp_path / "run", "--sequence_parallel", "2"]
    done = tiny.videodit(*command, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS)
    assert done.returncode == 2
    assert "sequence_parallel 2 does not divide the 1 ranks of the run: the nearest that does is 1" in done.stderr
