"""TextToVideo: a model folder as one object that turns prompts into clips."""

import dataclasses
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.transforms import to_pixels
from videodit.errors import UserError, user_error
from videodit.flow.guidance import guided_velocity
from videodit.flow.noise_level import sampling_levels
from videodit.flow.path import Parameterization, coefficients, to_velocity
from videodit.flow.samplers import SAMPLERS
from videodit.models.dit import DiTConfig, TextContext, VideoDiT
from videodit.models.micro_conditioning import MICRO_CONDITIONS
from videodit.models.text import TextEncoder
from videodit.models.text_folder import load_text_encoder
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.vae_folder import VideoAutoencoder, VideoAutoencoderConfig, load_vae

INDEX_NAME = "model_index.json"


@dataclass(frozen=True)
class SamplingDefaults:
    """What a model was made for; used where a caller says nothing."""

    num_frames: int = 17
    """frames of a clip, 4k+1"""
    height: int = 64
    """pixels"""
    width: int = 64
    """pixels"""
    fps: float = 8.0
    """frames per second of the files that are written, and of the clips that a model with micro_conditioning makes"""
    original_height: int | None = None
    """micro-condition: as if made from an original of so many pixels; height by default"""
    original_width: int | None = None
    """micro-condition: as if made from an original of so many pixels; width by default"""
    crop_top: int = 0
    """micro-condition: as if so many pixels had been cut off above"""
    crop_left: int = 0
    """micro-condition: as if so many pixels had been cut off on the left"""
    num_steps: int = 20
    """sampler steps"""
    guidance_scale: float = 3.0
    """classifier-free guidance; 1 is none"""
    sampler: str = "euler"
    """euler, heun or renoise"""
    shift: float = 3.0
    """shift of the sampling noise levels towards noise"""

    def __post_init__(self) -> None:
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampling.sampler {self.sampler!r} is not one of {', '.join(SAMPLERS)}")
        if self.num_steps < 1:
            raise ValueError(f"sampling.num_steps {self.num_steps} is below 1: use for example 20")
        if not self.fps >= 0:
            raise ValueError(f"sampling.fps {self.fps} is negative: use for example 8")
        if not self.shift > 0:
            raise ValueError(f"sampling.shift {self.shift} is not positive: 1 is no shift, 3 moves towards noise")
        for name, least in {"original_height": 1, "original_width": 1, "crop_top": 0, "crop_left": 0}.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"sampling.{name} {value} is below {least}: give pixels")

    def micro_conditions(self) -> dict[str, float]:
        """`MICRO_CONDITIONS` by name, in their order."""
        values = {name: getattr(self, name) for name in MICRO_CONDITIONS}
        size = {"original_height": self.height, "original_width": self.width}
        return {name: size[name] if value is None else value for name, value in values.items()}


def _read_index(folder: Path) -> tuple[Parameterization, SamplingDefaults]:
    """What model_index.json says; raises UserError if there is none or it is damaged."""
    path = folder / INDEX_NAME
    if not folder.is_dir():
        raise UserError(f"no such model folder: {folder}; make one with videodit export RUN --out {folder}")
    if not path.is_file():
        fix = "make one with videodit export"
        if (folder / "config.yaml").is_file():
            fix = f"make one of this run with videodit export {folder} --out MODEL"
        elif (folder.parent / INDEX_NAME).is_file():
            fix = f"give {folder.parent}"
        raise UserError(f"{folder} is not a model folder: it has no {INDEX_NAME}; {fix}")
    try:
        index = json.loads(path.read_text())
        return Parameterization(**index["parameterization"]), SamplingDefaults(**index["sampling"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): export the run again") from None


def read_parameterization(folder: str | Path) -> Parameterization:
    """What the DiT of a model folder predicts; raises UserError if that is no model folder."""
    return _read_index(Path(folder))[0]


class RowNoise:
    """Standard normal noise, one seed a row, from CPU generators in (t, c, h, w) order: the same on every device.

    Each call draws on: a row's noise depends on its seed and the number of calls before, not on the other rows.

    Args:
        seeds: b seeds.
        shape: (c, t, h, w) of the latents.
        device: where the noise is wanted.
    """

    def __init__(
        self, seeds: Sequence[int], shape: tuple[int, int, int, int], device: str | torch.device = "cpu"
    ) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape = shape
        self.device = device

    def __call__(self) -> Tensor:
        """(b, c, t, h, w) float32."""
        c, t, h, w = self.shape
        rows = [torch.randn(t, c, h, w, generator=generator) for generator in self.generators]
        return rearrange(torch.stack(rows), "b t c h w -> b c t h w").to(self.device)


def velocity_function(
    model: Callable[[Tensor, Tensor, TextContext], Tensor], parameterization: Parameterization, text: TextContext
) -> Callable[[Tensor, Tensor], Tensor]:
    """The rectified velocity at (x, sigma) of a model of any parameterization.

    Samplers walk the rectified path; the model is asked at the same noise level on its own path.
    """

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        level = sigma.view(-1, 1, 1, 1, 1)
        alpha, beta = coefficients(parameterization.path, level)
        own = (alpha + beta) * x  # on the rectified path alpha + beta is 1
        return to_velocity(parameterization, model(own, sigma, text).to(x.dtype), own, level)

    return velocity


class TextToVideo:
    """A text-to-video model: prompts in, clips out.

    Args:
        model: the DiT and, if it was trained with it, its text encoder.
        vae: decodes the latents.
        text_encoder: reads the prompts (the model's own, or a frozen one).
        parameterization: what the DiT predicts.
        defaults: used where a call says nothing.
    """

    def __init__(
        self,
        model: TextToVideoModel,
        vae: VideoAutoencoder,
        text_encoder: TextEncoder,
        parameterization: Parameterization,
        defaults: SamplingDefaults,
    ) -> None:
        self.model = model
        self.vae = vae
        self.text_encoder = text_encoder
        self.parameterization = parameterization
        self.defaults = defaults
        self.statistics = ChannelStatistics.of_vae(vae.config)  # None for videos

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "TextToVideo":
        """Loads a model folder as `videodit export` writes it.

        Args:
            folder: with model_index.json, dit/, vae/ and text_encoder/.
            device: where to compute.
            dtype: of the DiT and the text encoder; the VAE stays in float32.
        Raises:
            UserError: if the folder is not a whole model.
        """
        folder = Path(folder)
        parameterization, defaults = _read_index(folder)
        text_encoder = load_text_encoder(folder / "text_encoder", device, dtype)
        dit = VideoDiT.from_pretrained(folder / "dit").to(device, dtype)
        vae = load_vae(folder / "vae").to(device)
        joint = text_encoder if isinstance(text_encoder, torch.nn.Module) else None
        return cls(TextToVideoModel(dit, joint).eval(), vae, text_encoder, parameterization, defaults)  # type: ignore[arg-type]

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the model folder; model_index.json last, so that a folder with it is whole."""
        folder = Path(folder)
        try:
            (folder / INDEX_NAME).unlink(missing_ok=True)
        except OSError as error:
            raise user_error(error, folder) from None
        self.model.dit.save_pretrained(folder / "dit")
        self.vae.save_pretrained(folder / "vae")
        self.text_encoder.save_pretrained(folder / "text_encoder")
        index = {
            "format": "videodit",
            "parameterization": dataclasses.asdict(self.parameterization),
            "sampling": dataclasses.asdict(self.defaults),
        }
        try:
            (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")
        except OSError as error:
            raise user_error(error, folder / INDEX_NAME) from None

    @torch.no_grad()
    def sample_latents(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        conditions: Mapping[str, float] | None = None,
    ) -> Tensor:
        """As `__call__`, but gives the normalised latents (b, c, k+1, h/8, w/8)."""
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"prompts is {prompts!r}: give a list of one or more prompts")
        overrides = {
            "num_frames": num_frames,
            "height": height,
            "width": width,
            "num_steps": num_steps,
            "guidance_scale": guidance_scale,
            "sampler": sampler,
        }
        given = {name: value for name, value in overrides.items() if value is not None}
        if conditions and not self.model.dit.config.micro_conditioning:
            raise ValueError(f"{next(iter(conditions))} is given to a model without micro_conditioning: leave it out")
        if odd := set(conditions or {}) - set(MICRO_CONDITIONS):
            raise ValueError(f"conditions {sorted(odd)[0]!r} is not one of {', '.join(MICRO_CONDITIONS)}")
        options = dataclasses.replace(self.defaults, **given, **(conditions or {}))  # type: ignore[arg-type]
        shape = latent_shape(self.vae.config, self.model.dit.config, options.num_frames, options.height, options.width)
        device, dtype = self.model.dit.patch_out.weight.device, self.model.dit.patch_out.weight.dtype
        guided = options.guidance_scale != 1.0
        features = self.text_encoder.encode(list(prompts) + ([""] * len(prompts) if guided else []))
        context = self.model.text_context(features)
        micro = torch.tensor([list(options.micro_conditions().values())], dtype=torch.float32, device=device)

        # Only the model computes in its own dtype: the state, and what of it a prediction builds on, stay in float32.
        def model(x: Tensor, sigma: Tensor, text: TextContext) -> Tensor:
            return self.model(x.to(dtype), sigma, text, micro_conditions=micro.expand(len(x), -1))  # type: ignore[no-any-return]

        velocity = velocity_function(model, self.parameterization, context)
        if guided:
            velocity = guided_velocity(velocity, options.guidance_scale)
        noise = RowNoise([seed + row for row in range(len(prompts))], shape, device)
        sigmas = sampling_levels(options.num_steps, options.shift).to(device)
        return SAMPLERS[options.sampler](velocity, noise(), sigmas, noise)

    @torch.no_grad()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        seed: int = 0,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        conditions: Mapping[str, float] | None = None,
    ) -> np.ndarray:
        """Generates one clip per prompt; row i depends on seed + i alone, not on the batch.

        Args:
            prompts: b prompts.
            seed: of the first row.
            num_frames: 4k+1 frames; likewise height and width in pixels; the model's own if None.
            num_steps: sampler steps.
            guidance_scale: classifier-free guidance, 1 is none.
            sampler: euler, heun or renoise.
            conditions: of `MICRO_CONDITIONS`, those that are not to be the model's own; with and without the prompt.
        Returns:
            (b, t, h, w, 3) uint8; of a model of fields (b, t, h, w, c) float32 in the fields' units.
        Raises:
            ValueError: if a size does not fit; names the nearest that does. If the model has no micro_conditioning.
        """
        latents = self.sample_latents(
            prompts,
            seed=seed,
            num_frames=num_frames,
            height=height,
            width=width,
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            conditions=conditions,
        )
        clips = self.vae.decode_stream(latents.float())
        for prompt, good in zip(prompts, clips.isfinite().flatten(1).all(1).tolist()):
            if not good:
                warnings.warn(
                    f"the clip of {prompt[:60]!r} has values that are not finite, and shows nothing: lower "
                    "guidance_scale, use dtype fp32, or look at the run that trained the model",
                    stacklevel=2,
                )
        return (self.statistics.restore(clips) if self.statistics else to_pixels(clips)).cpu().numpy()


def latent_shape(
    vae: VideoAutoencoderConfig, dit: DiTConfig, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
    """(c, t, h, w) of a clip's latents, if VAE and patch both fit.

    Raises:
        ValueError: names the value and the nearest that fits.
    """
    pt, ph, pw = dit.patch_size
    time = vae.temporal_compression
    nearest = (max(round(((num_frames - 1) / time + 1) / pt), 1) * pt - 1) * time + 1
    if num_frames != nearest:
        form = f"{time}k+1" + (f" with k+1 a multiple of {pt}" if pt > 1 else "")
        raise ValueError(f"num_frames {num_frames} is not {form}: the nearest is {nearest}")
    for name, value, patch in (("height", height, ph), ("width", width, pw)):
        unit = vae.spatial_compression * patch
        nearest = max(round(value / unit), 1) * unit
        if value != nearest:
            raise ValueError(f"{name} {value} is not a multiple of {unit} (VAE x patch): the nearest is {nearest}")
    return vae.latent_shape(num_frames, height, width)
