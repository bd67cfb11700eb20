"""What is trained, as a plan sees it: how to build it without memory, and one pass of a micro batch of each bucket.

Legend: b clips, c t h w latent channels, frames, rows and columns, l text tokens.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from videodit.data.buckets import Bucket, parse_bucket
from videodit.data.latents import read_manifests
from videodit.errors import UserError
from videodit.models.checkpointing import POLICIES
from videodit.models.dit import VideoDiT
from videodit.models.lora import add_lora
from videodit.models.micro_conditioning import MICRO_CONDITIONS
from videodit.models.text import MAX_WORD_BYTES, ByteTextEncoder, TextFeatures, word_grams
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.text_transformers import MAX_LENGTH, empty_encoder, readable_length
from videodit.models.vae import VAEConfig, VideoVAE
from videodit.models.vae_folder import VideoAutoencoderConfig, load_vae
from videodit.planning.footprint import ParameterCount, activation_bytes, count_parameters, step_flops
from videodit.training.dit_config import DiTRunConfig, latent_folders
from videodit.training.vae_config import VAERunConfig
from videodit.training.vae_objective import VAEObjective


@dataclass(frozen=True)
class StepShape:
    """What a part of a bucket's steps trains on.

    Attributes:
        name: for people.
        share: of the bucket's steps.
        tokens: of a clip.
        latents: (c, t, h, w) of a clip.
    """

    name: str
    share: float
    tokens: int
    latents: tuple[int, int, int, int]


class Workload(Protocol):
    """A model in training."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Clip shapes."""

    @property
    def policies(self) -> Sequence[str]:
        """Of checkpointing, from the most memory to the least."""

    def parameters(self) -> ParameterCount:
        """Trainable ones."""

    def tokens(self, bucket: Bucket) -> int:
        """Of a clip."""

    def steps(self, bucket: Bucket) -> list[StepShape]:
        """What the bucket's steps train on: whole clips, and before them windows if there are any."""

    def flops(self, bucket: Bucket, policy: str) -> int:
        """Of a forward and backward pass of one clip, with what the policy computes again."""

    def step_flops(self, bucket: Bucket, step: StepShape, policy: str) -> int:
        """The same of what a part of the steps trains on."""

    def activation_bytes(self, bucket: Bucket, policy: str, dtype: torch.dtype, *, on_cpu: bool) -> int:
        """Most that such a pass holds at once."""


class DiTWorkload:
    """The DiT, and the byte-level text encoder that is trained with it; a frozen one has no part in a step.

    Args:
        config: of the run.
        buckets: clip shapes; if empty those of the latents, else that of the samples.
        text_tokens: of a caption; 0 for as many as the text encoder reads.
    Raises:
        UserError: if VAE or patch does not divide a bucket.
    """

    policies: Sequence[str] = POLICIES

    def __init__(self, config: DiTRunConfig, buckets: Sequence[str] = (), text_tokens: int = 0) -> None:
        self.config = config
        frozen = config.text_max_length or MAX_LENGTH  # as the latents say, if they are there
        self.text_tokens = text_tokens or (frozen if config.text_encoder else config.text.max_words)
        self._shapes = dict(_latent_shapes(config, buckets))
        self.buckets: Sequence[Bucket] = list(self._shapes)

    def parameters(self) -> ParameterCount:
        with torch.device("meta"):
            return count_parameters(self._build("none"))

    def tokens(self, bucket: Bucket) -> int:
        pt, ph, pw = self.config.model.patch_size
        _, t, h, w = self._shapes[bucket]
        return (t // pt) * (h // ph) * (w // pw)

    def flops(self, bucket: Bucket, policy: str) -> int:
        return self.shape_flops(self._shapes[bucket], policy)

    def steps(self, bucket: Bucket) -> list[StepShape]:
        (c, t, h, w), crop = self._shapes[bucket], self.config.crop
        pt, ph, pw = self.config.model.patch_size
        window, share = crop.size_in(h, w), self.config.crop_steps / self.config.max_steps
        if window == (h, w):
            share = 0.0
        sizes = (
            ((h, w), bucket.name, 1 - share),
            (window, f"{bucket.name}, {window[0]}x{window[1]} of latents", share),
        )
        return [
            StepShape(name, part, (t // pt) * (rows // ph) * (columns // pw), (c, t, rows, columns))
            for (rows, columns), name, part in sizes
            if part > 0
        ]

    def step_flops(self, bucket: Bucket, step: StepShape, policy: str) -> int:
        return self.shape_flops(step.latents, policy)

    def shape_flops(self, shape: tuple[int, int, int, int], policy: str) -> int:
        """Of a forward and backward pass of one clip with latents of shape (c, t, h, w), such as a window."""
        return step_flops(lambda: self._build(policy), self._pass(shape))

    def activation_bytes(self, bucket: Bucket, policy: str, dtype: torch.dtype, *, on_cpu: bool) -> int:
        run = self._pass(self._shapes[bucket])
        return activation_bytes(lambda: self._build(policy), run, dtype, on_cpu=on_cpu)

    def caption_flops(self) -> int:
        """Of a frozen text encoder's pass over one caption; 0 if there is none, or its folder is not here.

        Raises:
            UserError: if the folder is no encoder that we know.
        """
        source = self.config.text_encoder
        if not source or not Path(source).exists():
            return 0
        return step_flops(lambda: empty_encoder(source), partial(_read_caption, tokens=self.text_tokens))

    def _build(self, policy: str) -> nn.Module:
        config, text = self.config, None
        shape = config.model
        if not config.text_encoder:
            text = ByteTextEncoder(config.text)
            shape = replace(shape, text_dim=text.dim)  # as in a run, whose latents may not be there yet
        model = TextToVideoModel(VideoDiT(shape), text)
        model.dit.checkpointing = policy
        if config.lora.rank:
            model.requires_grad_(False)
            add_lora(model.dit.blocks, config.lora)
        return model

    def _pass(self, shape: tuple[int, int, int, int]) -> Callable[[nn.Module], None]:
        return partial(dit_pass, shape=(1, *shape), text_tokens=self.text_tokens)


def dit_pass(model: nn.Module, shape: tuple[int, int, int, int, int], text_tokens: int) -> None:
    """Forward and backward of zeros: latents (b, c, t, h, w), a level per frame, l text tokens a clip."""
    assert isinstance(model, TextToVideoModel)
    weight = model.dit.patch_out.weight
    like: dict[str, Any] = {"dtype": weight.dtype, "device": weight.device}
    mask = torch.ones(shape[0], text_tokens, dtype=torch.bool, device=weight.device)
    if model.text_encoder is None:
        embeddings = torch.zeros(shape[0], text_tokens, model.dit.config.text_dim, **like)
    else:  # all words different and as long as they get
        words, grams = shape[0] * text_tokens, len(word_grams(bytes(range(MAX_WORD_BYTES))))
        index = torch.arange(words, device=weight.device).view(shape[0], text_tokens)
        embeddings = model.text_encoder(index.new_ones(words, grams), index, mask)
    conditions = torch.zeros(shape[0], len(MICRO_CONDITIONS), device=weight.device)
    latents, sigma = torch.zeros(shape, **like), torch.zeros(shape[0], shape[2], device=weight.device)
    out = model(latents, sigma, TextFeatures(embeddings, mask), micro_conditions=conditions)
    out.float().square().mean().backward()


def _read_caption(encoder: nn.Module, tokens: int) -> None:
    ids = torch.zeros(1, readable_length(encoder, tokens), dtype=torch.long)
    encoder(input_ids=ids, attention_mask=torch.ones_like(ids))


class VAEWorkload:
    """The video VAE with its loss.

    Args:
        config: of the run.
        buckets: clip shapes; those of the config if empty.
    Raises:
        UserError: if the VAE does not divide a bucket.
    """

    policies: Sequence[str] = ("none",)

    def __init__(self, config: VAERunConfig, buckets: Sequence[str] = ()) -> None:
        self.config = config
        try:
            multiple = config.model.spatial_compression
            self.buckets: Sequence[Bucket] = [parse_bucket(n, multiple) for n in buckets or config.data.buckets]
        except ValueError as error:
            raise UserError(str(error)) from None

    def parameters(self) -> ParameterCount:
        with torch.device("meta"):
            return count_parameters(VideoVAE(self.config.model))

    def tokens(self, bucket: Bucket) -> int:
        _, t, h, w = self.config.model.latent_shape(*bucket)
        return t * h * w

    def steps(self, bucket: Bucket) -> list[StepShape]:
        shape = self.config.model.latent_shape(*bucket)
        return [StepShape(bucket.name, 1.0, self.tokens(bucket), shape)]

    def flops(self, bucket: Bucket, policy: str) -> int:
        return step_flops(self._build, self._pass(bucket))

    def step_flops(self, bucket: Bucket, step: StepShape, policy: str) -> int:
        return self.flops(bucket, policy)

    def activation_bytes(self, bucket: Bucket, policy: str, dtype: torch.dtype, *, on_cpu: bool) -> int:
        return activation_bytes(self._build, self._pass(bucket), dtype, on_cpu=on_cpu)

    def _build(self) -> nn.Module:
        return VAEObjective(VideoVAE(self.config.model), self.config.loss)

    def _pass(self, bucket: Bucket) -> Callable[[nn.Module], None]:
        config = self.config.model
        return partial(_vae_pass, shape=(1, config.in_channels, *bucket), config=config)


def _vae_pass(model: nn.Module, shape: tuple[int, int, int, int, int], config: VAEConfig) -> None:
    device = next(model.parameters()).device
    noise = torch.zeros(shape[0], *config.latent_shape(*shape[2:]), device=device)
    loss, _ = model(torch.zeros(shape, device=device), noise)
    loss.mean().backward()


def _latent_shapes(config: DiTRunConfig, names: Sequence[str]) -> Iterator[tuple[Bucket, tuple[int, int, int, int]]]:
    """(bucket, (c, t, h, w)) of every clip shape."""
    vae: VideoAutoencoderConfig = load_vae(config.vae).config if config.vae else VAEConfig()
    manifest = read_manifests(latent_folders(config))
    if not names and manifest is not None:
        names = list(manifest["fingerprint"]["buckets"])
    sampling = config.sampling
    for name in names or [f"{sampling.num_frames}x{sampling.height}x{sampling.width}"]:
        try:
            bucket = parse_bucket(name, multiple=1)
            _, t, h, w = vae.latent_shape(*bucket)
        except ValueError as error:
            raise UserError(f"buckets {name}: {error}") from None
        for axis, size, patch in zip(("frames", "height", "width"), (t, h, w), config.model.patch_size):
            if size % patch:
                raise UserError(
                    f"buckets {name}: {size} latents of {axis} are not divided by the {patch} of model.patch_size: "
                    f"the nearest has {max(round(size / patch), 1) * patch}"
                )
        yield bucket, (config.model.in_channels, t, h, w)
