"""`videodit encode`: clips to latent and text-embedding shards, a cache that knows when it is out of date."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videodit.data.captions import Captions
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.clip_reader import DataConfig
from videodit.data.files_fingerprint import files_fingerprint
from videodit.data.latents import (
    cache_is_valid,
    invalidate,
    latent_key,
    shards_fingerprint,
    write_empty_text,
    write_latent_sample,
    write_manifest,
)
from videodit.data.loader import clips_in_order
from videodit.data.mixture import only_folder, open_shards
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.device import choose_device
from videodit.errors import UserError
from videodit.models.text import TextEncoder
from videodit.models.text_transformers import TransformersTextEncoder, tokenizer_folder
from videodit.models.vae_folder import load_vae

# What decides the embeddings of a transformers folder: config, tokenizer, weights.
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")


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
    text_encoder: str | None = None
    """folder of a frozen transformers text encoder (T5, UMT5, CLIP) that reads the captions; by default none, and the
    DiT trains its own byte-level encoder"""
    text_max_length: int = 128
    """tokens that the text encoder reads of a caption; the rest is cut"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def __post_init__(self) -> None:
        for name in ("vae", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set: give --{name} FOLDER")
        if self.text_max_length < 1:
            raise ValueError(f"text_max_length {self.text_max_length} is below 1: use for example 128")


def encode_clips(config: EncodeConfig, progress: Callable[[int, int], None] | None = None) -> int:
    """Encodes every clip once (the middle window and crop), unless the cache already holds exactly that.

    With a text encoder, every caption is encoded too, and the empty one; on a GPU it computes in bf16.

    Args:
        config: what to do.
        progress: called with (clips done, clips in all).
    Returns:
        Clips encoded now; 0 if the cache was valid.
    Raises:
        UserError: if the VAE, the text encoder or the clips cannot be read or the folder not be written.
        MissingExtra: for a text encoder without the transformers library.
    """
    device = choose_device(config.device)
    vae = load_vae(config.vae).to(device)
    if config.multiple % vae.config.spatial_compression:
        raise UserError(f"multiple {config.multiple} is not a multiple of the VAE's {vae.config.spatial_compression}")
    source = only_folder(config.data, "encode")
    shards = open_shards(config.data)
    fingerprint = _fingerprint(config, shards)
    if cache_is_valid(config.out, fingerprint):
        return 0
    text_encoder = None
    if config.text_encoder:
        # Encoded once and used in every epoch: on a CPU exactness is worth more here than speed.
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        text_encoder = TransformersTextEncoder(config.text_encoder, config.text_max_length, device, dtype)
    invalidate(config.out)
    total = len(shards)
    count = 0
    with ShardWriter(config.out) as writer, torch.no_grad():
        statistics = ChannelStatistics.of_vae(vae.config)
        batches = clips_in_order(
            config.data, shards, config.batch_size, multiple=config.multiple, statistics=statistics
        )
        for batch in batches:
            posterior = vae.posterior(batch.clip(device))
            captions = [
                shards.weighted_captions(index) if weight else Captions([])
                for index, weight in zip(batch.ids, batch.weight)
            ]
            text = embed_captions(text_encoder, [of_clip.texts for of_clip in captions])
            for row, index in enumerate(batch.ids):
                if batch.weight[row] == 0:  # padding, or a clip that could not be read
                    continue
                clip = shards.read_json(index)
                kept: dict[str, Any] = {name: clip[name] for name in ("fps", "source", "extra") if name in clip}
                kept["captions"] = captions[row].texts  # also those of a .txt member
                kept |= captions[row].weights_record()
                cut = batch.cuts[row]
                if "fps" in kept:
                    kept["fps"] = float(kept["fps"]) / cut.stride
                meta = {**kept, **asdict(cut), "bucket": batch.bucket.name, "clip": batch.keys[row]}
                key = latent_key(batch.keys[row])
                write_latent_sample(writer, key, posterior.mean[row], posterior.logvar[row], meta, text[row])
                count += 1
            if progress is not None:
                progress(count, total)
    facts = None
    if text_encoder is not None:
        write_empty_text(config.out, embed_captions(text_encoder, [[""]])[0][0])
        facts = {"source": text_encoder.source, "max_length": text_encoder.max_length, "dim": text_encoder.dim}
    write_manifest(config.out, fingerprint, count, source=source, vae=config.vae, text_encoder=facts)
    return count


def embed_captions(encoder: TextEncoder | None, captions: Sequence[Sequence[str]]) -> list[list[Tensor]]:
    """Embeddings of the captions of several clips, read as one batch.

    Args:
        encoder: a frozen text encoder; None gives no embeddings.
        captions: of each clip.
    Returns:
        For each clip and caption (l, d), real tokens only.
    """
    together = [caption for of_clip in captions for caption in of_clip]
    if encoder is None or not together:
        return [[] for _ in captions]
    features = encoder.encode(together)
    rows = iter([tokens[mask] for tokens, mask in zip(features.embeddings, features.mask)])
    return [[next(rows) for _ in of_clip] for of_clip in captions]


def _fingerprint(config: EncodeConfig, shards: ShardSet) -> dict[str, Any]:
    """All that the latents and embeddings depend on; of folders the contents, not the names."""
    text_encoder = None
    if config.text_encoder:
        folders = dict.fromkeys([Path(config.text_encoder), tokenizer_folder(config.text_encoder)])
        files = "".join(files_fingerprint(folder, TEXT_FILES) for folder in folders if folder)
        text_encoder = {"files": files, "max_length": config.text_max_length}
    return {
        "vae": files_fingerprint(config.vae, ("config.json", "*.safetensors")),
        "clips": shards_fingerprint(shards),
        "buckets": config.data.buckets,
        "fps": config.data.fps,
        "window": "middle",
        "text_encoder": text_encoder,
    }
