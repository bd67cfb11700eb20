"""`videodit train vae`: the video VAE on clips in pixels."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from videodit.config import to_yaml
from videodit.data.batches import ClipBatch
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.clip_reader import DataConfig, measured_statistics
from videodit.data.field import preview
from videodit.data.loader import ClipLoader, clips_in_order
from videodit.data.mixture import open_shards
from videodit.data.mp4 import write_mp4
from videodit.data.randomness import sample_noise
from videodit.data.transforms import to_pixels
from videodit.errors import UserError
from videodit.evaluation.reconstruction import psnr
from videodit.models.vae import VAEConfig, VideoVAE, gaussian_kl
from videodit.training.checkpoint import Checkpoint, load_average, load_latest
from videodit.training.clip_seconds import ClipSeconds
from videodit.training.run import TrainingRun, micro_batch_tokens
from videodit.training.run_config import RunConfig, open_world

FIT_CLIPS = 64
"""Clips whose blocks give the VAE's linear shortcut."""


@dataclass(frozen=True)
class VAELossConfig:
    """Weights of the VAE's loss terms, each a mean over values."""

    l1: float = 1.0
    """absolute error of the pixels in [-1, 1]"""
    mse: float = 0.0
    """squared error of the pixels: weighs what is far off, such as the edge of a small object"""
    kl: float = 1e-6
    """KL divergence of the posterior from a standard normal, in nats per latent value"""


@dataclass(frozen=True)
class VAERunConfig(RunConfig):
    """A VAE training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """clips to train on"""
    eval_shards: str | None = None
    """shards of held-out clips; their PSNR is measured every sample_every steps"""
    eval_clips: int = 32
    """how many of them"""
    model: VAEConfig = field(default_factory=VAEConfig)
    """shape of the VAE"""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    """loss terms"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.shards:
            raise ValueError("data.shards is not set: give --data.shards FOLDER, as videodit ingest writes it")


class VAEObjective(torch.nn.Module):
    """The VAE with its loss, as one module: clips in, losses per clip out."""

    def __init__(self, vae: VideoVAE, weights: VAELossConfig) -> None:
        super().__init__()
        self.vae, self.weights = vae, weights

    def forward(self, clip: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of a micro batch.

        Args:
            clip: (b, c, t, h, w) in [-1, 1].
            noise: standard normal, of the latents' shape.
        Returns:
            (b,) the weighted loss and (b,) the squared error alone, float32.
        """
        posterior = self.vae.posterior(clip)
        error = (self.vae.decode(posterior.sample(noise)) - clip).float().flatten(1)
        squared = error.square().mean(dim=1)
        kl = gaussian_kl(posterior.mean.float(), posterior.logvar.float()) / noise[0].numel()
        return self.weights.l1 * error.abs().mean(dim=1) + self.weights.mse * squared + self.weights.kl * kl, squared


def train_vae(config: VAERunConfig) -> Path:
    """Trains, or goes on training, a VAE on videos, or on fields, whose channels and statistics it then follows.

    Args:
        config: of the run.
    Returns:
        RUN/model, the VAE with averaged weights and latent statistics.
    Raises:
        UserError: for data or a folder that cannot be used.
    """
    config = follow_clips(config)
    multiple, statistics = config.model.spatial_compression, ChannelStatistics.of_vae(config.model)
    with open_world(config) as world, TrainingRun.open(config, to_yaml(config), world) as run:
        vae = VideoVAE(config.model)
        vae.fit_shortcut(_first_clips(config, config.data, FIT_CLIPS))
        run.start(VAEObjective(vae, config.loss))
        loader = ClipLoader(
            config.data,
            seed=config.seed,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            batch_by=config.batch_by,
            rank=world.rank,
            world=world.size,
            multiple=multiple,
            statistics=statistics,
        )
        times = ClipSeconds(run)
        if loader.needs_seconds:
            one_pass = functools.partial(_micro_step, run, config, total=config.micro_batch_size)
            loader.use_seconds(times.of(loader, one_pass))
        run.accept(loader.batch_sizes, loader.order_settings)
        times.freeze()
        held_out = None
        if config.eval_shards is not None:
            eval_data = dataclasses.replace(config.data, shards=config.eval_shards, weights=[])
            held_out = _first_clips(config, eval_data, config.eval_clips)
        if run.evaluation_was_cut() and held_out is not None:
            _reconstruct(run, held_out, fps=8.0)
        steps = loader.iterate(run.next_data_step)
        while run.running:
            plan, batches = next(steps)
            total = run.total_weight(batches)
            sums = {name: torch.zeros((), device=world.device) for name in ("loss", "mse")}
            for batch in batches:
                for name, value in _micro_step(run, config, batch, total).items():
                    sums[name] += value
            positions = math.prod(config.model.latent_shape(*batch.bucket)[1:])
            run.finish_step(
                sums,
                bucket=plan.bucket,
                keys=loader.keys(plan),
                tokens=micro_batch_tokens(batches, positions, world.size),
            )
            if run.due(config.sample_every) and held_out is not None:
                _reconstruct(run, held_out, fps=8.0)
        run.finish()
        newest = load_latest(config.run_dir)
        if world.is_main and newest is not None:
            export_vae(config, newest, Path(config.run_dir) / "model")
    return Path(config.run_dir) / "model"


def _micro_step(run: TrainingRun, config: VAERunConfig, batch: ClipBatch, total: float) -> dict[str, Tensor]:
    """Forward and backward pass of a micro batch; its part of each loss, total being the weight of the whole step."""
    device = run.world.device
    shape = config.model.latent_shape(*batch.bucket)
    noise = sample_noise(config.seed, batch.epochs, batch.keys, shape, "posterior")
    with run.meter.phase("forward"):
        losses, squared = run.engine(batch.clip(device), noise.to(device))
        weight = batch.weight.to(losses.device) / total
        loss = (weight * losses).sum()
    with run.meter.phase("backward"):
        run.engine.backward(loss)
    return {"loss": loss.detach(), "mse": (weight * squared).sum().detach()}


def follow_clips(config: VAERunConfig) -> VAERunConfig:
    """The config with the number of the clips' channels and, of fields, their statistics.

    Raises:
        UserError: if there are no clips, they are of several kinds, or ingest did not measure their channels.
    """
    statistics = measured_statistics(open_shards(config.data))
    model = dataclasses.replace(
        config.model,
        in_channels=len(statistics.mean) if statistics else 3,
        channel_mean=statistics.mean if statistics else None,
        channel_std=statistics.std if statistics else None,
    )
    return dataclasses.replace(config, model=model)


def export_vae(
    config: VAERunConfig, checkpoint: Checkpoint, out: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the VAE folder of a run: averaged weights, and latent statistics measured with them.

    Args:
        config: of the run.
        checkpoint: of the run.
        out: folder to write.
        weights: an average by parameter name; None for the run's first.
    """
    vae = VideoVAE(config.model)
    load_average(VAEObjective(vae, config.loss), checkpoint, weights)
    measure_latent_statistics(vae, config.data)
    vae.save_pretrained(out)


@torch.no_grad()
def measure_latent_statistics(vae: VideoVAE, data: DataConfig, num_clips: int = 512, batch_size: int = 8) -> None:
    """Sets the VAE's latent statistics from the latents of up to num_clips training clips.

    Args:
        vae: its statistics are overwritten.
        data: the clips.
        num_clips: how many are enough.
        batch_size: clips encoded at once.
    """
    vae.latent_mean.zero_()
    vae.latent_std.fill_(1.0)
    channels = vae.config.latent_channels
    total, total_square = torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    positions = seen = 0
    device = vae.latent_mean.device
    statistics, multiple = ChannelStatistics.of_vae(vae.config), vae.config.spatial_compression
    shards = open_shards(data)
    for batch in clips_in_order(data, shards, batch_size, multiple=multiple, statistics=statistics):
        mean = vae.encode(batch.clip(device)[batch.weight > 0]).double().cpu()
        total += mean.sum(dim=(0, 2, 3, 4))
        total_square += mean.square().sum(dim=(0, 2, 3, 4))
        positions += mean.numel() // channels
        seen += mean.shape[0]
        if seen >= num_clips:
            break
    center = total / positions
    variance = (total_square / positions - center.square()).clamp(min=1e-8)
    vae.set_latent_statistics(center.float().to(device), variance.sqrt().float().to(device))


def _first_clips(config: VAERunConfig, data: DataConfig, count: int) -> Tensor:
    """(n, c, t, h, w) as models see them: up to count clips of the first bucket, the same on every rank."""
    data = dataclasses.replace(data, buckets=data.buckets[:1])
    statistics, multiple = ChannelStatistics.of_vae(config.model), config.model.spatial_compression
    batches = clips_in_order(data, open_shards(data), count, multiple=multiple, statistics=statistics)
    batch = next(iter(batches))
    clips = batch.clip()[batch.weight > 0]
    if not len(clips):
        raise UserError(f"{data.name} has no readable clip among its first {count}: check the shards")
    return clips


def _reconstruct(run: TrainingRun, clips: Tensor, fps: float) -> None:
    """Measures PSNR on held-out clips with the averaged weights, and keeps four of them beside their originals."""
    with run.evaluating() as module:
        assert isinstance(module, VAEObjective)
        vae = module.vae
        parts = []
        for part in clips.split(8):
            run.stop_if_asked()
            parts.append(vae.decode(vae.encode(part.to(run.world.device))).cpu())
        made = torch.cat(parts)
    of_fields = vae.config.channel_mean is not None  # they have no white and no black to be clipped at
    made = made if of_fields else made.clamp(-1, 1)
    run.log({"eval/psnr_db": float(psnr(clips, made).mean())})
    if run.world.is_main:
        shown = rearrange([clips[:4], made[:4]], "v b c t h w -> 1 c t (v h) (b w)")
        frames = rearrange(shown, "1 c t h w -> t h w c") if of_fields else to_pixels(shown)[0]
        path = run.folder.path / "samples" / f"step-{run.step:08d}.mp4"
        write_mp4(path, preview(frames.numpy()), fps)
        run.log_videos("samples/ema", {"above: clip, below: reconstruction": path})
