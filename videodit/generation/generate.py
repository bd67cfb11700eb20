"""`videodit generate`: prompts to .mp4 files (fields: .npy and an .mp4 to look at), each beside a .json that
reproduces it.
"""

import dataclasses
import itertools
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videodit.data.field import preview, write_npy
from videodit.data.mp4 import write_mp4
from videodit.device import choose_device, choose_dtype, torch_dtype
from videodit.errors import UserError, user_error
from videodit.generation.pipeline import TextToVideo
from videodit.kernels.choice import choose_kernels
from videodit.models.folder import settings_sha256, weights_sha256
from videodit.models.micro_conditioning import MICRO_CONDITIONS

OPTIONS = ("num_frames", "height", "width", "num_steps", "guidance_scale", "sampler")  # the model's own where None


@dataclass(frozen=True)
class GenerateConfig:
    """What to generate, and from which model."""

    model: str = ""
    """model folder, as `videodit export` writes it"""
    prompt: list[str] = field(default_factory=list)
    """what the clip should show; repeat for several clips"""
    prompts: str | None = None
    """text file with one prompt a line, besides or instead of --prompt"""
    out: str = "samples"
    """folder for the clips; another clip that has a clip's name there stays, and the new one's name ends in -2"""
    seed: int = 0
    """of the first clip; clip i uses seed + i"""
    num_steps: int | None = None
    """sampler steps; the model's own by default"""
    guidance_scale: float | None = None
    """classifier-free guidance, 1 is none; the model's own by default"""
    sampler: str | None = None
    """euler, heun or renoise; the model's own by default"""
    num_frames: int | None = None
    """frames, 4k+1; the model's own by default"""
    height: int | None = None
    """pixels; the model's own by default"""
    width: int | None = None
    """pixels; the model's own by default"""
    fps: float | None = None
    """frames per second of the file, and of the clip if the model has micro_conditioning; the model's own by default"""
    original_height: int | None = None
    """with micro_conditioning: pixels of the original that the clip is as if made from; the model's own by default"""
    original_width: int | None = None
    """likewise"""
    crop_top: int | None = None
    """with micro_conditioning: pixels that are as if cut off above; the model's own by default, mostly 0"""
    crop_left: int | None = None
    """likewise, on the left"""
    batch_size: int = 1
    """clips computed at once; more is faster, and then a clip made again alone may differ in the last bit of a pixel"""
    keep_existing: bool = False
    """leave clips alone whose .json says that they were made just so, from these weights, and replace others"""
    device: str = "auto"
    """auto, cpu or cuda"""
    dtype: str = "auto"
    """auto (bf16 where the hardware has it, else fp32), fp32 or bf16"""
    kernels: str = "torch"
    """on a GPU: torch, or triton for fused kernels of norms, RoPE and temporal attention"""

    def __post_init__(self) -> None:
        if not self.model:
            raise ValueError("--model is missing: give a model folder, as videodit export writes it")
        if self.batch_size < 1:
            raise ValueError(f"--batch_size {self.batch_size} is below 1: use for example 8")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"--seed {self.seed} has more than 64 bits: use for example 0")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"--fps {self.fps} is not positive: use for example 8")


def generate(config: GenerateConfig, progress: Callable[[int, int], None] | None = None) -> list[Path]:
    """Generates one clip per prompt.

    Args:
        config: what to do.
        progress: called with (clips done, clips in all).
    Returns:
        The .mp4 files, or a model of fields' .npy files, one a prompt; each has a .json of the same name.
    Raises:
        UserError: for a model, prompt, size or folder that cannot be used.
    """
    prompts = _prompts(config)
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    choose_kernels(config.kernels, device)
    pipe = TextToVideo.from_pretrained(config.model, device, torch_dtype(dtype))
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise user_error(error, out) from None
    options = {name: getattr(config, name) for name in OPTIONS}
    used = {name: getattr(pipe.defaults, name) if value is None else value for name, value in options.items()}
    conditions = {name: getattr(config, name) for name in MICRO_CONDITIONS if getattr(config, name) is not None}
    if pipe.model.dit.config.micro_conditioning:
        try:
            used |= dataclasses.replace(pipe.defaults, **{**used, **conditions}).micro_conditions()
        except ValueError as error:
            raise UserError(str(error)) from None
    else:
        conditions.pop("fps", None)  # then it is of the file alone
    fps = config.fps if config.fps is not None else pipe.defaults.fps
    made_by: dict[str, Any] = {"model": config.model, "weights_sha256": weights_sha256(Path(config.model))}
    made_by["settings_sha256"] = settings_sha256(Path(config.model))
    made_by |= {"batch_size": config.batch_size, "dtype": dtype, "device": str(device), "torch": torch.__version__}
    suffix = "npy" if pipe.statistics else "mp4"
    paths = [out / f"{index:05d}-{_slug(prompt)}.{suffix}" for index, prompt in enumerate(prompts)]
    records = [
        {"prompt": prompt, "seed": config.seed + index, "fps": fps, **used, **made_by}
        for index, prompt in enumerate(prompts)
    ]
    if not config.keep_existing:
        paths = [_unused(path, record) for path, record in zip(paths, records)]
    for start in range(0, len(prompts), config.batch_size):
        rows = range(start, min(start + config.batch_size, len(prompts)))
        if not (config.keep_existing and all(_is_made(paths[row], records[row]) for row in rows)):
            try:
                clips = pipe([prompts[row] for row in rows], seed=config.seed + start, **options, conditions=conditions)
            except ValueError as error:
                raise UserError(str(error)) from None
            for row, clip in zip(rows, clips):
                try:
                    _write_clip(paths[row], clip, fps)
                    paths[row].with_suffix(".json").write_text(json.dumps(records[row], indent=2) + "\n")
                except OSError as error:
                    raise user_error(error, paths[row]) from None
        if progress is not None:
            progress(rows.stop, len(prompts))
    return paths


def _write_clip(path: Path, clip: np.ndarray, fps: float) -> None:
    """A video, or a field and beside it a video of it."""
    if path.suffix == ".npy":
        write_npy(path, clip)
    write_mp4(path.with_suffix(".mp4"), preview(clip), fps)


def _unused(path: Path, record: dict[str, Any]) -> Path:
    """The first of NAME, NAME-2, NAME-3, … under which there is no other clip; the same one may be made again."""
    names = (path.with_stem(f"{path.stem}-{number}") if number > 1 else path for number in itertools.count(1))
    files = {".json", ".mp4", path.suffix}
    return next(n for n in names if _is_made(n, record) or not any(n.with_suffix(suffix).exists() for suffix in files))


def _is_made(path: Path, record: dict[str, Any]) -> bool:
    """Whether the clip is there, and its .json, which is written after it, says the same.

    Where the model lay does not count: the hashes say which one it was.
    """
    try:
        found = json.loads(path.with_suffix(".json").read_text())
        return path.is_file() and found | {"model": record["model"]} == record
    except (OSError, ValueError, TypeError):
        return False


def _prompts(config: GenerateConfig) -> list[str]:
    prompts = list(config.prompt)
    if file := next(filter(os.path.isfile, prompts), None):
        raise UserError(f"--prompt {file} is a file: give --prompts {file} for the prompts in it")
    if config.prompts is not None:
        try:
            lines = Path(config.prompts).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError:
            raise UserError(
                f"--prompts {config.prompts} is no UTF-8 text: save it as UTF-8, one prompt a line"
            ) from None
        except OSError as error:
            raise UserError(f"cannot read --prompts {config.prompts}: {error.strerror or error}") from None
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError("no prompt: give --prompt TEXT (as often as you like) or --prompts FILE with one a line")
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("a prompt is empty: say what the clip should show, for example 'a small red circle moves left'")
    return prompts


def _slug(prompt: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:60] or "clip"
