"""Latent shards: what `videodit encode` writes and DiT training reads.

A sample is KEY.safetensors (fp16 `mean` and `logvar` of the posterior, (c, t, h, w), normalised) and KEY.json
(captions, `bucket` in pixels, `latent_shape`, and what came along from the clip). Beside the shards lies latents.json:
what the latents were made from and how. It is written last: without it, or with another fingerprint, they are stale.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from videodit.data.shards import Entry, ShardSet, ShardWriter, json_bytes
from videodit.errors import UserError, user_error

MANIFEST = "latents.json"


@dataclass
class LatentSample:
    """One clip's posterior."""

    mean: Tensor
    """(c, t, h, w) float16, normalised: about zero mean and unit variance over the data set."""
    logvar: Tensor
    """(c, t, h, w) float16 log-variance in the same units: z = mean + exp(logvar / 2) * noise."""


def latent_key(clip_key: str) -> str:
    """The key of a clip's latents: the clip's own where a shard can hold it, else a cleaned form with a hash."""
    if re.fullmatch(r"[^./\s]+", clip_key) and len(clip_key.encode()) <= 80:
        return clip_key
    clean = re.sub(r"[^A-Za-z0-9_-]+", "-", clip_key)[-60:].strip("-")
    return f"{clean}-{hashlib.sha256(clip_key.encode()).hexdigest()[:12]}"


def write_latent_sample(writer: ShardWriter, key: str, mean: Tensor, logvar: Tensor, meta: Mapping[str, Any]) -> Entry:
    """Adds one clip's latents to a shard.

    Args:
        writer: the shards.
        key: as from `latent_key`.
        mean: (c, t, h, w) posterior mean, normalised, any float type and device.
        logvar: (c, t, h, w) posterior log-variance in the same units.
        meta: what goes to KEY.json: at least `bucket` ("17x64x64"); captions, source key, extra travel along.
    Returns:
        Where it lies.
    Raises:
        ValueError: if shapes differ, `bucket` is missing, or a value does not fit in fp16.
    """
    if mean.ndim != 4 or mean.shape != logvar.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} must both be (c, t, h, w)")
    if "bucket" not in meta:
        raise ValueError(f"latents of {key} need their bucket in meta, for example 17x64x64")
    tensors = {
        name: value.detach().to("cpu", torch.float16).contiguous()
        for name, value in (("mean", mean), ("logvar", logvar))
    }
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} of {key} is not finite in fp16: the VAE diverged or its statistics are wrong")
    record = {**meta, "latent_shape": list(mean.shape)}
    return writer.write(key, {"safetensors": safetensors.torch.save(tensors), "json": json_bytes(record)})


def read_latent_sample(shards: ShardSet, index: int) -> LatentSample:
    """Reads one clip's latents.

    Args:
        shards: latent shards.
        index: the sample's number.
    Raises:
        ValueError: if the tensors are damaged.
        UserError: if the shard cannot be read.
    """
    try:
        tensors = safetensors.torch.load(shards.read(index, "safetensors"))
        return LatentSample(tensors["mean"], tensors["logvar"])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"damaged latents: {error}") from error


def shards_fingerprint(shards: ShardSet) -> str:
    """A sha256 over the index of a set of shards: it changes when clips are added, removed or made anew."""
    digest = hashlib.sha256()
    for entry in shards.entries:
        digest.update(json_bytes([entry.key, entry.shard, entry.members, entry.meta]) + b"\n")
    return digest.hexdigest()


def write_manifest(out_dir: str | Path, fingerprint: Mapping[str, Any], num_clips: int, source: str, vae: str) -> None:
    """Declares a latent cache complete; called after the shards were closed.

    Args:
        out_dir: folder of the latent shards.
        fingerprint: all that the latents depend on: VAE weights' sha256, the clips' fingerprint, buckets, transform.
        num_clips: samples written.
        source: folder of the clips, for people.
        vae: folder of the VAE, which decodes what is trained on these latents.
    Raises:
        UserError: if it cannot be written.
    """
    path = Path(out_dir) / MANIFEST
    part = path.with_name(f"{MANIFEST}.part")
    record = {"fingerprint": dict(fingerprint), "num_clips": num_clips, "source": source, "vae": vae}
    try:
        with open(part, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise user_error(error, path) from error


def invalidate(out_dir: str | Path) -> None:
    """Removes the declaration; called before the shards are written anew.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        (Path(out_dir) / MANIFEST).unlink(missing_ok=True)
    except OSError as error:
        raise user_error(error, out_dir) from error


def read_manifest(out_dir: str | Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote; None if it is missing or damaged."""
    try:
        record = json.loads((Path(out_dir) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def cache_is_valid(out_dir: str | Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether the folder holds complete latents of exactly this fingerprint.

    Args:
        out_dir: folder of the latent shards; it may not exist.
        fingerprint: as given to `write_manifest`.
    """
    record = read_manifest(out_dir)
    # Through JSON, so that tuples and lists compare equal.
    if record is None or record.get("fingerprint") != json.loads(json.dumps(dict(fingerprint))):
        return False
    try:
        return len(ShardSet.open(out_dir)) == record.get("num_clips")
    except UserError:
        return False
