"""Held-out loss against training FLOPs: DiTs of several widths, and two models of equal FLOPs for each: a factorized 3D
U-Net, and a DiT of half the depth with local convolutional layers around it, as the demo's has.

    python benchmarks/scaling.py --latents runs/demo/latents --out runs/scaling

Same latents, clips, noise, text encoder, objective (rectified flow, --prediction), optimizer and steps; each model's
learning rate is the best of --rates in a fifth of the steps. A velocity is mostly noise, which a model that is narrower
than its input cannot hand on, so that `velocity` measures that as well; local layers have a gate past them. FLOPs are
counted by torch.utils.flop_counter, forward and backward; the U-Net's width, and that of the local layers, is the
multiple of 4 with the nearest count. The last clips are held out, and read at fixed noise levels with fixed noise.
Writes scaling.json and scaling.svg after each model, and prints the exponent b of loss ~ FLOPs^-b over the final points
of each family. Started again with the same options, it keeps the models that scaling.json has; --families and --widths
may differ, so that they can be measured one by one.
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from unet3d import GROUPS, UNet3D

from videodit.data.latents import read_latent_sample
from videodit.data.shards import ShardSet
from videodit.device import choose_device
from videodit.evaluation.charts import Curve, line_chart, svg_text
from videodit.evaluation.machine import machine_facts
from videodit.evaluation.report_style import STYLE
from videodit.flow.loss import flow_loss, frame_error
from videodit.flow.noise_level import NoiseLevelConfig, sigma_from_uniform
from videodit.flow.path import interpolate
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.text import ByteTextConfig, ByteTextEncoder
from videodit.planning.footprint import step_flops

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.96)
NOISE = NoiseLevelConfig(mean=0.0, std=1.0, shift=5.0)
TEXT = ByteTextConfig(dim=128, buckets=4096, depth=0)
HELD_OUT = 256
FAMILIES = ("DiT", "U-Net", "DiT+local")


class Denoiser(nn.Module):
    """A model of latents and the text encoder that is trained with it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.text = model, ByteTextEncoder(TEXT)

    def forward(self, x: Tensor, sigma: Tensor, captions: list[str]) -> Tensor:
        text = self.text.encode(captions)
        out: Tensor = self.model(x, sigma, text.embeddings, text.mask)
        return out


def dit(width: int, local: int, channels: int) -> nn.Module:
    """The factorized DiT: two spatial and two temporal blocks, or one of each with a local block on each side."""
    return VideoDiT(
        DiTConfig(
            in_channels=channels,
            hidden_size=width,
            depth=2 if local else 4,
            num_heads=width // 32,
            text_dim=TEXT.dim,
            activation="gelu",
            absolute_position=True,
            local_width=local,
            local_depth=1 if local else 0,
        )  # fmt: skip
    )


def unet(width: int, channels: int) -> nn.Module:
    """The U-Net of a width."""
    return UNet3D(channels, width, TEXT.dim)


def flops(build: Callable[[], nn.Module], shape: tuple[int, ...]) -> int:
    """Of a training step on one clip with eight words."""

    def one_pass(model: nn.Module) -> None:
        text, mask = torch.zeros(1, 8, TEXT.dim), torch.ones(1, 8, dtype=torch.bool)
        model(torch.zeros(1, *shape), torch.zeros(1), text, mask).square().mean().backward()

    return step_flops(build, one_pass)


def nearest(build: Callable[[int], nn.Module], wanted: int, shape: tuple[int, ...]) -> int:
    """The multiple of GROUPS with which a model's step costs the most similar number of FLOPs."""
    costs = {}
    for width in range(GROUPS, 256 * GROUPS, GROUPS):
        costs[width] = flops(partial(build, width), shape)
        if costs[width] > wanted:
            break
    return min(costs, key=lambda width: abs(math.log(costs[width] / wanted)))


class Clips:
    """All latents in memory; the last HELD_OUT are for measuring."""

    def __init__(self, folder: str, device: torch.device) -> None:
        shards = ShardSet.open(folder)
        samples = [read_latent_sample(shards, index) for index in range(len(shards))]
        self.mean = torch.stack([sample.mean for sample in samples]).float().to(device)
        self.captions = [shards.captions(index) for index in range(len(shards))]
        self.train = len(samples) - min(HELD_OUT, len(samples) // 4)

    @property
    def shape(self) -> tuple[int, ...]:
        """(c, t, h, w)."""
        return tuple(self.mean.shape[1:])


def wanted(prediction: str, x0: Tensor, noise: Tensor) -> Tensor:
    """What a model of this prediction should say."""
    return x0 if prediction == "x0" else noise - x0


def train(
    model: Denoiser, clips: Clips, steps: int, batch: int, rate: float, prediction: str, points: int = 6
) -> tuple[list[int], list[float]]:
    """AdamW with warm-up and linear decay; (steps, held-out loss) at `points` moments, the last after all steps."""
    device = clips.mean.device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    generator, rng = torch.Generator().manual_seed(1), np.random.default_rng(1)
    warmup = max(1, steps // 20)
    at, losses = [], []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(step / warmup, 1.0) * (1 - (step - 1) / steps)
        rows = torch.randint(clips.train, (batch,), generator=generator)
        captions = [str(rng.choice(clips.captions[row])) for row in rows.tolist()]
        sigma = sigma_from_uniform(torch.rand(batch, generator=generator), NOISE).to(device)
        noise = torch.randn(batch, *clips.shape, generator=generator).to(device)
        x0 = clips.mean[rows.to(device)]
        noisy = interpolate("rectified", x0, noise, sigma[:, None, None, None, None])
        weight = torch.ones(batch, clips.shape[1], device=device)
        loss = flow_loss(frame_error(model(noisy, sigma, captions), wanted(prediction, x0, noise)), weight).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(1, steps // points) == 0 or step == steps:
            at.append(step)
            losses.append(held_out_loss(model, clips, prediction))
    return at, losses


@torch.no_grad()
def held_out_loss(model: Denoiser, clips: Clips, prediction: str) -> float:
    """Mean over LEVELS of the prediction's squared error, relative to that of predicting nothing."""
    device, generator = clips.mean.device, torch.Generator().manual_seed(2)
    rows = range(clips.train, len(clips.captions))
    total = 0.0
    for level in LEVELS:
        error = scale = 0.0
        for start in range(rows.start, rows.stop, 64):
            x0 = clips.mean[start : min(start + 64, rows.stop)]
            noise = torch.randn(x0.shape, generator=generator).to(device)
            sigma = torch.full((len(x0),), level, device=device)
            noisy = interpolate("rectified", x0, noise, sigma[:, None, None, None, None])
            captions = [clips.captions[start + i][0] for i in range(len(x0))]
            right = wanted(prediction, x0, noise)
            error += float((model(noisy, sigma, captions) - right).square().sum())
            scale += float(right.square().sum())
        total += error / scale
    return total / len(LEVELS)


def exponent(costs: list[float], losses: list[float]) -> float:
    """b of loss ~ cost^-b, by least squares of the logarithms."""
    return -float(np.polyfit(np.log(costs), np.log(losses), 1)[0])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Final losses of each family against training FLOPs, as SVG."""
    xs = sorted({math.log10(row["train_flops"]) for row in rows})
    lines = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        points = {math.log10(row["train_flops"]): row["held_out_loss"] for row in rows if row["family"] == family}
        lines[family] = [points.get(x, math.nan) for x in xs]
    curve = Curve("held-out loss", "relative squared error", xs, lines, log=True, xlabel="log10 of training FLOPs")
    svg = line_chart(curve).replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    svg = svg.replace('viewBox="0 0 460 270"', 'viewBox="0 0 460 294"', 1)  # room for the legend
    legend = ""
    for i, name in enumerate(lines):
        x = 60 + 120 * i
        legend += f'<circle class="dot s{i}" cx="{x}" cy="282" r="4"/>' + svg_text(
            "tick", x + 10, 286, name, anchor="start"
        )
    svg = svg.replace("</svg>", f"{legend}</svg>")
    path.write_text(svg.replace(">", f"><style>{STYLE}</style>", 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 96, 128, 192])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[4e-3, 8e-3, 1.6e-2])
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--prediction", choices=("velocity", "x0"), default="velocity")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = choose_device(options.device)
    clips = Clips(options.latents, device)
    channels = clips.shape[0]
    sizes: dict[str, list[tuple[str, Callable[[], nn.Module]]]] = {name: [] for name in FAMILIES}
    for width in options.widths:
        cost = flops(partial(dit, width, 0, channels), clips.shape)
        of_unet = nearest(partial(unet, channels=channels), cost, clips.shape)
        local = nearest(partial(dit, width, channels=channels), cost, clips.shape)
        sizes["DiT"].append((str(width), partial(dit, width, 0, channels)))
        sizes["U-Net"].append((str(of_unet), partial(unet, of_unet, channels)))
        sizes["DiT+local"].append((f"{width}, {local}", partial(dit, width, local, channels)))
    rows = measured_before(options)
    if rows:
        report(rows, options)
    for family in options.families:
        for width, build in sizes[family]:
            if any((row["family"], row["width"]) == (family, width) for row in rows):
                continue
            started = time.perf_counter()

            def run(steps: int, rate: float, points: int) -> tuple[nn.Module, list[int], list[float]]:
                torch.manual_seed(0)
                model = Denoiser(build()).to(device)  # noqa: B023
                return model.model, *train(model, clips, steps, options.batch, rate, options.prediction, points)

            trials = {rate: run(max(1, options.steps // 5), rate, 1)[2][-1] for rate in options.rates}
            rate = min(trials, key=lambda rate: trials[rate])
            model, at, losses = run(options.steps, rate, 6)
            cost = flops(build, clips.shape) * options.batch
            rows.append({"family": family, "width": width, "rate": rate, "trials": trials, "step_flops": cost})
            rows[-1]["parameters"] = sum(p.numel() for p in model.parameters())
            rows[-1]["seconds"] = time.perf_counter() - started
            rows[-1]["train_flops"] = cost * options.steps
            rows[-1] |= {"steps": at, "losses": losses, "held_out_loss": losses[-1]}
            report(rows, options)


def shown(options: argparse.Namespace) -> dict[str, Any]:
    """The options as scaling.json has them."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def measured_before(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of an earlier start with the same options but for families and widths; none if there was none."""
    path = options.out / "scaling.json"
    if not path.exists():
        return []
    before = json.loads(path.read_text())
    free = ("families", "widths")
    for name, value in shown(options).items():
        if name not in free and before["options"].get(name) != value:
            raise SystemExit(f"{path} was measured with --{name} {before['options'][name]}: choose another --out")
    rows: list[dict[str, Any]] = before["rows"]
    return rows


def report(rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Prints the table and the exponents; writes JSON and plot."""
    table = Table("family", "width", "parameters", "GFLOP/step", "rate", "seconds", "held-out loss")
    for row in rows:
        cells = (f"{row['parameters'] / 1e6:.2f} M", f"{row['step_flops'] / 1e9:.1f}", f"{row['rate']:g}")
        table.add_row(row["family"], row["width"], *cells, f"{row['seconds']:.0f}", f"{row['held_out_loss']:.4f}")
    console = Console()
    console.print(table)
    fits = {}
    for family in dict.fromkeys(row["family"] for row in rows):
        mine = [row for row in rows if row["family"] == family]
        if len(mine) > 1:
            fits[family] = exponent([r["train_flops"] for r in mine], [r["held_out_loss"] for r in mine])
            console.print(f"{family}: loss ~ FLOPs^-{fits[family]:.3f}")
    options.out.mkdir(parents=True, exist_ok=True)
    result = {"machine": machine_facts(), "options": shown(options), "exponents": fits, "rows": rows}
    (options.out / "scaling.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, options.out / "scaling.svg")


if __name__ == "__main__":
    main()
