"""`videodit evaluate`: how well a model follows prompts (shapes world), or how near one set of videos is to another."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from videodit.data.shapes.world import SPLITS, SceneSpec, captions, prompt_specs
from videodit.data.video_io import VideoError, read_frames
from videodit.errors import UserError
from videodit.evaluation.prompt_following import PromptFollowing, measure, wilson_interval
from videodit.evaluation.reconstruction import compare
from videodit.generation.generate import GenerateConfig, generate
from videodit.generation.pipeline import read_parameterization
from videodit.models.vae_folder import load_vae
from videodit.progress import show_progress


@dataclass(frozen=True)
class EvaluateConfig:
    """What to measure."""

    model: str | None = None
    """model folder trained on the shapes world: generate clips for prompts and read them with the oracle"""
    videos: str | None = None
    """folder of .mp4 files, compared with those of the same name in --reference"""
    reference: str | None = None
    """folder of the originals"""
    num_prompts: int = 256
    """prompts to generate clips for"""
    split: str = "train"
    """train, or held_out for combinations that training never saw"""
    seed: int = 0
    """of the prompts and the clips"""
    out: str = "runs/evaluate"
    """folder for the generated clips"""
    batch_size: int = 32
    """clips computed at once"""

    def __post_init__(self) -> None:
        if (self.model is None) == (self.videos is None):
            raise ValueError("give either --model DIR, or --videos A --reference B")
        if self.videos is not None and self.reference is None:
            raise ValueError("--videos is given without --reference: give the folder of the originals too")
        if self.split not in SPLITS:
            raise ValueError(f"split {self.split!r} is not one of {', '.join(SPLITS)}")
        for name in ("num_prompts", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1: use for example 32")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is negative or has more than 63 bits: use for example 0")


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measures, prints a table, and returns the figures.

    Raises:
        UserError: if the model or the folders cannot be read.
    """
    if config.model is None:
        figures = compare_folders(Path(config.videos or ""), Path(config.reference or ""))
        _print({name: f"{value:.3f}" if isinstance(value, float) else str(value) for name, value in figures.items()})
        return figures
    specs = prompt_specs(config.num_prompts, config.split, config.seed)  # type: ignore[arg-type]
    figures = follow_prompts(config.model, specs, config.out, config.seed, config.batch_size)[1].accuracy
    n = int(figures["n"])
    rows = {}
    for name, value in figures.items():
        low, high = wilson_interval(float(value), n) if name != "n" else (0.0, 0.0)
        rows[name] = str(n) if name == "n" else f"{value:.3f}  (95%: {low:.3f} to {high:.3f})"
    _print(rows)
    Console().print("(prompts of the built-in shapes world, read by its oracle: for models trained on it)", style="dim")
    return figures


def follow_prompts(
    model: str, specs: Sequence[SceneSpec], out: str, seed: int, batch_size: int
) -> tuple[list[Path], PromptFollowing]:
    """Generates one clip per scene's exact caption and reads the files back with the oracle.

    Clips that an earlier call with the same model made are kept.

    Args:
        model: model folder.
        specs: what to ask for.
        out: folder for the clips.
        seed: of the first clip.
        batch_size: clips computed at once.
    Returns:
        The .mp4 files, and what was measured on them.
    """
    read_parameterization(model)  # says so if that is no model
    if load_vae(Path(model) / "vae").config.channel_mean is not None:
        raise UserError(f"model {model} makes fields: only clips of the shapes world can be read for what they show")
    prompts = [captions(spec)[0] for spec in specs]
    config = GenerateConfig(model=model, prompt=prompts, out=out, seed=seed, batch_size=batch_size, keep_existing=True)
    with show_progress("generate clips") as progress:
        paths = generate(config, progress)
    return paths, measure([read_frames(path) for path in paths], specs)


def compare_folders(videos: Path, reference: Path) -> dict[str, Any]:
    """PSNR between .mp4 files of the same name.

    Raises:
        UserError: if a folder is missing, nothing matches, or two files differ in size.
    """
    for folder in (videos, reference):
        if not folder.is_dir():
            raise UserError(f"no such folder: {folder}")
    names = sorted(path.name for path in videos.glob("*.mp4") if (reference / path.name).is_file())
    if not names:
        raise UserError(f"no .mp4 file of {videos} has a namesake in {reference}")
    totals: list[dict[str, Any]] = []
    for name in names:
        try:
            a, b = read_frames(videos / name), read_frames(reference / name)
        except VideoError as error:
            raise UserError(f"{name} cannot be read: {error}") from None
        if a.shape != b.shape:
            raise UserError(f"{name} is {a.shape} in {videos} and {b.shape} in {reference}: compare equal sizes")
        totals.append(compare(b[None], a[None], None))
    return {"psnr_db": float(np.mean([figures["psnr_db"] for figures in totals])), "n": len(names)}


def _print(rows: dict[str, str]) -> None:
    table = Table(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
