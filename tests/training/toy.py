"""A small module with every kind of parameter that the trainers have, and a plain torch loop to compare with."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from videodit.parallel.mesh import World, gather_objects
from videodit.training.checkpoint import Checkpoint, load_latest
from videodit.training.checkpoint_writer import CheckpointWriter
from videodit.training.ema import PowerEMA
from videodit.training.engine import Engine
from videodit.training.optim import OptimConfig, param_groups

ROWS = 8
MAX_STEPS = 20


class Toy(nn.Module):
    """Convolution (5 axes), embedding, norm, matrices of both aspects; sizes that no partition divides evenly."""

    muon_exclude = ("last",)

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv3d(3, 5, (3, 3, 3), padding=1)
        self.token = nn.Embedding(7, 5)
        self.norm = nn.LayerNorm(5)
        self.up = nn.Linear(5, 19)
        self.down = nn.Linear(19, 5, bias=False)
        self.last = nn.Linear(5, 3)

    def forward(self, clip: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
        x = self.conv(clip).mean((2, 3, 4)) + self.token(token)
        x = x + self.down(nn.functional.gelu(self.up(self.norm(x))))
        return self.last(x)


def make_toy() -> Toy:
    torch.manual_seed(0)
    return Toy()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The global batch of a step: clip, token, target, weight (one row is padding)."""
    g = torch.Generator().manual_seed(step)
    weight = torch.rand(ROWS, generator=g)
    weight[-1] = 0
    return (
        torch.randn(ROWS, 3, 2, 3, 3, generator=g),
        torch.randint(0, 7, (ROWS,), generator=g),
        torch.randn(ROWS, 3, generator=g),
        weight,
    )


def optim_config(name: str = "adamw", grad_clip: float = 0.5) -> OptimConfig:
    return OptimConfig(
        name=name, lr=1e-2, muon_lr=2e-2, weight_decay=0.1, warmup_steps=3, schedule="cosine", grad_clip=grad_clip
    )


def make_engine(world: World, stage: int, dtype: str = "fp32", name: str = "adamw", **kwargs: float) -> Engine:
    """Of an optimizer, or of adamw that is offloaded (name offload)."""
    config = optim_config("adamw" if name == "offload" else name, **kwargs)
    options = {"zero_stage": stage, "dtype": dtype, "max_steps": MAX_STEPS, "offload": name == "offload"}
    return Engine(make_toy(), config, world=world, **options)


def train(engine: Engine, world: World, first: int, last: int, micro: int = 1, ema: PowerEMA | None = None) -> list:
    """Steps first … last; this rank's rows in `micro` micro batches. Returns what step() returned."""
    results = []
    for step in range(first, last + 1):
        clip, token, target, weight = batch(step)
        mine = torch.arange(ROWS)[world.rank :: world.size]
        for rows in mine.chunk(micro):
            out = engine(clip[rows].to(engine.dtype), token[rows]).float()
            per_row = (out - target[rows]).square().mean(1)
            engine.backward((weight[rows] * per_row).sum() / weight.sum())
        results.append(engine.step(step))
        if ema:
            ema.update(step)
    return results


def train_plain(steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """The same run in one process without DeepSpeed: weights and gradient norms."""
    from videodit.training.optim import learning_rate

    module, config = make_toy(), optim_config()
    optimizer = torch.optim.AdamW(param_groups(module, config))
    norms = []
    for step in range(1, steps + 1):
        clip, token, target, weight = batch(step)
        per_row = (module(clip, token) - target).square().mean(1)
        ((weight * per_row).sum() / weight.sum()).backward()
        norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), config.grad_clip)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, MAX_STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in module.named_parameters()}, norms


def shared_folder() -> Path:
    """One temporary folder for all ranks."""
    return Path(gather_objects(tempfile.mkdtemp())[0])


def save(
    folder: Path,
    step: int,
    engine: Engine,
    ema: PowerEMA | None = None,
    extra: dict[str, Any] | None = None,
    **keep: int,
) -> str:
    """Writes a checkpoint and waits for it; returns what kept it from being written, "" for nothing."""
    writer = CheckpointWriter(folder, engine, ema, **keep)
    writer.save(step, extra)
    written = writer.wait()
    assert written is not None and written.step == step
    return written.problem


def full_state(engine: Engine, ema: PowerEMA | None = None) -> dict[str, torch.Tensor]:
    """Everything there is to save, whole, on every rank: KIND/NAME -> tensor."""
    folder = shared_folder()
    assert not save(folder, 1, engine, ema)
    checkpoint = load_latest(folder)
    assert checkpoint is not None
    return whole(checkpoint)


def whole(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All of a checkpoint's tensors: KIND/NAME -> tensor."""
    shapes = {**checkpoint.state["shapes"], **checkpoint.state["buffers"]}
    return {
        f"{kind}/{name}": checkpoint.read(kind, name, 0, torch.Size(shapes[name]).numel())
        for kind, name in checkpoint._slices()
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys(), sorted(a.keys() ^ b.keys())
    for key in a:
        assert torch.equal(a[key], b[key]), f"{key} differs by up to {(a[key] - b[key]).abs().max()}"
