"""Reading latents and their captions' embeddings, from memory where all of them fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from videodit.data.batches import Request, Rows, choose_caption
from videodit.data.buckets import Bucket, parse_bucket
from videodit.data.captions import Captions
from videodit.data.columns import NONE
from videodit.data.latent_crop import LatentCropConfig, crop, draw_windows, window_weights
from videodit.data.latents import (
    LatentSample,
    micro_conditions,
    read_empty_text,
    read_latent_sample,
    read_manifest,
)
from videodit.data.mixture import ShardsConfig
from videodit.data.order import PADDING
from videodit.data.randomness import sample_uniform
from videodit.data.shards import ReplacedShard, ShardSet
from videodit.errors import UserError
from videodit.models.micro_conditioning import MICRO_CONDITIONS


@dataclass(frozen=True)
class LatentDataConfig(ShardsConfig):
    """Latents, as DiT training reads them."""

    shards: str | list[str] = ""
    """Folder of latent shards, as `videodit encode` writes them, or a list of folders."""
    caption_drop: float = 0.1
    """Share of samples that train without their caption, for classifier-free guidance."""
    num_workers: int = 0
    """Processes that read ahead, per rank; not used where all latents fit in memory."""
    cache_gib: float = 2.0
    """Latents are kept in memory where all of them fit in this many GiB per rank."""

    def __post_init__(self) -> None:
        if not 0 <= self.caption_drop <= 1:
            raise ValueError(f"data.caption_drop {self.caption_drop} must be in [0, 1]")
        super().__post_init__()


class LatentReader:
    """Reads micro batches of posteriors or their means and, where a frozen text encoder made them, of embeddings.

    Args:
        shards: latent shards.
        config: caption drop and memory.
        seed: the run's seed.
        window: what requests may ask for instead of whole latents.
        patch: rows and columns of the DiT's patch: windows start on its grid.
        posterior: whether to read the log-variances beside the means.
    Raises:
        UserError: if the shards hold no latents, or should have embeddings and lack that of the empty caption.
    """

    def __init__(
        self,
        shards: ShardSet,
        config: LatentDataConfig,
        seed: int,
        window: LatentCropConfig,
        patch: tuple[int, int],
        *,
        posterior: bool = True,
    ) -> None:
        self._parts = ("mean", "logvar") if posterior else ("mean",)
        self.shards, self.config, self.seed = shards, config, seed
        self.window, self.patch = window, patch
        self._weights: dict[int, Tensor] = {}  # of each clip's windows, which are the same in every epoch
        columns = shards.columns
        sizes = columns.sizes.get("safetensors", np.array([NONE]))
        root = shards.sets[0].root  # the others were made alike: `follow_latents` holds it
        has_text = bool((read_manifest(root) or {}).get("text_encoder"))
        self.empty_text = read_empty_text(root) if has_text else None
        self.in_memory = int(sizes.sum()) <= config.cache_gib * 2**30
        self._kept: dict[int, tuple[LatentSample, Captions]] = {}
        self.members: dict[Bucket, np.ndarray] = {}
        try:
            for name, column in (("safetensors", sizes), ("bucket", columns.buckets)):
                if (column == NONE).any():
                    raise KeyError(name)
            buckets = [parse_bucket(name, multiple=1) for name in columns.bucket_names]
            for bucket in dict.fromkeys(buckets):
                numbers = [number for number, other in enumerate(buckets) if other == bucket]
                self.members[bucket] = np.flatnonzero(np.isin(columns.buckets, numbers))
            # From the json, not from a tensor: a micro batch may be all padding, and the first sample may be damaged.
            self.latent_shapes = {
                bucket: tuple(int(size) for size in shards.read_json(int(indices[0]))["latent_shape"])
                for bucket, indices in self.members.items()
            }
        except (KeyError, ValueError) as error:
            raise UserError(
                f"{shards.name} does not hold latents ({error}): make them with 'videodit encode' and give that folder"
            ) from error

    def __getitem__(self, request: Request) -> Rows:
        shape = self.latent_shapes[request.bucket]
        height, width = shape[2:]
        size = self.window.size_in(height, width) if request.windowed else (height, width)
        parts = {name: torch.empty(len(request.ids), *shape[:2], *size) for name in self._parts}
        rows = Rows(request, dict(parts), [""] * len(request.ids))
        samples = self._samples(rows)
        missing = [row for row in range(len(request.ids)) if row not in samples]
        for values in parts.values():
            values[missing] = 0
        conditions = [[0.0] * len(MICRO_CONDITIONS) for _ in request.ids]
        for row in samples:
            conditions[row] = micro_conditions(self.shards.entries[request.ids[row]].meta, request.bucket)
        rows.tensors["micro_conditions"] = torch.tensor(conditions)
        if request.windowed:
            rows.tensors["origin"] = torch.zeros(len(request.ids), 2, dtype=torch.int64)
            self._read_windows(rows, samples, size)
        else:
            for row, (sample, _) in samples.items():
                for name, values in parts.items():
                    values[row] = getattr(sample, name)
        text = [] if self.empty_text is None else [self.empty_text] * len(request.ids)
        for row, (sample, captions) in samples.items():
            key = self.shards.entries[request.ids[row]].key
            number = choose_caption(captions, self.seed, request.epochs[row], key, self.config.caption_drop)
            if number is not None:
                rows.captions[row] = captions.texts[number]
                if text:
                    text[row] = sample.text[number]
        if text:
            rows.tensors["text"], rows.tensors["text_mask"] = _pad(text)
        return rows

    def _samples(self, rows: Rows) -> dict[int, tuple[LatentSample, Captions]]:
        """By row; what cannot be read is put into the rows' failures."""
        shape, samples = self.latent_shapes[rows.request.bucket], {}
        for row, index in enumerate(rows.request.ids):
            if index == PADDING:
                continue
            try:
                samples[row] = self._sample(index, shape)
            except (UserError, OSError, ValueError) as error:
                rows.failures[row] = str(error)
                rows.fatal = str(error) if isinstance(error, ReplacedShard) else rows.fatal
        return samples

    def _read_windows(
        self, rows: Rows, samples: Mapping[int, tuple[LatentSample, Captions]], size: tuple[int, int]
    ) -> None:
        """Each sample's window into its row; where it lies is a function of (seed, epoch, key)."""
        if not samples:
            return
        request, places = rows.request, list(samples)
        keys = [self.shards.entries[request.ids[row]].key for row in places]
        epochs = [request.epochs[row] for row in places]
        uniform = sample_uniform(self.seed, epochs, keys, "latent crop")
        weights = [self._window_weights(request.ids[row], sample, size) for row, (sample, _) in samples.items()]
        origin = draw_windows(torch.cat(weights), self.patch, uniform)
        rows.tensors["origin"][places] = origin
        height, width = self.latent_shapes[request.bucket][2:]
        pixels = torch.tensor([request.bucket.height / height, request.bucket.width / width])  # of a latent
        crop_corner = slice(MICRO_CONDITIONS.index("crop_top"), MICRO_CONDITIONS.index("crop_left") + 1)
        rows.tensors["micro_conditions"][places, crop_corner] += origin * pixels
        for name in self._parts:
            whole = torch.stack([getattr(sample, name) for sample, _ in samples.values()])
            rows.tensors[name][places] = crop(whole, origin, size).float()

    def _window_weights(self, index: int, sample: LatentSample, size: tuple[int, int]) -> Tensor:
        weights = self._weights.get(index)
        if weights is None:
            weights = window_weights(sample.mean[None].float(), size, self.patch, self.window.contrast_power)
            if self.in_memory:
                self._weights[index] = weights
        return weights

    def _check_text(self, sample: LatentSample, captions: list[str]) -> None:
        if self.empty_text is None:
            return
        if len(sample.text) != len(captions):
            raise ValueError(f"{len(sample.text)} embeddings for {len(captions)} captions")
        if any(text.ndim != 2 or text.shape[1] != self.empty_text.shape[1] for text in sample.text):
            raise ValueError(f"embeddings of other channels than the {self.empty_text.shape[1]} of the empty caption")

    def _sample(self, index: int, shape: tuple[int, ...]) -> tuple[LatentSample, Captions]:
        kept = self._kept.get(index)
        if kept is None:
            sample, captions = kept = read_latent_sample(self.shards, index), self.shards.weighted_captions(index)
            if sample.mean.shape != shape or sample.logvar.shape != shape:
                raise ValueError(f"latents of shape {tuple(sample.mean.shape)} among latents of shape {shape}")
            self._check_text(sample, captions.texts)
            if self.in_memory:
                if "logvar" not in self._parts:
                    sample.logvar = sample.logvar[:0].clone()  # half of the memory
                self._kept[index] = kept
        return kept


def _pad(text: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Embeddings (l, d) of different lengths -> (b, l, d), zero behind each, and their mask (b, l)."""
    lengths = torch.tensor([len(embedding) for embedding in text])
    padded = pad_sequence(list(text), batch_first=True)
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
