"""What becomes of a batch of clips: the VAE's posteriors, the captions' embeddings, and what is known of each clip."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from videodit.data.batches import ClipBatch
from videodit.data.captions import Captions
from videodit.data.latents import latent_key, write_latent_sample
from videodit.data.shard_writer import SampleWriter
from videodit.data.shards import ShardSet
from videodit.models.text import TextEncoder
from videodit.models.vae_folder import VideoAutoencoder


class ClipEncoder:
    """Writes clips as latents.

    Args:
        shards: the clips.
        vae: on the device where it computes.
        text_encoder: a frozen one; None leaves captions as text.
        device: the VAE's.
    """

    def __init__(
        self, shards: ShardSet, vae: VideoAutoencoder, text_encoder: TextEncoder | None, device: torch.device
    ) -> None:
        self.text_encoder = text_encoder
        self._shards, self._vae, self._device = shards, vae, device

    @torch.no_grad()
    def write(self, writer: SampleWriter, batch: ClipBatch) -> int:
        """Encodes a batch; clips that could not be read are left out.

        Returns:
            Clips written.
        """
        posterior = self._vae.posterior(batch.clip(self._device))
        rows = [row for row, weight in enumerate(batch.weight.tolist()) if weight]
        captions = [self._shards.weighted_captions(batch.ids[row]) for row in rows]
        text = embed_captions(self.text_encoder, [of_clip.texts for of_clip in captions])
        for row, of_clip, embeddings in zip(rows, captions, text):
            meta = self._facts(batch, row, of_clip)
            key = latent_key(batch.keys[row])
            write_latent_sample(writer, key, posterior.mean[row], posterior.logvar[row], meta, embeddings)
        return len(rows)

    def _facts(self, batch: ClipBatch, row: int, captions: Captions) -> dict[str, Any]:
        clip, cut = self._shards.read_json(batch.ids[row]), batch.cuts[row]
        kept: dict[str, Any] = {name: clip[name] for name in ("fps", "source", "extra") if name in clip}
        kept["captions"] = captions.texts  # also those of a .txt member
        kept |= captions.weights_record()
        if "fps" in kept:
            kept["fps"] = float(kept["fps"]) / cut.stride
        return {**kept, **asdict(cut), "bucket": batch.bucket.name, "clip": batch.keys[row]}


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
