"""Prompt following against training seconds on the shapes world, one line a recipe.

    python benchmarks/time_to_quality.py --latents runs/demo/latents --seconds 420 [--recipes demo latte]

Every recipe starts from random weights and trains for the same wall-clock seconds on the same latents; its number of
steps is set from the speed of its first steps (or by --steps), so that its learning-rate schedule ends in time. It is
measured at each checkpoint by the oracle on clips generated with the averaged weights. Only training is timed; sampling
and measuring are not. Prints a table and writes OUT/time_to_quality.json.
"""

import argparse
import json
import shutil
import statistics
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from videodit.config import load_yaml
from videodit.data.shapes.world import prompt_specs
from videodit.evaluation.evaluate import follow_prompts
from videodit.evaluation.machine import machine_facts
from videodit.training.checkpoint import FOLDER, Checkpoint, steps_in
from videodit.training.dit_config import DiTRunConfig, follow_latents
from videodit.training.dit_model import export_dit
from videodit.training.dit_trainer import train_dit
from videodit.training.run_folder import read_metrics

CONFIG = Path(__file__).resolve().parents[1] / "configs/dit_demo.yaml"
CALIBRATION_STEPS = 12

# What each recipe changes in configs/dit_demo.yaml.
RECIPES: dict[str, dict[str, Any]] = {
    "demo": {},
    "no local layers": {"model.local_width": 0, "model.depth": 6},
    "adamw": {"optim.name": "adamw", "optim.lr": 2e-3},
    "velocity": {"flow.prediction": "velocity", "weighting": "uniform"},
    "velocity weights": {"weighting": "velocity"},
    "shift 5": {"noise.mean": 0.0, "noise.std": 1.0, "noise.shift": 5.0, "late_share": 0.0},
    "whole latents": {"crop.share": 0.0},
    "one level a clip": {"noise.frame_slope": 0.0},
    "levels per frame to the end": {"late_share": 0.0},
    "batch 16": {"global_batch_size": 16, "micro_batch_size": 16},
    "batch 32": {"global_batch_size": 32, "micro_batch_size": 32},
    "20 tokens": {"model.patch_size": [1, 4, 4], "crop.size": [4, 4], "model.hidden_size": 256, "model.num_heads": 8},
    "wide": {"model.hidden_size": 256, "model.num_heads": 8},
    "deep": {"model.depth": 8},
    "full attention": {"model.pattern": "f"},
    "no pooled text": {"model.pooled_text": False},
    "compiled": {"compile": True},
    # Latte, arXiv:2401.03048: DDPM noise prediction, linear schedule, AdamW at a constant 1e-4, patches of 2x2
    # (here at the demo's width and size, and with its byte-level text encoder).
    "latte": {
        "flow.path": "variance_preserving",
        "flow.prediction": "noise",
        "weighting": "uniform",
        "noise.density": "ddpm",
        "noise.shift": 1.0,
        "optim.name": "adamw",
        "optim.lr": 1e-4,
        "optim.schedule": "constant",
        "noise.frame_slope": 0.0,
        "late_share": 0.0,
        "crop.share": 0.0,
        "sampling.sampler": "euler",
        "sampling.shift": 3.4,  # the middle of the linear schedule's steps lies at sigma = 0.77
        "model.local_width": 0,
        "model.depth": 6,
        "model.pooled_text": False,
    },
}


def recipe_config(name: str, latents: str, run_dir: Path, **more: Any) -> DiTRunConfig:
    """The demo's config with a recipe's changes."""
    fixed = {"run_dir": str(run_dir), "data.shards": latents, "sample_every": 0, "tracker.mode": "disabled"}
    return load_yaml(DiTRunConfig, CONFIG, {**RECIPES[name], **fixed, **more})


def steps_in_time(name: str, latents: str, run_dir: Path, seconds: float) -> int:
    """How many steps a recipe does in that time: the median of a few, the first ones (compilation) left out."""
    share = recipe_config(name, latents, run_dir).crop.share
    mean = 0.0
    for cropped, part in ((1.0, share), (0.0, 1 - share)):  # steps on windows and on whole latents
        if part > 0:
            shutil.rmtree(run_dir, ignore_errors=True)
            train_dit(recipe_config(name, latents, run_dir, max_steps=CALIBRATION_STEPS, **{"crop.share": cropped}))
            times = [line["perf/step_s"] for line in read_metrics(run_dir) if "perf/step_s" in line]
            mean += part * statistics.median(times[2:])
    shutil.rmtree(run_dir)
    return max(int(seconds / mean), CALIBRATION_STEPS)


def measure_recipe(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains a recipe and measures its checkpoints: one row each."""
    run_dir = Path(options.out) / name.replace(" ", "_")
    steps = options.steps or steps_in_time(name, options.latents, run_dir, options.seconds)
    every = -(-steps // options.points)
    config = recipe_config(
        name, options.latents, run_dir, max_steps=steps, save_every=every, keep_last=options.points + 1
    )
    train_dit(config)
    step_seconds = [line["perf/step_s"] for line in read_metrics(run_dir) if "perf/step_s" in line]
    specs = prompt_specs(options.prompts, "train", 0)
    rows = []
    for step in steps_in(run_dir):
        model = run_dir / f"model-{step}"
        export_dit(follow_latents(config), Checkpoint.open(run_dir / FOLDER / f"step-{step:08d}"), model)
        _, measured = follow_prompts(str(model), specs, str(run_dir / "samples"), 0, 64)
        rows.append({"recipe": name, "step": step, "seconds": round(sum(step_seconds[:step]), 1), **measured.accuracy})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    """All rows, a line a checkpoint."""
    table = Table("recipe", "seconds", "steps", "color", "shape", "motion", "all")
    for row in rows:
        shares = (f"{row[name]:.2f}" for name in ("color", "shape", "motion", "all"))
        table.add_row(row["recipe"], f"{row['seconds']:.0f}", str(row["step"]), *shares)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latents", required=True, help="latents of the shapes world, as the demo makes them")
    parser.add_argument("--out", default="runs/time_to_quality")
    parser.add_argument("--seconds", type=float, default=420.0, help="training time of each recipe")
    parser.add_argument("--steps", type=int, help="train so many steps, whatever the time: on busy cores")
    parser.add_argument("--points", type=int, default=3, help="checkpoints measured of each recipe")
    parser.add_argument("--prompts", type=int, default=128, help="clips generated for each point")
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES), choices=list(RECIPES), metavar="NAME")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.recipes:
        rows += measure_recipe(name, options)
        result = {"machine": machine_facts(), "options": vars(options), "rows": rows}
        Path(options.out).mkdir(parents=True, exist_ok=True)
        (Path(options.out) / "time_to_quality.json").write_text(json.dumps(result, indent=1) + "\n")
        print_table(rows)


if __name__ == "__main__":
    main()
