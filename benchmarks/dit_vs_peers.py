"""VideoDiT beside diffusers' Latte (factorized) and Wan (full attention): speed and memory at equal shape and FLOPs.

    python benchmarks/dit_vs_peers.py --dtype fp32 --out benchmarks/results/dit_vs_peers.json

Forward, training step (forward and backward, no optimizer) and 20 sampling steps with guidance, eager and, with
--compile, each block compiled. All models run in turn within each repetition, so that what else the machine does falls
on all alike; medians are shown. Latte's layer is a spatial and a temporal block, and attends to text in the spatial one
only: ours has the same blocks and `cross_attention: s`. Beside Wan ours has full attention. FLOPs are counted by
torch.utils.flop_counter with attention as plain products. Weights are random, latents are noise.
Needs `pip install 'videodit[wan]'`.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from videodit.device import choose_device, torch_dtype
from videodit.evaluation.machine import machine_facts
from videodit.models.dit import DiTConfig, TextContext, VideoDiT
from videodit.planning.footprint import count_flops, live_bytes

CHANNELS, TEXT_DIM, SAMPLING_STEPS = 4, 256, 20

FIGURES = {
    "flops_forward": "GFLOP forward",
    "flops_train": "GFLOP train step",
    "forward_s": "forward (s)",
    "train_s": "train step (s)",
    "sample_s": f"{SAMPLING_STEPS} sampling steps (s)",
    "forward_gflops_per_s": "forward (GFLOP/s)",
    "train_gflops_per_s": "train step (GFLOP/s)",
    "peak_gib": "peak of a train step (GiB)",
}
UNITS = {"flops_forward": 1e9, "flops_train": 1e9}


@dataclass(frozen=True)
class Shape:
    """What all models have in common; tokens are those of a clip, patches are 1x2x2."""

    width: int
    depth: int
    heads: int
    frames: int
    side: int
    text: int
    batch: int


@dataclass
class Contender:
    """A model, and how it is called."""

    name: str
    model: nn.Module
    prepare: Callable[[Tensor], Any]
    """text (b, l, d) -> what `call` gets of it, once per sampling"""
    call: Callable[[Tensor, Tensor, Any], Tensor]
    """(latents, sigma (b,), prepared text) -> velocity"""


def ours(name: str, shape: Shape, pattern: str) -> Contender:
    """VideoDiT without what the peers have not: QK norm stays, as Wan has it."""
    config = DiTConfig(
        in_channels=CHANNELS, hidden_size=shape.width, depth=shape.depth, num_heads=shape.heads, pattern=pattern,
        cross_attention="sf", text_dim=TEXT_DIM, pooled_text=False, mask_text=False,
    )  # fmt: skip
    model = VideoDiT(config)

    def prepare(text: Tensor) -> TextContext:
        return model.text_context(text, torch.ones(text.shape[:2], dtype=torch.bool, device=text.device))

    return Contender(name, model, prepare, model)


def latte(shape: Shape) -> Contender:
    """diffusers' LatteTransformer3DModel, with the settings of the published one where they are not the shape."""
    from diffusers import LatteTransformer3DModel

    model = LatteTransformer3DModel(
        num_attention_heads=shape.heads, attention_head_dim=shape.width // shape.heads, in_channels=CHANNELS,
        out_channels=CHANNELS, num_layers=shape.depth // 2, cross_attention_dim=shape.width, attention_bias=True,
        sample_size=2 * shape.side, patch_size=2, activation_fn="gelu-approximate", num_embeds_ada_norm=1000,
        norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6, caption_channels=TEXT_DIM,
        video_length=shape.frames,
    )  # fmt: skip

    def call(latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return model(latents, 1000 * sigma, text, return_dict=False)[0]

    return Contender("Latte (diffusers)", model, lambda text: text, call)


def wan(shape: Shape) -> Contender:
    """diffusers' WanTransformer3DModel."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=shape.heads, attention_head_dim=shape.width // shape.heads, in_channels=CHANNELS,
        out_channels=CHANNELS, text_dim=TEXT_DIM, ffn_dim=4 * shape.width, num_layers=shape.depth,
    )  # fmt: skip

    def call(latents: Tensor, sigma: Tensor, text: Tensor) -> Tensor:
        return model(latents, 1000 * sigma, text, return_dict=False)[0]

    return Contender("Wan (diffusers)", model, lambda text: text, call)


def compile_blocks(model: nn.Module) -> None:
    """Compiles every repeated block where it stands; it must not fall back to Python."""
    for name in ("blocks", "transformer_blocks", "temporal_transformer_blocks"):
        for block in getattr(model, name, ()):
            block.compile(fullgraph=True)


class Trial:
    """The three measurements of one model."""

    def __init__(self, contender: Contender, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.contender = contender
        contender.model.to(device, dtype)
        for parameter in contender.model.parameters():  # zeros of a fresh model would skip nothing, but be safe
            if not bool(parameter.any()):
                nn.init.normal_(parameter, std=0.02)
        side = 2 * shape.side
        like: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latents = torch.randn(shape.batch, CHANNELS, shape.frames, side, side, **like)
        self.text = torch.randn(shape.batch, shape.text, TEXT_DIM, **like)
        self.sigma = torch.full((shape.batch,), 0.5, device=device)
        self.seconds: dict[str, list[float]] = {"forward": [], "train": [], "sample": []}

    @torch.no_grad()
    def forward(self) -> None:
        self.contender.call(self.latents, self.sigma.to(self.latents.dtype), self.contender.prepare(self.text))

    def train(self, _: nn.Module | None = None) -> None:
        out = self.contender.call(self.latents, self.sigma.to(self.latents.dtype), self.contender.prepare(self.text))
        (out.float() - self.latents.float()).square().mean().backward()

    @torch.no_grad()
    def sample(self) -> None:
        """Euler with guidance: two calls a step, one text for all of them."""
        given, empty = (self.contender.prepare(text) for text in (self.text, torch.zeros_like(self.text)))
        x = self.latents
        for step in range(SAMPLING_STEPS):
            sigma = torch.full_like(self.sigma, 1 - step / SAMPLING_STEPS).to(x.dtype)
            conditional, plain = (self.contender.call(x, sigma, text) for text in (given, empty))
            x = x - (plain + 3.0 * (conditional - plain)) / SAMPLING_STEPS

    def time(self, what: str) -> None:
        """One run of `forward`, `train` or `sample`; gradients are kept as tensors, as an optimizer finds them."""
        _wait(self.latents.device)
        start = time.perf_counter()
        getattr(self, what)()
        _wait(self.latents.device)
        self.seconds[what].append(time.perf_counter() - start)

    def flops(self) -> dict[str, Any]:
        """Of both passes; nothing where a GPU has no room for the scores of attention as plain products."""
        try:
            forward = count_flops(self.contender.model, lambda _: self.forward())
            return {"flops_forward": forward, "flops_train": count_flops(self.contender.model, self.train)}
        except torch.cuda.OutOfMemoryError:
            self.contender.model.zero_grad()
            return {}

    def peak_bytes(self) -> int:
        """Most that a training step holds at once beside weights and gradients."""
        if self.latents.device.type != "cuda":
            return live_bytes(self.contender.model, self.train)
        self.train()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.train()
        return torch.cuda.max_memory_allocated() - before


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def run(trials: list[Trial], repeats: int, what: list[str], compiled: bool) -> list[dict[str, Any]]:
    """Measures all of them in turn; the first repetition warms up and does not count. FLOPs and memory are eager."""
    rows: list[dict[str, Any]] = []
    for trial in trials:
        rows.append({"model": trial.contender.name} | trial.flops())
        rows[-1]["peak_gib"] = trial.peak_bytes() / 2**30
        rows[-1]["parameters"] = sum(p.numel() for p in trial.contender.model.parameters())
    if compiled:
        for trial in trials:
            compile_blocks(trial.contender.model)
    for name in what:
        for _ in range(repeats + 1):
            for trial in trials:
                trial.time(name)
    for row, trial in zip(rows, trials):
        for name in what:
            row[f"{name}_s"] = statistics.median(trial.seconds[name][1:])
            if f"flops_{name}" in row:
                row[f"{name}_gflops_per_s"] = row[f"flops_{name}"] / row[f"{name}_s"] / 1e9
    return rows


def table(title: str, rows: list[dict[str, Any]]) -> Table:
    """Ours beside the peer, with the ratio: above 1 ours is better, or has fewer FLOPs."""
    result = Table("", *(row["model"] for row in rows), "ratio", title=title, title_justify="left")
    mine, peer = rows
    for name, label in FIGURES.items():
        if name not in mine or name not in peer:
            continue
        ratio = mine[name] / peer[name] if name.endswith("per_s") else peer[name] / mine[name]
        result.add_row(label, *(f"{row[name] / UNITS.get(name, 1):.3f}" for row in rows), f"{ratio:.2f}x")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--measure", nargs="+", default=["forward", "train", "sample"], metavar="WHAT")
    parser.add_argument("--peers", nargs="+", default=["latte", "wan"], choices=["latte", "wan"])
    for name, default in (("width", 384), ("depth", 12), ("heads", 6), ("frames", 8), ("side", 16), ("text", 64)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, dtype = choose_device(args.device), torch_dtype(args.dtype)
    shape = Shape(args.width, args.depth, args.heads, args.frames, args.side, args.text, args.batch)
    old = json.loads(args.out.read_text())["results"] if args.out and args.out.exists() else []
    results, machine = [], machine_facts()
    for peer in args.peers:
        torch.manual_seed(0)
        if peer == "latte":
            pair = [ours("videodit", shape, "st"), latte(shape)]
        else:
            pair = [ours("videodit", shape, "f"), wan(shape)]
        trials = [Trial(contender, shape, device, dtype) for contender in pair]
        rows = run(trials, args.repeats, args.measure, args.compile)
        Console().print(table(f"{peer}, {args.dtype}{', compiled' if args.compile else ''}, {shape}", rows))
        facts = {"peer": peer, "dtype": args.dtype, "compiled": args.compile, "shape": vars(shape)}
        results.append({**facts, "rows": rows})
        if args.out:  # after each: a machine that is lent may be taken back
            args.out.write_text(json.dumps({"machine": machine, "results": old + results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
