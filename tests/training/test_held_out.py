"""The held-out loss by noise level: a closed form, what it does not depend on, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests import tiny
from videodit.data.batches import Request
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.loader import read_latents
from videodit.errors import UserError
from videodit.flow.noise_level import NoiseLevelConfig, sigma_from_uniform
from videodit.models.token_layout import WHOLE
from videodit.parallel.mesh import Mesh
from videodit.training.dit_config import DiTRunConfig, follow_latents
from videodit.training.dit_trainer import train_dit
from videodit.training.held_out import QUANTILES, HeldOutLoss, check_held_out
from videodit.training.optim import OptimConfig
from videodit.training.tracker import TrackerConfig

NAMES = ["eval/loss_q10", "eval/loss_q30", "eval/loss_q50", "eval/loss_q70", "eval/loss_q90", "eval/loss"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("held_out")
    vae = tiny.make_vae(root / "vae")
    tiny.make_latents(root / "train", tiny.make_shards(root / "clips", 6), vae)
    tiny.make_latents(root / "eval", tiny.make_shards(root / "other_clips", 5, first=100), vae)
    return root


def dit_config(root: Path, run_dir: Path | str = "unused", **changes: object) -> DiTRunConfig:
    config = DiTRunConfig(
        run_dir=str(run_dir),
        data=LatentDataConfig(shards=str(root / "train")),
        eval_shards=str(root / "eval"),
        eval_every=2,
        model=tiny.DIT,
        text=tiny.TEXT,
        sampling=tiny.SAMPLING,
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        max_steps=3,
        global_batch_size=4,
        micro_batch_size=2,
        device="cpu",
        dtype="fp32",
        tracker=TrackerConfig(mode="disabled"),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


class Constant(nn.Module):
    """Predicts the same number everywhere; keeps what it saw."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.captions = nn.Parameter(torch.tensor(value)), []  # type: ignore[var-annotated]
        self.levels: set[float] = set()
        self.latents: list[torch.Tensor] = []

    def forward(self, latents: torch.Tensor, sigma: torch.Tensor, text: list[str], **_: object) -> torch.Tensor:
        self.captions += text
        self.latents.append(latents)
        self.levels |= set(sigma.flatten().tolist())
        return self.value.expand_as(latents)


def measure(config: DiTRunConfig, module: nn.Module, rank: int = 0, ranks: int = 1) -> dict[str, float]:
    return HeldOutLoss(config, Mesh(rank, ranks), lambda shape: WHOLE).measure(module)


def test_a_constant_prediction_has_the_loss_of_the_closed_form(root: Path) -> None:
    """x0's mean square about the constant, at every level; on as many clips as asked for, and the levels of noise."""
    noise = NoiseLevelConfig(mean=0.5, std=0.7, shift=2.0)
    config = follow_latents(dit_config(root, noise=noise, late_share=1.0))
    config = replace(config, flow=replace(config.flow, prediction="x0"))
    module = Constant(0.25)
    losses = measure(config, module)
    reader = HeldOutLoss(config, Mesh(0, 1), lambda shape: WHOLE)._reader
    (bucket,) = reader.members
    (batch,) = read_latents(reader, [Request(bucket, (0,) * 5, tuple(range(5)))])
    x0 = batch.draw(config.seed)
    assert losses["loss_q10"] == pytest.approx(float((x0 - 0.25).square().mean()), rel=1e-5)
    assert len(set(losses.values())) == 1  # a constant does not see the level
    expected = sigma_from_uniform(torch.tensor(QUANTILES), noise).tolist()
    assert sorted(module.levels) == pytest.approx(expected)
    assert module.captions.count("") == len(QUANTILES)  # of the row of padding: no caption is dropped
    fewer = measure(replace(config, eval_clips=2), module)
    assert fewer["loss"] != losses["loss"]
    assert measure(replace(config, eval_clips=2), module) == fewer


def test_the_levels_lie_on_one_line_from_each_clip_to_its_noise(root: Path) -> None:
    """What the model sees is as noisy as the level says, and its target is the line's slope, the velocity."""
    config = follow_latents(dit_config(root, micro_batch_size=5))
    module = Constant(0.0)
    losses = measure(config, module)
    first, *others = module.latents  # of one micro batch, by level
    low, *higher = sigma_from_uniform(torch.tensor(QUANTILES), config.noise)
    slope = (others[-1] - first) / (higher[-1] - low)
    for level, latents in zip(higher, others, strict=True):
        torch.testing.assert_close(latents, first + (level - low) * slope)
    noise, n = first + (1 - low) * slope, first.numel()
    assert abs(noise.mean()) < 5 / n**0.5 and abs(noise.var() - 1) < 5 * (2 / n) ** 0.5
    assert len({float(row.sum()) for row in noise}) == 5
    assert losses["loss"] == pytest.approx(float(slope.square().mean()), rel=1e-4)


def test_shares_of_ranks_and_micro_batches_add_up(root: Path) -> None:
    """Each rank's share alone, weighted by its clips, gives the loss of all: nothing hangs on rank or batch."""
    config = follow_latents(dit_config(root))
    whole = measure(config, Constant(0.5))
    shares = [measure(config, Constant(0.5), rank, 2) for rank in range(2)]  # 3 and 2 of the 5 clips
    parts = measure(replace(config, micro_batch_size=1), Constant(0.5))
    for name, loss in whole.items():
        assert (3 * shares[0][name] + 2 * shares[1][name]) / 5 == pytest.approx(loss, rel=1e-6)
        assert parts[name] == pytest.approx(loss, rel=1e-6)


def test_a_run_logs_it_raw_and_averaged_and_trains_as_without(root: Path, tmp_path: Path) -> None:
    windows = LatentCropConfig(size=(2, 2), share=1.0)
    for name, changes in (("with", {}), ("without", {"eval_shards": None})):
        train_dit(dit_config(root, tmp_path / name, crop=windows, **changes))
    lines = {
        name: [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("with", "without")
    }
    losses = {name: [line["train/loss"] for line in of if "train/loss" in line] for name, of in lines.items()}
    assert losses["with"] == losses["without"]
    evaluated = [line for line in lines["with"] if "eval/loss" in line]
    assert [line["step"] for line in evaluated] == [2, 3]
    for line in evaluated:
        assert set(line) == {"step", *NAMES, *(f"{name}_ema" for name in NAMES)}
        assert line["eval/loss"] == pytest.approx(sum(line[name] for name in NAMES[:-1]) / 5)
        assert line["eval/loss"] != line["eval/loss_ema"]


def test_what_does_not_fit_is_one_line(root: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    tiny.VideoVAE(tiny.VAE).save_pretrained(tmp_path / "vae")
    tiny.make_latents(tmp_path / "other_vae", root / "other_clips", tmp_path / "vae")
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "ingest.json").write_text("{}")
    cases = {
        str(tmp_path / "gone"): "no finished latents: run videodit encode --out",
        str(tmp_path / "clips"): r"holds clips, no latents: run videodit encode --data.shards .* --out LATENTS",
        str(root / "train"): "has the clips of data.shards",
        str(tmp_path / "other_vae"): "were encoded with different settings of VAE",
    }
    for shards, words in cases.items():
        with pytest.raises(UserError, match=words) as refused:
            train_dit(dit_config(root, tmp_path / "run", eval_shards=shards))
        assert shards in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="eval_every 0 is below 1"):
        dit_config(root, eval_every=0)
    check_held_out(follow_latents(dit_config(root, eval_shards=None)))
