"""What a DiT's step draws for each clip: by seed, epoch and key, each part by itself; and what its frames weigh."""

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from tests import tiny
from videodit.data.batches import LatentBatch
from videodit.data.buckets import parse_bucket
from videodit.data.latent_reader import LatentDataConfig
from videodit.flow.loss import Weighting, level_weight
from videodit.flow.noise_level import NoiseLevelConfig
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_trainer import make_noisy

ROWS = 400


def batch(**changes: Any) -> LatentBatch:
    """Clips whose posteriors have mean 3 and standard deviation 0.5."""
    mean = torch.full((ROWS, 4, 3, 2, 2), 3.0)
    fields = {
        "bucket": parse_bucket(tiny.BUCKET, multiple=1),
        "captions": [""] * ROWS,
        "ids": list(range(ROWS)),
        "keys": [f"clip-{row}" for row in range(ROWS)],
        "weight": torch.ones(ROWS),
        "epochs": [0] * ROWS,
        "mean": mean,
        "logvar": torch.full_like(mean, 2 * math.log(0.5)),
    }
    return LatentBatch(**{**fields, **changes})


def config(**changes: Any) -> DiTRunConfig:
    data = LatentDataConfig(shards="unused")
    return replace(DiTRunConfig(run_dir="unused", data=data, model=tiny.DIT, text=tiny.TEXT), **changes)


def drawn(batch: LatentBatch, config: DiTRunConfig) -> dict[str, Tensor]:
    """Each clip's parts, told from what the model sees and is to predict, a velocity: (b, ...)."""
    noisy = make_noisy(batch, config, config.noise)
    sigma = noisy.sigma[:, None, :, None, None]
    return {
        "x0": noisy.latents - sigma * noisy.target,
        "noise": noisy.latents + (1 - sigma) * noisy.target,
        "sigma": noisy.sigma[:, -1:],
        "rise": torch.logit(noisy.sigma).diff(dim=1),
    }


@pytest.mark.parametrize("changed", ["seed", "epoch", "key"])
def test_another_seed_epoch_or_key_draws_all_anew(changed: str) -> None:
    settings = config(noise=NoiseLevelConfig(frame_slope=1.0), sample_posterior=True)
    other = replace(settings, seed=settings.seed + (changed == "seed"))
    epochs, keys = [int(changed == "epoch")] * ROWS, [f"other-{row}" for row in range(ROWS)]
    others = batch(epochs=epochs, **({"keys": keys} if changed == "key" else {}))
    again, first = drawn(others, other), drawn(batch(), settings)
    for name, values in first.items():
        off = (values - again[name]).flatten(1).abs().amax(dim=1)
        assert (off > 1e-3).float().mean() > 0.95, name  # not all: single numbers may meet by chance
    given = [
        (make_noisy(clips, replace(own, condition_rate=0.5), NoiseLevelConfig()).sigma == 0).any(dim=1)
        for clips, own in ((batch(), settings), (others, other))
    ]
    assert 0.4 < (given[0] != given[1]).float().mean() < 0.6  # as two throws of a coin


def test_parts_of_a_clip_are_drawn_apart() -> None:
    parts = drawn(batch(), config(noise=NoiseLevelConfig(shift=1.0), sample_posterior=True))
    posterior, noise = (parts["x0"] - 3.0) / 0.5, parts["noise"]
    for values in (posterior, noise):
        assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05
    assert abs((posterior * noise).mean()) < 0.05
    settings = config(condition_rate=0.5, noise=NoiseLevelConfig(shift=1.0))
    sigma = make_noisy(batch(), settings, settings.noise).sigma
    given, level = (sigma == 0).any(dim=1), torch.logit(sigma[:, -1])
    assert abs(level[given].mean() - level[~given].mean()) < 0.4  # four of its standard errors


def test_without_the_posterior_a_clip_is_its_mean() -> None:
    settings = config(sample_posterior=False)
    torch.testing.assert_close(drawn(batch(logvar=None), settings)["x0"], batch().mean)


@pytest.mark.parametrize("weighting", get_args(Weighting))
def test_frames_weigh_what_their_level_does(weighting: Weighting) -> None:
    settings = config(weighting=weighting)
    noisy = make_noisy(batch(), settings, settings.noise)
    assert torch.equal(noisy.weight, level_weight(noisy.sigma, weighting))
