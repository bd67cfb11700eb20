"""A plan's total against the most that a training process holds in a step: every tensor, our engine, one rank."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import tiny
from videodit.data.clip_reader import DataConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.models.dit import DiTConfig
from videodit.models.text import ByteTextConfig
from videodit.parallel.mesh import World, init_process, shutdown
from videodit.planning.footprint import LiveBytes
from videodit.planning.plan import Planner
from videodit.planning.workload import DiTWorkload, VAEWorkload
from videodit.training.dit_config import DiTRunConfig
from videodit.training.ema import PowerEMA
from videodit.training.engine import Engine
from videodit.training.run_config import RunConfig
from videodit.training.vae_config import VAERunConfig

TEXT = ByteTextConfig(dim=32, buckets=512, depth=1, num_heads=2, max_words=9)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_process("cpu")
    shutdown()


def check(
    config: RunConfig, workload: DiTWorkload | VAEWorkload, policy: str, dtype: str, world: World, *given: Any
) -> None:
    """The peak in the last backward pass of a step of two micro batches, when moments and averages are there."""
    planner = Planner(config, workload, 1, torch.bfloat16 if dtype == "bf16" else torch.float32, on_cpu=True)
    planned = planner.choice(config.zero_stage, policy, 1).memory
    with LiveBytes(meta=False) as live:
        model = workload._build(policy) if isinstance(workload, DiTWorkload) else workload._build()
        options: dict[str, Any] = {"zero_stage": config.zero_stage, "dtype": dtype, "max_steps": 9}
        engine = Engine(model, config.optim, world=world, **options)
        ema = PowerEMA(engine.slices(), config.ema_profiles)
        for micro in (1, 2, 3):
            if micro == 2:
                engine.step(1)
            live.peak = live.now
            out = engine(*given)
            engine.backward((out[0] if isinstance(out, tuple) else out).float().square().mean())
            del out
    assert len(ema.averages) == 2
    assert abs(planned.total / live.peak - 1) < 0.1, (planned.total / live.peak, planned, live.peak)


@pytest.mark.parametrize(
    ("d", "depth", "hw", "policy", "stage", "dtype"),
    [
        (64, 2, 16, "none", 0, "fp32"),
        (128, 4, 8, "attention", 2, "bf16"),
        (128, 4, 8, "full", 3, "bf16"),
        (192, 2, 16, "full", 1, "fp32"),
        (192, 2, 16, "none", 3, "fp32"),
    ],
)
def test_a_dit_with_its_text_encoder(
    d: int, depth: int, hw: int, policy: str, stage: int, dtype: str, world: World
) -> None:
    shape = DiTConfig(in_channels=4, hidden_size=d, depth=depth, num_heads=2, text_dim=32, frequency_dim=32)
    data = LatentDataConfig(shards="unused")
    config = DiTRunConfig(run_dir="unused", data=data, model=shape, text=TEXT, zero_stage=stage)
    workload = DiTWorkload(config, [f"13x{8 * hw}x{8 * hw}"])
    caption = " ".join(letter * 16 for letter in "abcdefgh")  # as many words as are read, and as long
    latents = torch.zeros(1, 4, 4, hw, hw, dtype=torch.bfloat16 if dtype == "bf16" else torch.float32)
    check(config, workload, policy, dtype, world, latents, torch.zeros(1, 4), [caption])


@pytest.mark.parametrize("stage", [1, 3])
def test_a_vae(stage: int, world: World) -> None:
    config = VAERunConfig(run_dir="unused", data=DataConfig(shards="unused"), model=tiny.VAE, zero_stage=stage)
    workload = VAEWorkload(config, [tiny.BUCKET])
    check(config, workload, "none", "fp32", world, torch.zeros(1, 3, 9, 32, 32), torch.zeros(1, 4, 3, 4, 4))
