"""What a DiT training run is made of, and what of it the latents and the model that it starts from decide."""

import dataclasses
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from videodit.data.buckets import FRAMES_PER_LATENT, Bucket, nearest_size, parse_bucket
from videodit.data.files_fingerprint import VAE_FILES, files_fingerprint
from videodit.data.ingest_record import read_record
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import read_manifest, read_manifests
from videodit.data.mixture import local_folders, open_shards
from videodit.errors import UserError
from videodit.flow.loss import Weighting
from videodit.flow.noise_level import NoiseLevelConfig
from videodit.flow.path import Parameterization
from videodit.generation.pipeline import SamplingDefaults, read_parameterization
from videodit.kernels.choice import KERNELS
from videodit.models.checkpointing import POLICIES
from videodit.models.dit import DiTConfig
from videodit.models.folder import WEIGHTS_NAME, load_config
from videodit.models.lora import LoRAConfig
from videodit.models.text import ByteTextConfig
from videodit.models.vae_folder import VideoAutoencoderConfig, load_vae
from videodit.training.run_config import RunConfig
from videodit.training.stages import stages_of


@dataclass(frozen=True)
class RunSampling(SamplingDefaults):
    """How a run draws its samples."""

    fps: float = 0.0
    """frames per second of the files that are written, and of the clips that a model with micro_conditioning makes; 0
    for those of the latents"""


@dataclass(frozen=True)
class DiTRunConfig(RunConfig):
    """A DiT training run."""

    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    """latents to train on"""
    vae: str | None = None
    """VAE folder that decodes samples and goes into the export; by default the one that made the latents"""
    model: DiTConfig = field(default_factory=DiTConfig)
    """shape of the DiT; in_channels and text_dim follow the latents and the text encoder"""
    init: str | None = None
    """model folder that training starts from, as export or import writes it; model.*, text.* and flow.* follow it"""
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    """train low-rank updates of init's layers instead of all weights; the export has them in the weights"""
    text: ByteTextConfig = field(default_factory=ByteTextConfig)
    """byte-level text encoder, trained with the DiT; not used where the latents have text embeddings"""
    text_encoder: str | None = None
    """folder of the frozen text encoder that reads prompts; by default the one that made the latents' embeddings"""
    text_max_length: int = 0
    """tokens that the frozen text encoder reads of a prompt; follows the latents"""
    flow: Parameterization = field(default_factory=Parameterization)
    """what the DiT predicts"""
    noise: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """at which noise levels it is trained"""
    late_noise: NoiseLevelConfig = field(default_factory=NoiseLevelConfig)
    """at which levels it is trained in the last late_share of the steps, where it learns to draw"""
    late_share: float = 0.0
    """share of max_steps, the last ones, that draws its levels from late_noise"""
    sample_posterior: bool = True
    """train on samples of the VAE's posterior; false: on its mean, for which less noise is drawn"""
    crop: LatentCropConfig = field(default_factory=LatentCropConfig)
    """windows of the latents that the first steps train on, for a part of the work"""
    weighting: Weighting = "uniform"
    """weight of a noise level in the loss: uniform, velocity (for x0 prediction), min_snr (for noise prediction), or
    learned: one over the error that is expected there"""
    condition_rate: float = 0.0
    """share of clips whose first latent frames are given clean (image-to-video, extension); of images none is"""
    checkpointing: str = "none"
    """activations that training keeps: none of them is computed again, attention keeps products and attention, full
    keeps the blocks' inputs, auto takes the first of these that fits the device's memory"""
    sequence_parallel: int = 1
    """ranks that share each clip's tokens; the others share the clips"""
    compile: bool = False
    """torch.compile each block"""
    kernels: str = "torch"
    """on a GPU: torch, or triton for fused kernels of norms, RoPE and temporal attention (benchmarks/kernels.py)"""
    sampling: RunSampling = field(default_factory=RunSampling)
    """how samples are drawn, in training and from the export; sizes follow the latents"""
    prompts: tuple[str, ...] = ()
    """prompts of the samples drawn in training, with averaged weights"""
    sample_raw: bool = False
    """draw the samples with the weights as they are too, beside those with averaged ones"""
    eval_shards: str | None = None
    """latents of held-out clips; their loss is measured by noise level, with the weights as they are and averaged"""
    eval_every: int = 500
    """steps between measurements of the held-out loss"""
    eval_clips: int = 128
    """how many of the held-out clips"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.shards and not self.stages:
            raise ValueError("data.shards is not set: give --data.shards FOLDER, as videodit encode writes it")
        for name in ("eval_every", "eval_clips"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1: use a positive number")
        if not 0 <= self.condition_rate <= 1:
            raise ValueError(f"condition_rate {self.condition_rate} is no share: use a number from 0 to 1")
        if not 0 <= self.late_share <= 1:
            raise ValueError(f"late_share {self.late_share} is no share: use a number from 0 to 1")
        for name, share, own in (("late_share", self.late_share, "noise"), ("crop.share", self.crop.share, "crop")):
            if share and self.stages:
                raise ValueError(
                    f"{name} {share} does not go with stages: leave it out, and give a stage its own {own}"
                )
        if self.lora.rank and not self.init:
            raise ValueError(
                f"lora.rank {self.lora.rank} needs a model to fine-tune: give --init MODEL, or lora.rank 0"
            )
        if self.sequence_parallel < 1:
            raise ValueError(f"sequence_parallel {self.sequence_parallel} is below 1: use 1 for none")
        if self.checkpointing not in (*POLICIES, "auto"):
            raise ValueError(f"checkpointing {self.checkpointing!r} is not one of {', '.join(POLICIES)}, auto")
        if self.kernels not in KERNELS:
            raise ValueError(f"kernels {self.kernels!r} is not one of {', '.join(KERNELS)}")
        if self.compile and self.checkpointing == "attention":
            raise ValueError("checkpointing attention does not go with compile: use full or none, or compile false")
        patch = self.model.patch_size[1:]
        if any(size % edge for size, edge in zip(self.crop.size, patch)):
            raise ValueError(
                f"crop.size {list(self.crop.size)} is not divided by the {patch[0]}x{patch[1]} of model.patch_size: "
                f"use for example {[edge * max(1, size // edge) for size, edge in zip(self.crop.size, patch)]}"
            )
        if self.stages:
            stages_of(self)

    @property
    def stage_settings(self) -> tuple[str, ...]:
        """As RunConfig has it, and what only a DiT has."""
        return (*super().stage_settings, "noise", "crop", "condition_rate", "checkpointing")

    @property
    def evaluation_intervals(self) -> tuple[int, ...]:
        """As RunConfig has it, with that of the held-out loss."""
        return (self.sample_every, self.eval_every if self.eval_shards else 0)

    @property
    def crop_steps(self) -> int:
        """How many of the steps, the first ones, train on windows."""
        return round(self.crop.share * self.max_steps)

    @property
    def late_steps(self) -> int:
        """How many of the steps, the last ones, draw from late_noise."""
        return round(self.late_share * self.max_steps)

    def noise_at(self, step: int) -> NoiseLevelConfig:
        """Density of the noise levels in a step, 1 … max_steps."""
        return self.late_noise if step > self.max_steps - self.late_steps else self.noise


def latent_names(config: DiTRunConfig) -> list[str]:
    """The sets of latents that a run reads, in any stage."""
    return list(dict.fromkeys(name for stage in stages_of(config) for name in stage.config.data.folders))


def latent_folders(config: DiTRunConfig) -> dict[str, Path]:
    """Each of `latent_names` -> its folder, see `local_folders`."""
    return {name: root for stage in stages_of(config) for name, root in local_folders(stage.config.data).items()}


def follow_latents(config: DiTRunConfig) -> DiTRunConfig:
    """The config with what the latents decide filled in: channels, VAE, frozen text encoder, size of the samples.

    The samples' size is that of the last stage.

    Raises:
        UserError: if a prompt is a file's name, a folder is no finished set of latents, the patch does not divide them,
            those of the stages were made by different VAEs or text encoders, or a text encoder is given that made no
            embeddings.
    """
    if file := next(filter(os.path.isfile, config.prompts), None):
        raise UserError(f"prompts has {file}, which is a file: give what is in it, --prompts [PROMPT,PROMPT]")
    roots = latent_folders(config)
    names = ", ".join(roots)
    manifest = read_manifests(roots)
    if manifest is None:
        name = next(name for name, root in roots.items() if read_manifest(root) is None)
        raise no_latents("data.shards", name, roots[name])
    frozen = manifest.get("text_encoder") or {}
    if config.text_encoder and not frozen:
        raise UserError(
            f"text_encoder {config.text_encoder} is given, but data.shards {names} has no embeddings: "
            f"run videodit encode with --text_encoder {config.text_encoder}, or leave it out"
        )
    config = _follow_init(config, frozen, names)
    if not config.vae and not (Path(manifest["vae"]) / "config.json").is_file():
        raise UserError(
            f"data.shards {names} was made by the VAE {manifest['vae']}, which is not there, seen from {Path.cwd()}: "
            "say where it is, --vae FOLDER"
        )
    vae = load_vae(config.vae or manifest["vae"])
    if config.init and vae.config.latent_channels != config.model.in_channels:
        raise UserError(
            f"init {config.init} is for {config.model.in_channels} latent channels, but {names} has "
            f"{vae.config.latent_channels}: encode the clips with the VAE of that model, --vae {config.init}/vae"
        )
    check_patch(config.model.patch_size, manifest, config.vae or manifest["vae"], names)
    last = read_manifests(local_folders(stages_of(config)[-1].config.data))
    assert last is not None  # it is among those above
    frames, height, width = parse_bucket(last["fingerprint"]["buckets"][0], multiple=1)
    text_dim = frozen.get("dim", config.text.dim)
    return dataclasses.replace(
        config,
        vae=config.vae or manifest["vae"],
        model=dataclasses.replace(config.model, in_channels=vae.config.latent_channels, text_dim=text_dim),
        text_encoder=(config.text_encoder or frozen["source"]) if frozen else None,
        text_max_length=frozen.get("max_length", 0),
        sampling=dataclasses.replace(
            config.sampling, num_frames=frames, height=height, width=width, fps=config.sampling.fps or _rate(config)
        ),
    )


def latent_encoders(config: DiTRunConfig) -> dict[str, Any]:
    """Hashes of the VAE and the text encoder that made a run's latents, as its folder keeps them."""
    manifest = read_manifests(latent_folders(config))
    assert manifest is not None  # `follow_latents` has looked at it
    made = manifest["fingerprint"]
    return {"VAE of data.shards": made.get("vae"), "text encoder of data.shards": made.get("text_encoder")}


def warn_of_another_vae(config: DiTRunConfig, encoders: Mapping[str, Any]) -> None:
    """Warns if `vae`, which decodes the samples and is exported, is not what made the latents.

    It may be meant: a VAE whose decoder alone was trained further decodes the same latents.

    Args:
        config: of the run, from `follow_latents`.
        encoders: its `latent_encoders`.
    """
    assert config.vae is not None
    if files_fingerprint(config.vae, VAE_FILES) != encoders["VAE of data.shards"]:
        warnings.warn(
            f"vae {config.vae} is not, or no longer, the one that encoded data.shards: samples and the export will be "
            "decoded by it; if more than its decoder was trained since, run videodit encode again",
            stacklevel=2,
        )


def _rate(config: DiTRunConfig) -> float:
    """Frames a second of the last stage's latents."""
    return open_shards(stages_of(config)[-1].config.data).columns.usual_fps() or SamplingDefaults.fps


def no_latents(setting: str, name: str, root: Path) -> UserError:
    """What to say of a folder, given as this setting, that is no finished set of latents; root is where it lies."""
    if read_record(root) is None:
        return UserError(f"{setting} {name} has no finished latents: run videodit encode --out {name}")
    return UserError(
        f"{setting} {name} holds clips, no latents: run videodit encode --data.shards {name} --vae VAE --out LATENTS, "
        f"and give {setting} LATENTS"
    )


def check_patch(patch_size: tuple[int, int, int], manifest: dict[str, Any], vae: str, folder: str) -> None:
    """Refuses latents that the DiT's patch does not divide.

    Args:
        patch_size: frames, rows and columns of a patch.
        manifest: of the latents.
        vae: folder of the VAE that made them.
        folder: where they lie, for messages.
    Raises:
        UserError: names the bucket.
    """
    config = load_vae(vae).config
    for text in manifest["fingerprint"]["buckets"]:
        bucket = parse_bucket(text, multiple=1)
        shape = config.latent_shape(*bucket)
        for name, size, patch in zip(("frames", "height", "width"), shape[1:], patch_size):
            if size % patch:
                raise UserError(
                    f"model.patch_size {list(patch_size)} does not divide latents of {shape[1:]} ({name}) "
                    f"in {folder}, bucket {bucket.name}: change the patch, or encode clips of another size; "
                    f"the nearest bucket that fits is {_nearest_bucket(bucket, config, patch_size).name}"
                )


def _nearest_bucket(bucket: Bucket, vae: VideoAutoencoderConfig, patch_size: tuple[int, int, int]) -> Bucket:
    """Of the buckets whose latents the patch divides, the nearest."""
    frames, height, width = bucket
    lengths = range(1, frames + FRAMES_PER_LATENT * patch_size[0] + 1, FRAMES_PER_LATENT)
    fitting = [length for length in lengths if vae.latent_shape(length, height, width)[1] % patch_size[0] == 0]
    return Bucket(
        min(fitting, key=lambda length: abs(length - frames)),
        nearest_size(height, vae.spatial_compression * patch_size[1]),
        nearest_size(width, vae.spatial_compression * patch_size[2]),
    )


def _follow_init(config: DiTRunConfig, frozen: dict[str, Any], names: str) -> DiTRunConfig:
    """The config with the shapes of the model that training starts from.

    Args:
        config: of the run.
        frozen: what the latents say of the frozen text encoder; empty if they have no embeddings.
        names: of the latents, for messages.
    """
    if not config.init:
        return config
    init = Path(config.init)
    model: DiTConfig = load_config(DiTConfig, init / "dit")
    text = config.text
    if frozen and frozen["dim"] != model.text_dim:
        raise UserError(
            f"init {config.init} reads text of {model.text_dim} channels, but the embeddings in {names} "
            f"have {frozen['dim']}: encode the clips with the text encoder of that model"
        )
    if not frozen:
        if not (init / "text_encoder" / WEIGHTS_NAME).is_file():
            raise UserError(
                f"init {config.init} has a frozen text encoder, but {names} has no embeddings: "
                "encode the clips with it, --text_encoder FOLDER"
            )
        text = load_config(ByteTextConfig, init / "text_encoder")
    return dataclasses.replace(config, model=model, text=text, flow=read_parameterization(init))
