"""Latent shards: what `videodit encode` writes and DiT training reads.

A sample is KEY.safetensors (fp16 `mean` and `logvar` of the posterior, (c, t, h, w), normalised) and KEY.json
(captions, `bucket` in pixels, `latent_shape`, how the clip was cut, see `ClipCut`, `fps` after the stride, and what
came along from the clip). With a frozen text encoder,
KEY.safetensors also has `text/0`, `text/1`, … (l, d): the captions in their order, real tokens only; the embedding of
"" lies in empty_text.safetensors. Beside the shards lies latents.json: what the latents were made from and how. It is
written last: without it, or with another fingerprint, they are stale.
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from videodit.data.buckets import Bucket
from videodit.data.shard_writer import SampleWriter
from videodit.data.shards import INDEX, PART, Entry, ShardSet, json_bytes, sha256_hex
from videodit.errors import UserError, user_error
from videodit.models.micro_conditioning import MICRO_CONDITIONS

MANIFEST = "latents.json"
EMPTY_TEXT = "empty_text.safetensors"


@dataclass
class LatentSample:
    """One clip's posterior, and its captions' embeddings if a frozen text encoder made some."""

    mean: Tensor
    """(c, t, h, w) float16, normalised: about zero mean and unit variance over the data set."""
    logvar: Tensor
    """(c, t, h, w) float16 log-variance in the same units: z = mean + exp(logvar / 2) * noise."""
    text: list[Tensor] = field(default_factory=list)
    """(l, d) float16 for each caption; empty without a frozen text encoder."""


def latent_key(clip_key: str) -> str:
    """The key of a clip's latents: the clip's own where a shard can hold it, else a cleaned form with a hash."""
    if re.fullmatch(r"[^./\s]+", clip_key) and len(clip_key.encode()) <= 80:
        return clip_key
    clean = re.sub(r"[^A-Za-z0-9_-]+", "-", clip_key)[-60:].strip("-")
    return f"{clean}-{hashlib.sha256(clip_key.encode()).hexdigest()[:12]}"


def write_latent_sample(
    writer: SampleWriter,
    key: str,
    mean: Tensor,
    logvar: Tensor,
    meta: Mapping[str, Any],
    text: Sequence[Tensor] = (),
) -> Entry:
    """Adds one clip's latents to a shard.

    Args:
        writer: the shards, or one of them.
        key: as from `latent_key`.
        mean: (c, t, h, w) posterior mean, normalised, any float type and device.
        logvar: (c, t, h, w) posterior log-variance in the same units.
        meta: what goes to KEY.json: at least `bucket` ("17x64x64"); captions, source key, extra travel along.
        text: (l, d) embedding of each caption in meta, without padding; none if the text encoder is not frozen.
    Returns:
        Where it lies.
    Raises:
        ValueError: if shapes differ, `bucket` is missing, an embedding is, or a value does not fit in fp16.
    """
    if mean.ndim != 4 or mean.shape != logvar.shape:
        raise ValueError(f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} must both be (c, t, h, w)")
    if "bucket" not in meta:
        raise ValueError(f"latents of {key} need their bucket in meta, for example 17x64x64")
    if text and len(text) != len(meta.get("captions", ())):
        raise ValueError(f"{len(text)} embeddings for the {len(meta.get('captions', ()))} captions of {key}")
    tensors = {"mean": _half(mean), "logvar": _half(logvar)}
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} of {key} is not finite in fp16: the VAE diverged or its statistics are wrong")
    for number, embedding in enumerate(text):
        tensors[f"text/{number}"] = _checked_text(embedding, f"text/{number} of {key}")
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
        count = sum(name.startswith("text/") for name in tensors)
        return LatentSample(tensors["mean"], tensors["logvar"], [tensors[f"text/{number}"] for number in range(count)])
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"damaged latents: {error}") from error


def micro_conditions(meta: Mapping[str, Any], bucket: Bucket) -> list[float]:
    """What a sample's json says of `MICRO_CONDITIONS`, in their order.

    Args:
        meta: plain values of KEY.json.
        bucket: of the sample: of latents that say nothing, the size of an original that was not cropped.
    """
    whole = {"original_height": bucket.height, "original_width": bucket.width}
    return [float(meta.get(name, whole.get(name, 0))) for name in MICRO_CONDITIONS]


def write_empty_text(out_dir: str | Path, embedding: Tensor) -> None:
    """Writes the embedding of the empty caption beside the shards; called before `write_manifest`.

    Args:
        out_dir: folder of the latent shards.
        embedding: (l, d), without padding.
    Raises:
        UserError: if it cannot be written.
    """
    path = Path(out_dir) / EMPTY_TEXT
    data = safetensors.torch.save({"text": _checked_text(embedding, "the embedding of the empty caption")})
    try:
        path.write_bytes(data)
    except OSError as error:
        raise user_error(error, path) from error


def read_empty_text(out_dir: str | Path) -> Tensor:
    """(l, d) float16: what `write_empty_text` wrote.

    Raises:
        UserError: if it is missing or damaged.
    """
    path = Path(out_dir) / EMPTY_TEXT
    try:
        return safetensors.torch.load(path.read_bytes())["text"]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"{path} is missing or damaged ({error}): run videodit encode again") from error


def write_manifest(
    out_dir: str | Path,
    fingerprint: Mapping[str, Any],
    num_clips: int,
    source: str,
    vae: str,
    text_encoder: Mapping[str, Any] | None = None,
) -> None:
    """Declares a latent cache complete; called after the shards were closed.

    Args:
        out_dir: folder of the latent shards.
        fingerprint: all that the latents depend on: VAE weights' sha256, the clips' fingerprint, buckets, transform.
        num_clips: samples written.
        source: folder of the clips, for people.
        vae: folder of the VAE, which decodes what is trained on these latents.
        text_encoder: {"source", "max_length", "dim"} of the frozen encoder that made the embeddings; None without.
    Raises:
        UserError: if it cannot be written.
    """
    path = Path(out_dir) / MANIFEST
    part = path.with_name(f"{MANIFEST}.part")
    try:
        record = {"fingerprint": dict(fingerprint), "num_clips": num_clips, "source": source, "vae": vae}
        record["text_encoder"] = None if text_encoder is None else dict(text_encoder)
        record["sha256"] = _side_files(out_dir)
        with open(part, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=2, sort_keys=True)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise user_error(error, path) from error


def invalidate(out_dir: str | Path) -> None:
    """Takes back that the folder holds a whole set; called before a shard is written anew.

    Raises:
        UserError: if the folder cannot be written.
    """
    try:
        (Path(out_dir) / f"{INDEX}{PART}").write_bytes(b"")  # without an index, readers would scan the tars
        for name in (MANIFEST, EMPTY_TEXT, INDEX):
            (Path(out_dir) / name).unlink(missing_ok=True)
    except OSError as error:
        raise user_error(error, out_dir) from error


def read_manifest(out_dir: str | Path) -> dict[str, Any] | None:
    """What `write_manifest` wrote; None if it is missing or damaged."""
    try:
        record = json.loads((Path(out_dir) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def read_manifests(roots: Mapping[str, Path]) -> dict[str, Any] | None:
    """What `write_manifest` wrote of sets that are trained on together, as one: the first's, with all buckets.

    Args:
        roots: name of each set, for messages -> its folder.
    Returns:
        None if one is missing or damaged.
    Raises:
        UserError: if they were made by another VAE or text encoder.
    """
    manifests = {name: read_manifest(root) for name, root in roots.items()}
    found = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    if len(found) < len(roots):
        return None
    (first_name, first), *others = found.items()
    buckets = dict.fromkeys(first["fingerprint"]["buckets"])
    for name, manifest in others:
        buckets |= dict.fromkeys(manifest["fingerprint"]["buckets"])
        for part, what in (("vae", "VAE"), ("text_encoder", "text encoder")):
            if manifest["fingerprint"].get(part) != first["fingerprint"].get(part):
                raise UserError(
                    f"data.shards {name} was made by another {what} than {first_name}: run videodit encode again with "
                    "the same for both"
                )
    return {**first, "fingerprint": {**first["fingerprint"], "buckets": list(buckets)}}


def cache_is_valid(out_dir: str | Path, fingerprint: Mapping[str, Any]) -> bool:
    """Whether the folder declares complete latents of exactly this fingerprint, and its files are there in full.

    Bits of the shards are not looked at: `latent_parts.is_whole` does.

    Args:
        out_dir: folder of the latent shards; it may not exist.
        fingerprint: as given to `write_manifest`.
    """
    record = read_manifest(out_dir)
    # Through JSON, so that tuples and lists compare equal.
    if record is None or record.get("fingerprint") != json.loads(json.dumps(dict(fingerprint))):
        return False
    try:
        return record.get("sha256") == _side_files(out_dir) and len(ShardSet.open(out_dir)) == record.get("num_clips")
    except (UserError, OSError):
        return False


def _side_files(out_dir: str | Path) -> dict[str, str]:
    """Hashes of what lies beside the shards."""
    paths = [Path(out_dir) / INDEX, Path(out_dir) / EMPTY_TEXT]
    return {path.name: sha256_hex(path.read_bytes()) for path in paths if path.is_file()}


def _half(value: Tensor) -> Tensor:
    return value.detach().to("cpu", torch.float16).contiguous()


def _checked_text(embedding: Tensor, name: str) -> Tensor:
    """(l, d) in fp16; raises ValueError if it has no token or a value does not fit."""
    half = _half(embedding)
    if half.ndim != 2 or not half.shape[0]:
        raise ValueError(f"{name} has shape {tuple(half.shape)}: it must be (l, d) with at least one token")
    if not bool(torch.isfinite(half).all()):
        raise ValueError(f"{name} is not finite in fp16: the text encoder's weights are damaged")
    return half.clone()  # rows of one batch share their memory, which safetensors refuses
