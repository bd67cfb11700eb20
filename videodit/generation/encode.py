"""`videodit encode`: clips to latent shards, a cache that knows when it is out of date."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from videodit.data.clip_reader import DataConfig
from videodit.data.latents import (
    cache_is_valid,
    invalidate,
    latent_key,
    shards_fingerprint,
    write_latent_sample,
    write_manifest,
)
from videodit.data.loader import clips_in_order
from videodit.data.order import PADDING
from videodit.data.shards import ShardSet, ShardWriter
from videodit.device import choose_device
from videodit.errors import UserError
from videodit.models.folder import WEIGHTS_NAME
from videodit.models.vae import VideoVAE


@dataclass(frozen=True)
class EncodeConfig:
    """Clips in, latents out."""

    vae: str = ""
    """VAE folder (config.json + model.safetensors), such as RUN/model of `videodit train vae`"""
    out: str = ""
    """folder for the latent shards"""
    data: DataConfig = field(default_factory=DataConfig)
    """the clips and the shapes they are cut to"""
    batch_size: int = 8
    """clips encoded at once"""
    multiple: int = 8
    """what heights and widths must be divisible by: the VAE's factor times the DiT's patch"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def __post_init__(self) -> None:
        for name in ("vae", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set: give --{name} FOLDER")


def encode_clips(config: EncodeConfig, progress: Callable[[int, int], None] | None = None) -> int:
    """Encodes every clip once (the middle window and crop), unless the cache already holds exactly that.

    Args:
        config: what to do.
        progress: called with (clips done, clips in all).
    Returns:
        Clips encoded now; 0 if the cache was valid.
    Raises:
        UserError: if the VAE or the clips cannot be read or the folder not be written.
    """
    device = choose_device(config.device)
    vae = VideoVAE.from_pretrained(config.vae).to(device)
    if config.multiple % vae.config.spatial_compression:
        raise UserError(f"multiple {config.multiple} is not a multiple of the VAE's {vae.config.spatial_compression}")
    shards = ShardSet.open(config.data.shards)
    fingerprint = {
        "vae": hashlib.sha256((Path(config.vae) / WEIGHTS_NAME).read_bytes()).hexdigest(),
        "clips": shards_fingerprint(shards),
        "buckets": config.data.buckets,
        "fps": config.data.fps,
        "window": "middle",
    }
    if cache_is_valid(config.out, fingerprint):
        return 0
    invalidate(config.out)
    total = len(shards)
    count = 0
    with ShardWriter(config.out) as writer, torch.no_grad():
        for batch in clips_in_order(config.data, shards, config.batch_size, multiple=config.multiple):
            posterior = vae.posterior(batch.clip.to(device))
            for row, (index, weight) in enumerate(zip(batch.ids, batch.weight.tolist())):
                if index == PADDING or weight == 0:
                    continue
                clip = shards.read_json(index)
                kept: dict[str, Any] = {name: clip[name] for name in ("fps", "source", "extra") if name in clip}
                kept["captions"] = shards.captions(index)  # also those of a .txt member
                meta = {**kept, "bucket": batch.bucket.name, "clip": batch.keys[row]}
                key = latent_key(batch.keys[row])
                write_latent_sample(writer, key, posterior.mean[row], posterior.logvar[row], meta)
                count += 1
            if progress is not None:
                progress(count, total)
    write_manifest(config.out, fingerprint, count, source=config.data.shards, vae=config.vae)
    return count
