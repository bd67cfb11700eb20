"""`videodit train dit`: the text-to-video DiT on latents, with its own text encoder or a frozen one's embeddings."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from videodit.config import to_yaml
from videodit.data.buckets import parse_bucket
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import read_manifest
from videodit.data.loader import LatentBatch, LatentLoader
from videodit.data.randomness import sample_noise, sample_uniform
from videodit.data.video_io import write_mp4
from videodit.device import torch_dtype
from videodit.errors import UserError
from videodit.flow.loss import Weighting, flow_loss, level_weight, likelihood_loss
from videodit.flow.noise_level import NoiseLevelConfig, frame_levels, frames_to_denoise, sigma_from_uniform
from videodit.flow.path import Parameterization, interpolate, target
from videodit.generation.pipeline import SamplingDefaults, TextToVideo
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.level_error import LevelError
from videodit.models.text import ByteTextConfig, ByteTextEncoder, TextEncoder, TextFeatures
from videodit.models.text_prompts import EncodedPrompts
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.text_transformers import TransformersTextEncoder
from videodit.models.vae import VideoVAE
from videodit.parallel.mesh import World
from videodit.training.checkpoint import Checkpoint, load_average
from videodit.training.run import RunConfig, TrainingRun, micro_batch_tokens, open_world, run_dtype


@dataclass(frozen=True)
class DiTRunConfig(RunConfig):
    """A DiT training run."""

    data: LatentDataConfig = field(default_factory=LatentDataConfig)
    """latents to train on"""
    vae: str | None = None
    """VAE folder that decodes samples and goes into the export; by default the one that made the latents"""
    model: DiTConfig = field(default_factory=DiTConfig)
    """shape of the DiT; in_channels and text_dim follow the latents and the text encoder"""
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
    crop: LatentCropConfig = field(default_factory=LatentCropConfig)
    """windows of the latents that the first steps train on, for a part of the work"""
    weighting: Weighting = "uniform"
    """weight of a noise level in the loss: uniform, velocity (for x0 prediction), min_snr (for noise prediction), or
    learned: one over the error that is expected there"""
    condition_rate: float = 0.0
    """share of samples whose first latent frames are given clean (image-to-video, extension)"""
    compile: bool = False
    """torch.compile each block"""
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    """how samples are drawn, in training and from the export; sizes follow the latents"""
    prompts: tuple[str, ...] = ()
    """prompts of the samples drawn in training"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.shards:
            raise ValueError("data.shards is not set: give --data.shards FOLDER, as videodit encode writes it")
        if not 0 <= self.condition_rate <= 1:
            raise ValueError(f"condition_rate {self.condition_rate} is no share: use a number from 0 to 1")
        if not 0 <= self.late_share <= 1:
            raise ValueError(f"late_share {self.late_share} is no share: use a number from 0 to 1")
        patch = self.model.patch_size[1:]
        if any(size % edge for size, edge in zip(self.crop.size, patch)):
            raise ValueError(
                f"crop.size {list(self.crop.size)} is not divided by the {patch[0]}x{patch[1]} of model.patch_size: "
                f"use for example {[edge * max(1, size // edge) for size, edge in zip(self.crop.size, patch)]}"
            )

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


def build_model(config: DiTRunConfig) -> TextToVideoModel:
    """The module of a run with fresh weights; without text_encoder if that is frozen."""
    encoder = None if config.text_encoder else ByteTextEncoder(config.text)
    level_error = LevelError() if config.weighting == "learned" else None
    return TextToVideoModel(VideoDiT(config.model), encoder, level_error)


def train_dit(config: DiTRunConfig) -> Path:
    """Trains, or goes on training, a DiT.

    Args:
        config: of the run.
    Returns:
        The run folder.
    Raises:
        UserError: for latents, a VAE or a folder that cannot be used.
    """
    config = follow_latents(config)
    with open_world(config) as world, TrainingRun.open(config, to_yaml(config), world) as run:
        loader = LatentLoader(
            config.data,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            rank=world.rank,
            world=world.size,
            crop=config.crop,
            crop_steps=config.crop_steps,
            patch=config.model.patch_size[1:],
        )
        model = build_model(config)
        text_encoder = model.text_encoder or _read_prompts(config, world)
        if config.compile:
            for block in model.dit.blocks:
                block.compile()
        run.start(model)
        steps = loader.iterate(run.step + 1)
        while run.running:
            plan, batches = next(steps)
            total = run.total_weight(batches)
            levels = config.noise_at(run.step + 1)
            sums = {"loss": torch.zeros(()), "mse": torch.zeros(())}
            for batch in batches:
                noisy = make_noisy(batch, config, levels)
                loss, error = clip_losses(run, noisy, batch_text(batch, run), config.weighting)
                share = batch.weight.to(world.device) / total
                loss = (share * loss).sum()
                run.engine.backward(loss)
                sums["loss"] += loss.detach().cpu()
                sums["mse"] += (share * error).sum().cpu()
            tokens = micro_batch_tokens(batches, clip_tokens(config.model, noisy.latents.shape), world)
            run.finish_step(sums, digest=loader.digest(plan), tokens=tokens)
            if run.time_to_sample() and text_encoder and config.prompts:
                _draw_samples(run, config, text_encoder)
        run.save()
    return Path(config.run_dir)


def export_dit(config: DiTRunConfig, checkpoint: Checkpoint, out: Path, ema: int = 0) -> None:
    """Writes the model folder of a run: averaged weights of DiT and text encoder (or where it lies), and the VAE.

    Args:
        config: of the run, as its folder has it.
        checkpoint: of the run.
        out: folder to write.
        ema: which average.
    """
    model = build_model(config)
    load_average(model, checkpoint, ema)
    assert config.vae is not None  # a run's own config has it
    vae = VideoVAE.from_pretrained(config.vae)
    text_encoder = model.text_encoder or frozen_text_encoder(config)
    TextToVideo(model, vae, text_encoder, config.flow, config.sampling).save_pretrained(out)


def frozen_text_encoder(
    config: DiTRunConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TransformersTextEncoder:
    """The encoder that made the latents' embeddings, for prompts.

    Raises:
        UserError: if its folder is gone.
    """
    assert config.text_encoder is not None  # a run without one has its own in the model
    return TransformersTextEncoder(config.text_encoder, config.text_max_length, device, dtype)


def batch_text(batch: LatentBatch, run: TrainingRun) -> list[str] | TextFeatures:
    """What the module reads: captions, or their embeddings on the run's device where a frozen encoder made them."""
    if batch.text is None or batch.text_mask is None:
        return batch.captions
    return TextFeatures(run.cast(batch.text), batch.text_mask.to(run.world.device))


@dataclass
class NoisyBatch:
    """A micro batch on its way to the model.

    Attributes:
        latents: (b, c, t, h, w) what the model sees.
        sigma: (b, t) noise level of each latent frame.
        target: (b, c, t, h, w) what it should predict.
        weight: (b, t) weight of each latent frame in the loss.
        origin: (b, 2) where the clip lies in the latents that it is a window of, or None for whole ones.
    """

    latents: Tensor
    sigma: Tensor
    target: Tensor
    weight: Tensor
    origin: Tensor | None


def make_noisy(batch: LatentBatch, config: DiTRunConfig, levels: NoiseLevelConfig) -> NoisyBatch:
    """Draws latent, noise, level and condition of each row: functions of (seed, epoch, sample) and the step's.

    Args:
        batch: clean latents.
        config: of the run.
        levels: density of the noise levels in this step, see `DiTRunConfig.noise_at`.
    """
    seed, epoch, keys = config.seed, batch.epoch, batch.keys
    b, c, t, h, w = batch.mean.shape
    shape = (c, t, h, w)
    posterior_noise = sample_noise(seed, epoch, keys, shape, "posterior")
    x0 = batch.mean + torch.exp(0.5 * batch.logvar) * posterior_noise
    noise = sample_noise(seed, epoch, keys, shape, "noise")
    sigma = sigma_from_uniform(sample_uniform(seed, epoch, keys, "sigma"), levels)
    slope, focus = (sample_uniform(seed, epoch, keys, name) for name in ("frame slope", "focus frame"))
    sigma = frame_levels(sigma, t, slope, focus, levels)  # b t
    weight = level_weight(sigma, config.weighting) * frames_to_denoise(sigma, levels)
    if config.condition_rate > 0:
        given = sample_uniform(seed, epoch, keys, "condition") < config.condition_rate
        count = (sample_uniform(seed, epoch, keys, "condition frames") * (t - 1)).long() + 1  # 1 … t - 1
        clean = given[:, None] & (torch.arange(t)[None] < count[:, None])
        sigma, weight = sigma.masked_fill(clean, 0.0), weight.masked_fill(clean, 0.0)
    level = sigma[:, None, :, None, None]
    latents = interpolate(config.flow.path, x0, noise, level)
    return NoisyBatch(latents, sigma, target(config.flow, x0, noise, level), weight, batch.origin)


def clip_losses(
    run: TrainingRun, noisy: NoisyBatch, text: list[str] | TextFeatures, weighting: Weighting
) -> tuple[Tensor, Tensor]:
    """Runs the model: each clip's loss and, without gradient, its mean squared error; both (b,)."""
    device = run.world.device
    latents, sigma = run.cast(noisy.latents), noisy.sigma.to(device)
    target, weight = noisy.target.to(device), noisy.weight.to(device)
    if weighting == "learned":
        prediction, log_error = run.engine(latents, sigma, text, origin=noisy.origin, with_level_error=True)
        loss = likelihood_loss(prediction, target, weight, log_error)
    else:
        prediction = run.engine(latents, sigma, text, origin=noisy.origin)
        loss = flow_loss(prediction, target, weight)
    return loss, flow_loss(prediction.detach(), target, (weight > 0).float())


def clip_tokens(model: DiTConfig, shape: torch.Size) -> int:
    """Tokens of one clip with latents of shape (b, c, t, h, w)."""
    pt, ph, pw = model.patch_size
    return (shape[2] // pt) * (shape[3] // ph) * (shape[4] // pw)


def follow_latents(config: DiTRunConfig) -> DiTRunConfig:
    """The config with what the latents decide filled in: channels, VAE, frozen text encoder, size of the samples.

    Raises:
        UserError: if the folder is no finished set of latents, the patch does not divide them, or a text encoder is
            given that made no embeddings.
    """
    manifest = read_manifest(config.data.shards)
    if manifest is None:
        raise UserError(
            f"data.shards {config.data.shards} has no finished latents: run videodit encode --out {config.data.shards}"
        )
    frozen = manifest.get("text_encoder") or {}
    if config.text_encoder and not frozen:
        raise UserError(
            f"text_encoder {config.text_encoder} is given, but data.shards {config.data.shards} has no embeddings: "
            f"run videodit encode with --text_encoder {config.text_encoder}, or leave it out"
        )
    vae = VideoVAE.from_pretrained(config.vae or manifest["vae"])
    buckets = [parse_bucket(text, multiple=1) for text in manifest["fingerprint"]["buckets"]]
    for bucket in buckets:
        shape = vae.config.latent_shape(*bucket)
        for name, size, patch in zip(("frames", "height", "width"), shape[1:], config.model.patch_size):
            if size % patch:
                raise UserError(
                    f"model.patch_size {list(config.model.patch_size)} does not divide latents of {shape[1:]} ({name}) "
                    f"in {config.data.shards}, bucket {bucket.name}: change the patch, or encode clips of another size"
                )
    frames, height, width = buckets[0]
    text_dim = frozen.get("dim", config.text.dim)
    return dataclasses.replace(
        config,
        vae=config.vae or manifest["vae"],
        model=dataclasses.replace(config.model, in_channels=vae.config.latent_channels, text_dim=text_dim),
        text_encoder=(config.text_encoder or frozen["source"]) if frozen else None,
        text_max_length=frozen.get("max_length", 0),
        sampling=dataclasses.replace(config.sampling, num_frames=frames, height=height, width=width),
    )


def _read_prompts(config: DiTRunConfig, world: World) -> TextEncoder | None:
    """The prompts, read by the frozen encoder before training fills the memory; None if no samples will be drawn."""
    if not (config.prompts and config.sample_every):
        return None
    dtype = torch_dtype(run_dtype(config, world.device))
    return EncodedPrompts(frozen_text_encoder(config, world.device, dtype), config.prompts)


def _draw_samples(run: TrainingRun, config: DiTRunConfig, text_encoder: TextEncoder) -> None:
    """Clips for the fixed prompts, with the averaged weights and always the same seeds."""
    assert config.vae is not None  # follow_latents has set it
    with run.averaged() as module:
        vae = VideoVAE.from_pretrained(config.vae).to(run.world.device)
        pipe = TextToVideo(module, vae, text_encoder, config.flow, config.sampling)  # type: ignore[arg-type]
        clips = pipe(config.prompts, seed=config.seed)
    if run.world.is_main:
        folder = run.folder.path / "samples" / f"step-{run.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        videos = {}
        for row, (prompt, clip) in enumerate(zip(config.prompts, clips)):
            videos[prompt] = folder / f"{row:02d}.mp4"
            write_mp4(videos[prompt], clip, config.sampling.fps)
        run.log_videos(videos)
