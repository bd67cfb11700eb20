"""Many short trainings of the DiT, to find a recipe: quality against steps, without DeepSpeed, loader or checkpoints.

    python benchmarks/recipe_search.py --latents runs/demo/latents "base" "wide model.hidden_size=256 model.num_heads=8"

Each argument is a name and what it changes in configs/dit_demo.yaml. The model, the loss, the noise levels and Muon are
the product's; the loop is not: all latents on the device, one flat buffer of weights, Newton-Schulz in batches, and on
a GPU the whole step in one CUDA graph (5 times the trainer's steps a second at the demo's size). So it ranks recipes;
what one of them takes in seconds is for `time_to_quality.py` to say. With --seconds the number of steps follows from
the speed of the first ones, else it is max_steps.

Measures the error of the predicted clean latents of fresh clips at some noise levels, with the true prompt and with
another motion or shape, and, with --prompts N, what the oracle reads in N generated clips. Prints a line for each.
"""

import argparse
import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from prompt_sensitivity import LEVELS, changed, denoising_errors, encode_scenes
from samplers import generate
from torch import Tensor

import videodit.models.dit as dit_module
from videodit.config import load_yaml
from videodit.data.latent_crop import crop, draw_windows, window_weights
from videodit.data.latents import read_latent_sample
from videodit.data.shapes.world import captions, prompt_specs, sample_spec
from videodit.data.shards import ShardSet
from videodit.device import choose_device, choose_dtype, torch_dtype
from videodit.evaluation.machine import machine_facts
from videodit.evaluation.prompt_following import measure
from videodit.flow.loss import flow_loss, frame_error, level_weight, likelihood_loss
from videodit.flow.noise_level import frame_levels, frames_to_denoise, sigma_from_uniform
from videodit.flow.path import interpolate, target
from videodit.generation.pipeline import TextToVideo
from videodit.models.rope import absolute_embedding
from videodit.models.text import tokenize
from videodit.models.vae import VideoVAE
from videodit.training.dit_config import DiTRunConfig, follow_latents
from videodit.training.dit_model import build_model
from videodit.training.ema import beta_of, gamma_of
from videodit.training.optim import lr_factor, param_groups

CONFIG = Path(__file__).resolve().parents[1] / "configs/dit_demo.yaml"
DEVICE = choose_device("auto")
DTYPE = torch_dtype(choose_dtype("auto", DEVICE))
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan (2024), the Muon write-up
WARMUP_STEPS = 4  # before the graph is captured


class Latents:
    """All posteriors and captions of a folder, on the device."""

    def __init__(self, folder: str, config: DiTRunConfig) -> None:
        shards = ShardSet.open(folder)
        samples = [read_latent_sample(shards, index) for index in range(len(shards))]
        self.mean = torch.stack([sample.mean for sample in samples]).float().to(DEVICE)
        self.std = (0.5 * torch.stack([sample.logvar for sample in samples]).float()).exp().to(DEVICE)
        texts = [shards.captions(index) for index in range(len(shards))]
        self.count = torch.tensor([len(text) for text in texts], device=DEVICE)
        self.first = self.count.cumsum(0) - self.count
        tokens = tokenize(
            [caption for text in texts for caption in text] + [""], config.text.max_words, config.text.buckets
        )
        self.grams, self.index, self.mask = (x.to(DEVICE) for x in (tokens.grams, tokens.index, tokens.mask))
        self.empty = len(self.index) - 1

    def __len__(self) -> int:
        return len(self.mean)


def orthogonalize(matrices: Tensor) -> Tensor:
    """(k, r, c) -> the same, by five steps of Newton-Schulz."""
    a, b, c = NS_COEFFICIENTS
    x = matrices.to(DTYPE)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Search:
    """One training. `step` reads and writes tensors only, so that a CUDA graph can hold it."""

    def __init__(self, config: DiTRunConfig, data: Latents) -> None:
        self.config, self.data = config, data
        self.levels, self.window = config.noise_at(1), config.crop_steps > 0
        torch.manual_seed(config.seed)
        self.model = build_model(config).to(DEVICE, DTYPE)
        groups = param_groups(self.model, config.optim)
        matrices = [p for group in groups if group["use_muon"] for p in group["params"]]
        matrices.sort(key=lambda p: tuple(p.shape))
        params = matrices + [p for group in groups if not group["use_muon"] for p in group["params"]]
        self.master = torch.cat([p.detach().float().flatten() for p in params])
        self.weights, self.grad = self.master.to(DTYPE, copy=True), torch.zeros_like(self.master, dtype=DTYPE)
        start = 0
        for p in params:
            p.data = self.weights[start : start + p.numel()].view(p.shape)
            p.grad = self.grad[start : start + p.numel()].view(p.shape)
            start += p.numel()
        self.stacks: list[tuple[slice, tuple[int, int, int]]] = []
        start = 0
        shapes = [tuple(p.shape) for p in matrices]
        for rows, columns in sorted(set(shapes)):
            count = shapes.count((rows, columns))
            self.stacks.append((slice(start, start + count * rows * columns), (count, rows, columns)))
            start += count * rows * columns
        self.split = start
        self.momentum = torch.zeros_like(self.master[:start])
        self.exp_avg, self.exp_avg_sq = torch.zeros_like(self.master[start:]), torch.zeros_like(self.master[start:])
        self.average = self.master.clone()
        self.at = torch.zeros(1, dtype=torch.long, device=DEVICE)
        steps, betas, gamma = config.max_steps, config.optim.betas, gamma_of(config.ema_profiles[0])
        self.schedule = torch.tensor(
            [
                (lr_factor(config.optim, n, steps), 1 - betas[0] ** n, 1 - betas[1] ** n, 1 - beta_of(gamma, n))
                for n in range(1, steps + 1)
            ],
            device=DEVICE,
        )
        rows = steps * config.global_batch_size
        epochs = [torch.randperm(len(data)) for _ in range(-(-rows // len(data)))]
        self.order = torch.cat(epochs)[:rows].view(steps, -1).to(DEVICE)

    def loss(self) -> Tensor:
        """Of the next batch."""
        config, data = self.config, self.data
        rows = self.order[self.at][0]
        mean, std, origin = data.mean[rows], data.std[rows], None
        b, t = mean.shape[0], mean.shape[2]
        if self.window:
            size, patch = config.crop.size_in(*mean.shape[3:]), config.model.patch_size[1:]
            weights = window_weights(mean, size, patch, config.crop.contrast_power)
            origin = draw_windows(weights, patch, torch.rand(b, device=DEVICE))
            mean, std = crop(mean, origin, size), crop(std, origin, size)
        x0 = mean + std * torch.randn_like(mean) if config.sample_posterior else mean
        noise = torch.randn_like(mean)
        sigma = sigma_from_uniform(torch.rand(b, device=DEVICE), self.levels)
        sigma = frame_levels(sigma, t, torch.rand(b, device=DEVICE), torch.rand(b, device=DEVICE), self.levels)
        level = sigma[:, None, :, None, None]
        caption = data.first[rows] + (torch.rand(b, device=DEVICE) * data.count[rows]).long()
        caption = caption.masked_fill(torch.rand(b, device=DEVICE) < config.data.caption_drop, data.empty)
        assert self.model.text_encoder is not None
        mask = data.mask[caption]
        context = self.model.dit.text_context(self.model.text_encoder(data.grams, data.index[caption], mask), mask)
        noisy = interpolate(config.flow.path, x0, noise, level).to(DTYPE)
        predicted = self.model.dit(noisy, sigma, context, origin=origin)
        wanted = target(config.flow, x0, noise, level)
        weight = level_weight(sigma, config.weighting) * frames_to_denoise(sigma, self.levels)
        error = frame_error(predicted, wanted)
        if self.model.level_error is None:
            return flow_loss(error, weight).mean()
        return likelihood_loss(error, weight, self.model.level_error(sigma)).mean()

    def step(self) -> None:
        """One update of Muon and AdamW (without decay), and of the average."""
        self.grad.zero_()
        self.loss().backward()
        optim = self.config.optim
        with torch.no_grad():
            factor, correction1, correction2, renewal = self.schedule[self.at][0]
            gradient = self.grad.float()
            matrices, plain = gradient[: self.split], gradient[self.split :]
            self.momentum.lerp_(matrices, 1 - optim.muon_momentum)
            update = matrices.lerp(self.momentum, optim.muon_momentum)
            for part, (count, rows, columns) in self.stacks:
                change = orthogonalize(update[part].view(count, rows, columns)).float().flatten()
                self.master[part].sub_(change * (factor * optim.muon_lr * math.sqrt(max(1.0, rows / columns))))
            self.exp_avg.lerp_(plain, 1 - optim.betas[0])
            self.exp_avg_sq.lerp_(plain.square(), 1 - optim.betas[1])
            change = (self.exp_avg / correction1) / ((self.exp_avg_sq / correction2).sqrt() + optim.eps)
            self.master[self.split :].sub_(change * (factor * optim.lr))
            self.weights.copy_(self.master)
            self.average.lerp_(self.master, renewal)
            self.at += 1

    def train(self) -> float:
        """All steps, then the averaged weights in the model; gives seconds."""
        started, config = time.perf_counter(), self.config
        phases = sorted({0, config.crop_steps, config.max_steps - config.late_steps, config.max_steps})
        for start, end in zip(phases, phases[1:]):
            self.levels, self.window = config.noise_at(start + 1), start < config.crop_steps
            self._steps(end - start)
        self.weights.copy_(self.average)
        return time.perf_counter() - started

    def _steps(self, count: int) -> None:
        """So many steps of one kind; on a GPU as replays of one graph, after a few that warm up."""
        done, graph = 0, None
        if DEVICE.type == "cuda":
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):  # AccumulateGrad runs where it first ran: not on the default stream
                while done < min(WARMUP_STEPS, count):
                    self.step()
                    done += 1
            torch.cuda.synchronize()
            if done < count:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, stream=stream):
                    self.step()
        while done < count:
            self.step() if graph is None else graph.replay()
            done += 1


def steps_within(seconds: float, config: DiTRunConfig, data: Latents) -> int:
    """Steps that the time allows, from the median of the first ones of each kind."""
    mean = 0.0
    for share, part in ((1.0, config.crop.share), (0.0, 1 - config.crop.share)):  # on windows, on whole latents
        if part == 0:
            continue
        steps = dataclasses.replace(config, max_steps=12, crop=dataclasses.replace(config.crop, share=share))
        trial, times = Search(steps, data), []
        for _ in range(12):
            started = time.perf_counter()
            trial.step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        mean += part * sorted(times[2:])[5]
    return max(1, round(seconds / mean))


def errors(pipe: TextToVideo, clips: int) -> dict[str, list[float]]:
    """Errors at LEVELS with the true prompt, and with another motion and another shape."""
    rng = np.random.default_rng(5)
    specs = [sample_spec(rng) for _ in range(clips)]
    latents = encode_scenes(pipe, specs)
    prompts = {"true": [captions(spec)[0] for spec in specs]}
    prompts |= {name: [captions(changed(spec, name, rng))[0] for spec in specs] for name in ("motion", "shape")}
    return {name: denoising_errors(pipe, latents, texts) for name, texts in prompts.items()}


def accuracy(pipe: TextToVideo, prompts: int) -> dict[str, float]:
    """What the oracle reads in generated clips (frames, not .mp4 files)."""
    specs = prompt_specs(prompts, "train", 0)
    return measure(list(generate(pipe, specs)), specs).accuracy


def run(line: str, options: argparse.Namespace) -> dict[str, Any]:
    """One recipe's row."""
    name, *changes = line.split()
    overrides = {key: yaml.safe_load(value) for key, value in (change.split("=", 1) for change in changes)}
    if "global_batch_size" in overrides:
        overrides["micro_batch_size"] = overrides["global_batch_size"]
    overrides |= {"run_dir": "unused", "data.shards": options.latents}
    config = follow_latents(load_yaml(DiTRunConfig, CONFIG, overrides))
    data = Latents(options.latents, config)
    if options.seconds:
        config = dataclasses.replace(config, max_steps=steps_within(options.seconds, config, data))
    search = Search(config, data)
    seconds = search.train()
    assert config.vae is not None and search.model.text_encoder is not None
    vae = VideoVAE.from_pretrained(config.vae).to(DEVICE)
    pipe = TextToVideo(search.model, vae, search.model.text_encoder, config.flow, config.sampling)
    row: dict[str, Any] = {"recipe": line, "steps": config.max_steps, "seconds": round(seconds, 1)}
    row |= {"parameters": len(search.master), "errors": errors(pipe, 96)}
    if options.prompts:
        row["accuracy"] = accuracy(pipe, options.prompts)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="'NAME key=value …'")
    parser.add_argument("--latents", required=True, help="latents of the shapes world, as the demo makes them")
    parser.add_argument("--seconds", type=float, help="training time of each recipe; without it, max_steps")
    parser.add_argument("--prompts", type=int, default=0, help="clips to generate and read")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    tables: dict[tuple[int, int, int, int], Tensor] = {}

    def table(t: int, h: int, w: int, dim: int, origin: Tensor | None = None) -> Tensor:
        if origin is not None:
            return absolute_embedding(t, h, w, dim, origin)
        size = (t, h, w, dim)  # a graph cannot hold the copy of a fresh table to the device
        return tables.setdefault(size, absolute_embedding(*size).to(DEVICE))

    dit_module.absolute_embedding = table
    rows = []
    for line in options.recipes:
        rows.append(run(line, options))
        row = rows[-1]
        shown = "  ".join(f"{level:g}: {error:.3f}" for level, error in zip(LEVELS, row["errors"]["true"]))
        print(
            f"{line}\n  {row['steps']} steps, {row['seconds']:.0f} s, {row['parameters']:,} weights; error at {shown}"
        )
        for name in ("motion", "shape"):
            gaps = [wrong - true for wrong, true in zip(row["errors"][name], row["errors"]["true"])]
            print(f"  more with another {name}: " + "  ".join(f"{gap:+.4f}" for gap in gaps))
        if "accuracy" in row:
            print("  " + "  ".join(f"{key} {value:.3f}" for key, value in row["accuracy"].items()), flush=True)
        if options.out:
            facts = {"machine": machine_facts(), "levels": LEVELS, "rows": rows}
            Path(options.out).write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
