"""`videodit demo`: the whole way on the built-in world, through the same functions as the public verbs."""

import dataclasses
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from videodit.config import load_yaml, to_dict, to_yaml
from videodit.data.clip_reader import DataConfig
from videodit.data.folder_lock import FolderLock
from videodit.data.ingest import ingest
from videodit.data.loader import clips_in_order
from videodit.data.mp4 import encode_mp4
from videodit.data.shapes.oracle import oracle_report
from videodit.data.shapes.render import object_boxes, write_world
from videodit.data.shapes.world import SceneSpec, prompt_specs
from videodit.data.shards import ShardSet
from videodit.demo_stages import Stages
from videodit.device import choose_device
from videodit.errors import REFUSALS, UserError, user_error
from videodit.evaluation.charts import curve_from_metrics
from videodit.evaluation.evaluate import follow_prompts
from videodit.evaluation.machine import machine_facts
from videodit.evaluation.prompt_following import PromptFollowing
from videodit.evaluation.reconstruction import compare, reconstruct
from videodit.evaluation.report import ClipCard, Reconstruction, RunReport, write_report
from videodit.generation.encode import EncodeConfig, encode_clips
from videodit.models.vae import VideoVAE
from videodit.progress import show_progress
from videodit.settings import flatten
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_trainer import train_dit
from videodit.training.export import export_run
from videodit.training.vae_config import VAERunConfig
from videodit.training.vae_trainer import train_vae

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FPS = 8.0
SMOKE_NOTE = "A smoke run: it shows that everything runs, and learns nothing."
STAGES = ("render", "ingest", "vae", "encode", "dit", "generate")


@dataclass(frozen=True)
class DemoConfig:
    """The demo's size; the defaults are what README's figures were measured with."""

    out: str = "runs/demo"
    """folder for everything that is made; started again with the same settings, the demo goes on where it was"""
    vae_config: str = str(CONFIGS / "vae_demo.yaml")
    """recipe of the VAE"""
    dit_config: str = str(CONFIGS / "dit_demo.yaml")
    """recipe of the DiT"""
    num_clips: int = 4000
    """clips to train on"""
    num_eval_clips: int = 128
    """clips held out, to measure the VAE and the oracle on"""
    num_prompts: int = 256
    """clips generated for combinations that training has seen"""
    num_held_out_prompts: int = 128
    """clips generated for combinations that it never saw"""
    seed: int = 0
    """of the world, the training and the clips"""
    smoke: bool = False
    """a few steps on a few clips: shows that everything runs, learns nothing"""

    def __post_init__(self) -> None:
        for name in ("num_clips", "num_eval_clips", "num_prompts", "num_held_out_prompts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} is negative or has more than 63 bits: use for example 0")


def run_demo(config: DemoConfig) -> dict[str, Any]:
    """Runs what is not done yet: render, ingest, train vae, encode, train dit, generate, measure, report.

    Returns:
        result.json's content.
    Raises:
        UserError: if the folder cannot be written, is in use by another demo or was begun with other settings, or a
            recipe cannot be read.
    """
    recipes = _recipes(config)
    with FolderLock(config.out, "--out") as lock:
        lock.hold_alone()
        stages = Stages(Path(config.out), _settings(config, recipes))
        return _run_stages(_smoke(config) if config.smoke else config, stages, recipes)


def _run_stages(config: DemoConfig, stages: Stages, recipes: tuple[VAERunConfig, DiTRunConfig]) -> dict[str, Any]:
    out, console = Path(config.out), Console()
    vae_run, dit_run = recipes

    with stages.stage("render", console) as needed:
        if needed:
            write_world(out / "videos/train", config.num_clips, "train", seed=config.seed, fps=FPS)
            write_world(out / "videos/eval", config.num_eval_clips, "train", seed=config.seed + 1, fps=FPS)
    with stages.stage("ingest", console) as needed:
        for name in ("train", "eval") if needed else ():
            with show_progress(f"ingest {name} videos") as progress:
                ingest(out / "videos" / name, out / "shards" / name, progress=progress)
    with stages.stage("vae", console) as needed:
        if needed:
            train_vae(vae_run)
    with stages.stage("encode", console) as needed:
        if needed:
            data = DataConfig(shards=str(out / "shards/train"), buckets=vae_run.data.buckets[:1])
            with show_progress("encode clips") as progress:
                encode_clips(EncodeConfig(vae=str(out / "vae/model"), out=str(out / "latents"), data=data), progress)
    with stages.stage("dit", console) as needed:
        if needed:
            train_dit(dit_run)
            export_run(out / "dit", out / "model")
    clips = {}
    with stages.stage("generate", console):
        for split, count in (("train", config.num_prompts), ("held_out", config.num_held_out_prompts)):
            specs = prompt_specs(count, split, config.seed)  # type: ignore[arg-type]
            clips[split] = follow_prompts(str(out / "model"), specs, str(out / "samples" / split), config.seed, 32)
    try:
        return _measure_and_report(config, stages, clips, recipes, console)
    except OSError as error:
        if error.errno not in REFUSALS:
            raise
        raise user_error(error, out) from None


def _recipes(config: DemoConfig) -> tuple[VAERunConfig, DiTRunConfig]:
    """The two training configs with this demo's folders in them."""
    out = Path(config.out)
    for path in (config.vae_config, config.dit_config):
        if not Path(path).is_file():
            raise UserError(f"no recipe {path}: run from a clone of videodit, or give --vae_config and --dit_config")
    vae = load_yaml(
        VAERunConfig,
        config.vae_config,
        {
            "run_dir": str(out / "vae"),
            "seed": config.seed,
            "data.shards": str(out / "shards/train"),
            "eval_shards": str(out / "shards/eval"),
        },
    )
    dit = load_yaml(
        DiTRunConfig,
        config.dit_config,
        {
            "run_dir": str(out / "dit"),
            "seed": config.seed,
            "data.shards": str(out / "latents"),
            "vae": str(out / "vae/model"),  # latents know where it was when they were made
        },
    )
    if config.smoke:
        small = {"max_steps": 8, "save_every": 4, "sample_every": 4, "global_batch_size": 4, "micro_batch_size": 4}
        vae, dit = dataclasses.replace(vae, **small), dataclasses.replace(dit, **small)  # type: ignore[arg-type]
    return vae, dit


def _settings(config: DemoConfig, recipes: tuple[VAERunConfig, DiTRunConfig]) -> dict[str, dict[str, Any]]:
    """What each stage's result depends on, besides the stages before; where OUT lies does not count."""
    given = {f"--{name}": value for name, value in to_dict(config).items()}
    folders = ("run_dir", "data.shards", "eval_shards", "vae")
    vae, dit = (
        {f"{key} of {option}": value for key, value in flatten(type(run), to_dict(run), "") if key not in folders}
        for run, option in zip(recipes, ("--vae_config", "--dit_config"))
    )
    world = {name: given[name] for name in ("--smoke", "--seed", "--num_clips", "--num_eval_clips")}
    prompts = {name: given[name] for name in ("--num_prompts", "--num_held_out_prompts")}
    return {"render": world, "ingest": {}, "vae": vae, "encode": {}, "dit": dit, "generate": prompts}


def _smoke(config: DemoConfig) -> DemoConfig:
    return dataclasses.replace(config, num_clips=32, num_eval_clips=8, num_prompts=8, num_held_out_prompts=8)


def _measure_and_report(
    config: DemoConfig,
    stages: Stages,
    clips: dict[str, tuple[list[Path], PromptFollowing]],
    runs: tuple[VAERunConfig, DiTRunConfig],
    console: Console,
) -> dict[str, Any]:
    out, started = Path(config.out), time.perf_counter()
    originals, specs = _eval_clips(out, runs[0])
    rebuilt = reconstruct(VideoVAE.from_pretrained(out / "vae/model"), originals)
    boxes = [object_boxes(spec, originals.shape[1], originals.shape[2]) for spec in specs]
    vae_figures = compare(originals, rebuilt, boxes)
    vae_report = {
        "vae_psnr_db": vae_figures["psnr_db"],
        "vae_psnr_boxes_db": vae_figures["psnr_boxes_db"],
        "oracle_on_real": oracle_report(originals, specs),
        "oracle_on_reconstructed": oracle_report(rebuilt, specs),
    }
    machine = machine_facts()
    followed = {split: result.accuracy for split, (_, result) in clips.items()}
    seconds = {name: stages.seconds[name] for name in STAGES} | {"measure": time.perf_counter() - started}
    result = {
        "seconds": {name: round(value, 1) for name, value in {"total": sum(seconds.values()), **seconds}.items()},
        **vae_report,
        "accuracy": followed["train"],
        "held_out_accuracy": followed["held_out"],
        "dit_steps": runs[1].max_steps,
        "device": str(choose_device("auto")),
        "machine": machine,
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    pairs = [
        Reconstruction(encode_mp4(a, FPS), encode_mp4(b, FPS), float(compare(a[None], b[None], None)["psnr_db"]))
        for a, b in list(zip(originals, rebuilt))[:6]
    ]
    report = RunReport(
        title="videodit demo",
        result=result,
        clips=_cards(clips),
        reconstructions=pairs,
        curves=[
            curve_from_metrics(
                out / "vae/metrics.jsonl", "train/loss", "VAE training loss", "loss", smooth=True, log=True
            ),
            curve_from_metrics(out / "vae/metrics.jsonl", "eval/psnr_db", "VAE on held-out clips", "PSNR (dB)"),
            curve_from_metrics(
                out / "dit/metrics.jsonl", "train/mse", "DiT, error of the prediction", "MSE", smooth=True, log=True
            ),
        ],
        stages=seconds,
        machine=machine,
        notes=[SMOKE_NOTE] if config.smoke else [],
        configs={"vae": to_yaml(runs[0]), "dit": to_yaml(runs[1])},
        confusion=clips["train"][1].confusion,
    )
    write_report(out / "report.html", report)
    if config.smoke:
        console.print(SMOKE_NOTE)
    _print_summary(console, result, clips)
    console.print(f"report: {out / 'report.html'}", soft_wrap=True, markup=False)
    return result


def _eval_clips(out: Path, vae_run: VAERunConfig) -> tuple[np.ndarray, list[SceneSpec]]:
    """The held-out clips as H.264 gave them back, (n, t, h, w, 3) uint8, and what they show."""
    shards = ShardSet.open(out / "shards/eval")
    data = DataConfig(shards=str(out / "shards/eval"), buckets=vae_run.data.buckets[:1])
    frames, specs = [], []
    for batch in clips_in_order(data, shards, 32, multiple=8):
        pixels = batch.pixels().numpy()
        for row, index in enumerate(batch.ids):
            if batch.weight[row] > 0:
                frames.append(pixels[row])
                specs.append(SceneSpec.from_dict(shards.read_json(index)["extra"]["spec"]))
    return np.stack(frames), specs


def _cards(clips: dict[str, tuple[list[Path], PromptFollowing]]) -> list[ClipCard]:
    cards = []
    for split, (paths, measured) in clips.items():
        for path, judgement in list(zip(paths, measured.judgements))[: 24 if split == "train" else 12]:
            prompt = json.loads(path.with_suffix(".json").read_text())["prompt"]
            cards.append(
                ClipCard(prompt, path.read_bytes(), judgement["read"], judgement["asked"], split == "held_out")
            )
    return cards


def _print_summary(
    console: Console, result: dict[str, Any], clips: dict[str, tuple[list[Path], PromptFollowing]]
) -> None:
    for split, (paths, measured) in clips.items():
        title = "prompts" if split == "train" else "prompts of combinations held out of training"
        console.print(f"[bold]{title}[/bold]")
        for path, judgement in list(zip(paths, measured.judgements))[:4]:
            prompt = json.loads(path.with_suffix(".json").read_text())["prompt"]
            read = judgement["read"]
            console.print(f"  {prompt}  →  read as {read['color']} {read['shape']}, {read['motion']}", soft_wrap=True)
    for name in ("accuracy", "held_out_accuracy"):
        figures = result[name]
        text = ", ".join(f"{key} {figures[key]:.2f}" for key in ("color", "shape", "motion", "all"))
        console.print(f"{name.replace('_', ' ')}: {text} (n = {figures['n']})")
    console.print(
        f"VAE on held-out clips: {result['vae_psnr_db']:.1f} dB, "
        f"in the objects' boxes {result['vae_psnr_boxes_db']:.1f} dB"
    )
    console.print(f"total: {result['seconds']['total']:.0f} s on {result['device']}")
