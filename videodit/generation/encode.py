"""`videodit encode`: clips to latent and text-embedding shards, a cache that knows when it is out of date.

The set is made in parts (`latent_parts`). All ranks look which of them are there already, then each makes some of the
others; who does which, and in which run, changes no byte: no batch has clips of two parts.
"""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from videodit.data.batches import Request
from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.clip_reader import ClipReader, DataConfig
from videodit.data.files_fingerprint import VAE_FILES, files_fingerprint
from videodit.data.folder_lock import FolderLock
from videodit.data.latent_parts import (
    Part,
    clips_fingerprint,
    deal_parts,
    finish_part,
    is_whole,
    make_parts,
    prepare_folder,
    write_parts_index,
)
from videodit.data.latents import cache_is_valid, write_empty_text, write_manifest
from videodit.data.loader import read_clips
from videodit.data.mixture import only_folder, open_shards
from videodit.data.shard_writer import ShardFile
from videodit.data.shards import json_bytes, sha256_hex
from videodit.device import choose_device
from videodit.errors import UserError
from videodit.generation.clip_encoder import ClipEncoder, embed_captions
from videodit.models.text_transformers import MAX_LENGTH, TransformersTextEncoder, tokenizer_folder
from videodit.models.vae_folder import load_vae
from videodit.parallel.mesh import World, broadcast_object, gather_objects, on_main, patient_group, process_group
from videodit.parallel.watch import enter, tick, watching

# What decides the embeddings of a transformers folder: config, tokenizer, weights.
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")
TRANSFORM_VERSION = 2
"""Goes up when clips are cut or encoded otherwise, so that old latents are made anew."""

Progress = Callable[[int, int], None]

log = logging.getLogger(__name__)


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
    """clips encoded at once, on each rank"""
    clips_per_shard: int = 1000
    """most clips in a shard of latents, which one rank makes; each shard of clips gives at least one"""
    multiple: int = 8
    """what heights and widths must be divisible by: the VAE's factor times the DiT's patch"""
    text_encoder: str | None = None
    """folder of a frozen transformers text encoder (T5, UMT5, CLIP) that reads the captions; by default none, and the
    DiT trains its own byte-level encoder"""
    text_max_length: int = MAX_LENGTH
    """tokens that the text encoder reads of a caption; the rest is cut"""
    device: str = "auto"
    """auto, cpu or cuda"""
    hang_timeout_s: float = 600.0
    """seconds that a rank may be silent or stay where it is while others wait for it, until all end; 0 for ever"""

    def __post_init__(self) -> None:
        for name in ("vae", "out"):
            if not getattr(self, name):
                raise ValueError(f"{name} is not set: give --{name} FOLDER")
        usual = {"text_max_length": MAX_LENGTH, "batch_size": 8, "clips_per_shard": 1000, "multiple": 8}
        for name, example in usual.items():
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} is below 1: use for example {example}")
        if not self.data.shards:
            raise ValueError("data.shards is not set: give --data.shards FOLDER, as videodit ingest writes it")
        if self.hang_timeout_s < 0:
            raise ValueError(f"hang_timeout_s {self.hang_timeout_s:g} is negative: use 600, or 0 for no limit")


def encode_clips(config: EncodeConfig, progress: Progress | None = None) -> int:
    """Encodes every clip once (the middle window and crop); shards of latents that are there already are kept.

    Works alone or, under a launcher, on every rank, and goes on where it was killed. With a text encoder, every caption
    is encoded too, and the empty one; on a GPU it computes in bf16.

    Args:
        config: what to do.
        progress: called on rank 0 with (clips done, clips in all).
    Returns:
        Clips encoded now, by all ranks; 0 if the folder held all of it.
    Raises:
        UserError: if the VAE, the text encoder or the clips cannot be read, the folder not be written, or another
            process writes it.
        MissingExtra: for a text encoder without the transformers library.
    """
    with process_group(choose_device(config.device).type) as world:
        job = _Job(config, world, progress if progress is not None and world.is_main else lambda done, total: None)
        lock = on_main(world, lambda: FolderLock(config.out, "out"))
        try:
            with watching(world, config.hang_timeout_s):
                return job.run(lock)
        finally:
            if lock is not None:
                lock.close()


@contextmanager
def _told(world: World) -> Iterator[None]:
    """Prints an error that only this rank has: of others than a node's first the command line says nothing."""
    try:
        yield
    except UserError as error:
        if world.local_rank:
            print(f"error: rank {world.rank}: {error}", file=sys.stderr)
        raise


class _Found(NamedTuple):
    """What was found out about a part."""

    clips: str
    """hash of its clips"""
    whole: bool
    """whether its shard is there already"""


def _made_of(settings: dict[str, Any], clips: str) -> str:
    return sha256_hex(json_bytes([settings, clips]))


class _Job:
    """One call of `encode_clips` on one rank."""

    def __init__(self, config: EncodeConfig, world: World, progress: Progress) -> None:
        self.config, self.world, self.progress, self.out = config, world, progress, Path(config.out)
        self.vae = load_vae(config.vae).to(world.device)
        factor = self.vae.config.spatial_compression
        if config.multiple % factor:
            raise UserError(f"multiple {config.multiple} is not a multiple of the VAE's {factor}")
        self.source = only_folder(config.data, "encode")
        self.shards = open_shards(config.data)
        if self.out.resolve() == self.shards.root.resolve():
            raise UserError(f"out {config.out} is the folder of the clips: choose another out")
        statistics = ChannelStatistics.of_vae(self.vae.config)
        data = replace(config.data, cache_decoded=False)
        self.reader = ClipReader(self.shards, data, seed=0, random_crop=False, statistics=statistics)
        members = self.reader.group(config.multiple).members
        self.buckets = {index: bucket for bucket, clips in members.items() for index in clips}
        self.parts = make_parts(self.shards, sorted(self.buckets), config.clips_per_shard)
        self.group = patient_group()  # some ranks have to wait long for others

    def run(self, lock: FolderLock | None) -> int:
        """Makes what is missing: the clips encoded now, by all ranks.

        Args:
            lock: of the folder, on rank 0.
        """
        settings = broadcast_object(on_main(self.world, self._settings))
        assert settings is not None
        enter("looking for finished latents")
        with _told(self.world):
            looked = self._look(settings)
        found = dict(zip((part.shard for part in self.parts), sum(gather_objects(looked, self.group), []), strict=True))
        todo = [part for part in self.parts if not found[part.shard].whole]
        fingerprint = settings | {"clips": sha256_hex(json_bytes([clips for clips, _ in found.values()]))}
        if broadcast_object(self.world.is_main and not todo and cache_is_valid(self.out, fingerprint)):
            return 0
        on_main(self.world, lambda: lock.hold_alone() if lock is not None else None)
        text_encoder = self._text_encoder() if todo or self.world.is_main else None
        on_main(self.world, lambda: prepare_folder(self.out, self.parts))
        enter("encoding")
        encoder = ClipEncoder(self.shards, self.vae, text_encoder, self.world.device)
        made_of = {shard: _made_of(settings, of_part.clips) for shard, of_part in found.items()}
        with _told(self.world):
            count = self._make(todo, made_of, encoder)
        enter("waiting for the other ranks")
        counts = gather_objects(count, self.group)
        on_main(self.world, lambda: self._declare(fingerprint, text_encoder))
        return sum(counts)

    def _settings(self) -> dict[str, Any]:
        """All but the clips that latents and embeddings depend on; of folders the contents, not the names."""
        config, text_encoder = self.config, None
        if config.text_encoder:
            folders = dict.fromkeys([Path(config.text_encoder), tokenizer_folder(config.text_encoder)])
            files = "".join(files_fingerprint(folder, TEXT_FILES, tick) for folder in folders if folder)
            text_encoder = {"files": files, "max_length": config.text_max_length}
        return {
            "vae": files_fingerprint(config.vae, VAE_FILES, tick),
            "buckets": config.data.buckets,
            "fps": config.data.fps,
            "pixels": "yuv" if config.data.in_yuv else "rgb",
            "window": "middle",
            "text_encoder": text_encoder,
            "version": TRANSFORM_VERSION,
        }

    def _look(self, settings: dict[str, Any]) -> list[_Found]:
        """What there is of each part of this rank's share."""
        mine, done = [], 0
        for part in deal_parts(self.parts, self.world.size)[self.world.rank]:
            clips = clips_fingerprint(self.shards, part.clips, tick)
            mine.append(_Found(clips, is_whole(self.out, part, _made_of(settings, clips), tick)))
            if mine[-1].whole:
                done += len(part.clips)
                self.progress(done, len(self.buckets))
        return mine

    def _make(self, todo: Sequence[Part], made_of: dict[str, str], encoder: ClipEncoder) -> int:
        """Makes this rank's share of the parts: clips encoded."""
        if self.world.is_main and len(todo) == len(self.parts) < self.world.size:
            log.warning(
                "%d of %d ranks have nothing to do: for smaller shards give --clips_per_shard %d",
                self.world.size - len(todo), self.world.size, -(-len(self.buckets) // self.world.size),
            )  # fmt: skip
        mine = deal_parts(todo, self.world.size)[self.world.rank]
        requests = [self._requests(part) for part in mine]
        batches = read_clips(self.reader, [request for of_part in requests for request in of_part])
        total, left = len(self.buckets), sum(len(part.clips) for part in todo)
        share, read, count = sum(len(part.clips) for part in mine), 0, 0
        for part, of_part in zip(mine, requests):
            with ShardFile(self.out / part.shard) as file:
                for _ in of_part:
                    tick()
                    batch = next(batches)
                    count += encoder.write(file, batch)
                    read += len(batch.ids)
                    self.progress(total - left + left * read // share, total)  # the others are about as far
            finish_part(file, made_of[part.shard])
        return count

    def _requests(self, part: Part) -> list[Request]:
        """A part's batches: bucket by bucket, in the order of its clips."""
        by_bucket: dict[Any, list[int]] = {}
        for index in part.clips:
            by_bucket.setdefault(self.buckets[index], []).append(index)
        size = self.config.batch_size
        batches = [
            (bucket, tuple(clips[first : first + size]))
            for bucket, clips in sorted(by_bucket.items())
            for first in range(0, len(clips), size)
        ]
        return [Request(bucket, (0,) * len(ids), ids) for bucket, ids in batches]

    def _text_encoder(self) -> TransformersTextEncoder | None:
        if not self.config.text_encoder:
            return None
        # Encoded once and used in every epoch: on a CPU exactness is worth more here than speed.
        dtype = torch.bfloat16 if self.world.device.type == "cuda" else torch.float32
        return TransformersTextEncoder(self.config.text_encoder, self.config.text_max_length, self.world.device, dtype)

    def _declare(self, fingerprint: dict[str, Any], text_encoder: TransformersTextEncoder | None) -> None:
        """Says that the folder holds all of it."""
        facts, count = None, write_parts_index(self.out, self.parts)
        if not count:
            raise UserError(f"data.shards {self.source}: none of its {len(self.buckets)} clips could be read")
        if text_encoder is not None:
            write_empty_text(self.out, embed_captions(text_encoder, [[""]])[0][0])
            facts = {"source": text_encoder.source, "max_length": text_encoder.max_length, "dim": text_encoder.dim}
        write_manifest(self.out, fingerprint, count, source=self.source, vae=self.config.vae, text_encoder=facts)
