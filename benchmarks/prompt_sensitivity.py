"""How much a model uses each word of a prompt, without sampling: its error under captions with one attribute changed.

    python benchmarks/prompt_sensitivity.py --model runs/demo/model [--out FILE.json]

Fresh clips of the shapes world are noised; the model predicts the clean latents from them, once with their own captions
and once with captions that say another color, shape, size or motion. What it has learned to read makes the error rise:
an attribute whose change costs nothing is not followed, however good the clips look. This shows long before the oracle
can read generated clips. Prints a table: mean squared error of the latents (variance 1), a column a noise level.
"""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from videodit.data.shapes.render import render
from videodit.data.shapes.world import COLORS, MOTIONS, SHAPES, SIZES, SceneSpec, captions, sample_spec
from videodit.device import choose_device, choose_dtype, torch_dtype
from videodit.flow.path import interpolate
from videodit.generation.pipeline import RowNoise, TextToVideo, velocity_function

LEVELS = (0.3, 0.5, 0.7, 0.8, 0.9, 0.93, 0.96, 0.98)
WORDS: dict[str, Sequence[str]] = {"color": list(COLORS), "shape": SHAPES, "size": list(SIZES), "motion": MOTIONS}


def changed(spec: SceneSpec, attribute: str, rng: np.random.Generator) -> SceneSpec:
    """The scene with another word for one attribute of its object."""
    (thing,) = spec.objects
    others = [word for word in WORDS[attribute] if word != getattr(thing, attribute)]
    other = dataclasses.replace(thing, **{attribute: others[rng.integers(len(others))]})
    return dataclasses.replace(spec, objects=(other,))


@torch.no_grad()
def encode_scenes(pipe: TextToVideo, specs: Sequence[SceneSpec]) -> torch.Tensor:
    """Latents (b, c, t, h, w) of the scenes' rendered clips, where the model is."""
    clips = torch.from_numpy(np.stack([render(spec) for spec in specs])).to(pipe.model.dit.patch_out.weight.device)
    return pipe.vae.encode(clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0)


@torch.no_grad()
def denoising_errors(pipe: TextToVideo, latents: torch.Tensor, prompts: list[str]) -> list[float]:
    """Mean squared error of the predicted clean latents (b, c, t, h, w) at each of LEVELS."""
    weight = pipe.model.dit.patch_out.weight
    context = pipe.model.text_context(pipe.text_encoder.encode(prompts))
    velocity = velocity_function(
        lambda x, sigma, text: pipe.model(x.to(weight.dtype), sigma, text), pipe.parameterization, context
    )
    noise = RowNoise(range(len(prompts)), tuple(latents.shape[1:]), latents.device)()  # type: ignore[arg-type]
    errors = []
    for level in LEVELS:
        x = interpolate("rectified", latents, noise, torch.full((1,), level, device=latents.device))
        predicted = x - level * velocity(x, torch.full((len(prompts),), level, device=latents.device))
        errors.append(float((predicted - latents).square().mean()))
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="model folder, as videodit export writes it")
    parser.add_argument("--clips", type=int, default=96)
    parser.add_argument("--out", help="JSON file to write")
    options = parser.parse_args()
    device = choose_device("auto")
    pipe = TextToVideo.from_pretrained(options.model, device, torch_dtype(choose_dtype("auto", device)))
    rng = np.random.default_rng(5)
    specs = [sample_spec(rng) for _ in range(options.clips)]
    latents = encode_scenes(pipe, specs)
    prompts = {"true": [captions(spec)[0] for spec in specs], "paraphrase": [captions(spec)[1] for spec in specs]}
    prompts |= {f"wrong {name}": [captions(changed(spec, name, rng))[0] for spec in specs] for name in WORDS}
    prompts["none"] = [""] * len(specs)
    table = Table("caption", *(f"{level:g}" for level in LEVELS))
    rows = {name: denoising_errors(pipe, latents, texts) for name, texts in prompts.items()}
    for name, errors in rows.items():
        table.add_row(name, *(f"{error:.4f}" for error in errors))
    Console().print(table)
    if options.out:
        result = {"model": options.model, "clips": options.clips, "levels": LEVELS, "errors": rows}
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
