"""`videodit train vae`: the video VAE on clips in pixels."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor

from videodit.config import to_yaml
from videodit.data.batches import ClipBatch
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.clip_reader import DataConfig
from videodit.data.field import preview
from videodit.data.loader import ClipLoader, clips_in_order
from videodit.data.mixture import open_shards
from videodit.data.mp4 import write_mp4
from videodit.data.randomness import sample_noise
from videodit.data.transforms import frame_stride, to_pixels
from videodit.errors import UserError
from videodit.evaluation.reconstruction import psnr
from videodit.models.vae import VideoVAE
from videodit.parallel.mesh import World
from videodit.planning.workload import VAEWorkload
from videodit.training.checkpoint import Checkpoint, load_average, load_latest
from videodit.training.clip_seconds import ClipSeconds
from videodit.training.run import TrainingRun, micro_batch_tokens
from videodit.training.run_config import open_world
from videodit.training.stages import Stage, StagedLoader, stages_of
from videodit.training.vae_config import VAERunConfig, follow_clips
from videodit.training.vae_objective import VAEObjective

FIT_CLIPS = 64
"""Clips whose blocks give the VAE's linear shortcut."""


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
    stages = stages_of(config)
    with open_world(config) as world, TrainingRun.open(config, to_yaml(config), world) as run:
        vae = VideoVAE(config.model)
        vae.fit_shortcut(_first_clips(config, stages[0].config.data, FIT_CLIPS))
        clip_flops: dict[str, int] = {}

        def count(stage: Stage[VAERunConfig], loader: ClipLoader) -> None:
            # Before DeepSpeed starts: what it does to torch at ZeRO-3 falsifies the count.
            workload = VAEWorkload(stage.config, list(loader.batch_sizes))
            new = [bucket for bucket in workload.buckets if run.counts_flops and bucket.name not in clip_flops]
            clip_flops.update({bucket.name: workload.flops(bucket, "none") for bucket in new})

        loader = StagedLoader(stages, functools.partial(_open_clips, world), count)
        run.start(VAEObjective(vae, config.loss))
        times = ClipSeconds(run)
        loader.use_seconds(functools.partial(_measure_stage, run, times))
        run.accept(loader)
        times.freeze(free=loader.endings_after(run.step))
        held_out, fps = None, 8.0
        if config.eval_shards is not None:
            eval_data = dataclasses.replace(stages[-1].config.data, shards=config.eval_shards, weights=[])
            held_out = _first_clips(config, eval_data, config.eval_clips)
            rate = open_shards(eval_data).columns.usual_fps()
            fps = rate / frame_stride(rate, eval_data.fps) if rate else 8.0
        if run.evaluation_was_cut() and held_out is not None:
            _reconstruct(run, held_out, fps)
        while run.running:
            data = loader.read(run.step + 1, run.next_data_step)
            total = run.total_weight(data.batches)
            sums = {name: torch.zeros((), device=world.device) for name in ("loss", "mse")}
            for batch in data.batches:
                for name, value in _micro_step(run, data.stage.config, batch, total).items():
                    sums[name] += value
            positions = math.prod(config.model.latent_shape(*batch.bucket)[1:])
            run.finish_step(
                sums,
                bucket=data.plan.bucket,
                keys=data.keys,
                tokens=micro_batch_tokens(data.batches, positions, world.size),
                flops=micro_batch_tokens(data.batches, clip_flops.get(data.plan.bucket, 0), world.size),
            )
            if run.due(config.sample_every) and held_out is not None:
                _reconstruct(run, held_out, fps)
        run.finish()
        newest = load_latest(config.run_dir)
        if world.is_main and newest is not None:
            export_vae(config, newest, Path(config.run_dir) / "model", device=world.device)
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


def _measure_stage(
    run: TrainingRun, times: ClipSeconds, stage: Stage[VAERunConfig], loader: ClipLoader
) -> Mapping[str, float]:
    """Seconds of a clip of each bucket."""
    one_pass = functools.partial(_micro_step, run, stage.config, total=stage.config.micro_batch_size)
    return times.of(loader, one_pass, stage.ending)


def export_vae(
    config: VAERunConfig,
    checkpoint: Checkpoint,
    out: Path,
    weights: Mapping[str, Tensor] | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Writes the VAE folder of a run: averaged weights, and latent statistics measured with them.

    Args:
        config: of the run.
        checkpoint: of the run.
        out: folder to write.
        weights: an average by parameter name; None for the run's first.
        device: where clips are encoded for the statistics.
    """
    vae = VideoVAE(config.model)
    load_average(VAEObjective(vae, config.loss), checkpoint, weights)
    last = stages_of(config)[-1].config
    # A micro batch of training fits a GPU, and so does one without gradients.
    batch_size = 8 if torch.device(device).type == "cpu" else min(8, last.micro_batch_size)
    measure_latent_statistics(vae.to(device), last.data, batch_size=batch_size)
    vae.cpu().save_pretrained(out)


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


def _open_clips(world: World, config: VAERunConfig) -> ClipLoader:
    return ClipLoader(
        config.data,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        batch_by=config.batch_by,
        rank=world.rank,
        world=world.size,
        multiple=config.model.spatial_compression,
        statistics=ChannelStatistics.of_vae(config.model),
    )


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
        with run.keeping_samples():
            write_mp4(path, preview(frames.numpy()), fps)
            run.log_videos("samples/ema", {"above: clip, below: reconstruction": path})
