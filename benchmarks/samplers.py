"""How the way of sampling changes what a model of the shapes world shows: prompt following, and variety.

    python benchmarks/samplers.py --model runs/demo/model own "sampler=euler num_steps=20" "guidance_scale=1.5"

Each argument is one line: what it changes in the model's own sampling defaults. Prompt following is the oracle's
reading of clips (frames, not .mp4 files) of balanced prompts. Variety tells whether a sampler keeps what a prompt
leaves open: over clips of one prompt with different seeds, the standard deviation of the place of a still object, and
mean and standard deviation of the way that a moving one goes, beside the world's own.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from videodit.data.shapes.render import render
from videodit.data.shapes.world import SceneSpec, captions, place_object, prompt_specs
from videodit.device import choose_device, choose_dtype, torch_dtype
from videodit.evaluation.machine import machine_facts
from videodit.evaluation.prompt_following import measure
from videodit.generation.pipeline import TextToVideo

OPEN = ("still", "right")  # their prompts leave open where the object is, and how fast it goes
MIN_CHROMA = 60.0  # of 255, largest minus smallest of RGB: backgrounds have none


def scenes(motion: str, count: int) -> list[SceneSpec]:
    """Scenes with one caption and different paths."""
    rng = np.random.default_rng(11)
    return [SceneSpec((place_object(rng, "red", "circle", "large", motion),), "dark", i) for i in range(count)]


def centers(clips: np.ndarray) -> np.ndarray:
    """Center of what is colored in each frame, (n, t, h, w, 3) uint8 -> (n, t, 2) pixels; NaN where nothing is."""
    chroma = clips.max(axis=-1).astype(float) - clips.min(axis=-1)
    weight = np.where(chroma > MIN_CHROMA, chroma, 0.0)
    total = weight.sum(axis=(2, 3))
    total[total == 0] = np.nan
    h, w = clips.shape[2:4]
    x, y = weight.sum(axis=2) @ (np.arange(w) + 0.5), weight.sum(axis=3) @ (np.arange(h) + 0.5)
    return np.stack([x, y], axis=-1) / total[..., None]


def variety(clips_of: dict[str, np.ndarray]) -> dict[str, float]:
    """Of clips of the two prompts in OPEN, in pixels."""
    place, way = centers(clips_of["still"]).mean(axis=1), centers(clips_of["right"])
    travelled = way[:, -1, 0] - way[:, 0, 0]
    return {
        "place_std": float(np.nanmean(np.nanstd(place, axis=0))),
        "way_mean": float(np.nanmean(travelled)),
        "way_std": float(np.nanstd(travelled)),
    }


def generate(pipe: TextToVideo, specs: list[SceneSpec]) -> np.ndarray:
    """One clip a scene, from the scenes' captions."""
    parts = [
        pipe([captions(spec)[0] for spec in specs[start : start + 32]], seed=start)
        for start in range(0, len(specs), 32)
    ]
    return np.concatenate(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="+", metavar="LINE", help="'key=value …' of the sampling defaults, or 'own'")
    parser.add_argument("--model", required=True, help="model folder, as videodit export writes it")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--same", type=int, default=64, help="clips of one prompt, for the variety")
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    device = choose_device("auto")
    pipe = TextToVideo.from_pretrained(options.model, device, torch_dtype(choose_dtype("auto", device)))
    own, specs = pipe.defaults, prompt_specs(options.prompts, "train", 0)
    same = {motion: scenes(motion, options.same) for motion in OPEN}
    world = variety({motion: np.stack([render(spec) for spec in specs]) for motion, specs in same.items()})
    rows: list[dict[str, Any]] = [{"line": "the world", **world}]
    for line in options.lines:
        changes = {} if line == "own" else dict(change.split("=", 1) for change in line.split())
        pipe.defaults = dataclasses.replace(own, **{key: yaml.safe_load(value) for key, value in changes.items()})
        accuracy = measure(list(generate(pipe, specs)), specs).accuracy
        rows.append({"line": line, "defaults": dataclasses.asdict(pipe.defaults), "accuracy": accuracy})
        rows[-1] |= variety({motion: generate(pipe, specs) for motion, specs in same.items()})
        if options.out:
            facts = {"machine": machine_facts(), "model": options.model, "rows": rows}
            Path(options.out).write_text(json.dumps(facts, indent=1) + "\n")
    table = Table("sampling", "color", "shape", "motion", "place std", "way mean", "way std")
    for row in rows:
        read = [f"{row['accuracy'][name]:.2f}" if "accuracy" in row else "" for name in ("color", "shape", "motion")]
        table.add_row(row["line"], *read, *(f"{row[name]:.1f}" for name in ("place_std", "way_mean", "way_std")))
    Console().print(table)


if __name__ == "__main__":
    main()
