"""The video VAE: a clip of 4k+1 frames becomes k+1 latent frames, 8x smaller in height and width.

Causal in time and without statistics over time, so that a clip can be encoded and decoded in chunks (`stream=True`).

Legend: b batch, c channels, t frames, h height, w width; latents (b, latent_channels, 1 + (t-1)/4, h/8, w/8).
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from videodit.models.causal_conv import (
    CausalConv3d,
    CausalDownsample,
    CausalUpsample,
    ChannelNorm,
    StreamCache,
    fold,
    unfold,
)
from videodit.models.folder import load_model, save_model
from videodit.models.vae_config import VAEConfig
from videodit.models.vae_layers import ConvBlock, Decoder, Encoder, PointwiseBlock

INITIAL_LOGVAR = -6.0
CHUNK = 1 << 14
"""Positions of latents that are decoded at once: two frames of 832x480 pixels, or a hundred small clips' frames."""


@dataclass
class Posterior:
    """The diagonal Gaussian that the encoder gives for a clip, in normalised latent units.

    Attributes:
        mean: (b, c, t, h, w).
        logvar: (b, c, t, h, w) log of the variance.
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """mean + std * noise, with standard normal noise of the mean's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * noise


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) summed over each clip's latents, (b, ...) -> (b,), in nats.

    Source: Kingma & Welling (2013), arXiv:1312.6114, Appendix B.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(dim=1)


class VideoVAE(nn.Module):
    """Causal video VAE with latent statistics: latents that leave it have zero mean and unit variance.

    Beside encoder and decoder runs a linear shortcut over blocks of 4x8x8 pixels, which `fit_shortcut` sets to the
    blocks' principal components: training starts at the best linear code, and encoder and decoder learn what a linear
    code cannot say. It is the residual autoencoding of DC-AE (arXiv:2410.10733) over the whole depth; what it gains is
    in docs/decisions.md.

    Args:
        config: its shape.
    """

    latent_mean: Tensor
    latent_std: Tensor
    code_analysis: Tensor
    code_synthesis: Tensor
    code_center: Tensor

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.block = (config.temporal_compression, config.spatial_compression, config.spatial_compression)
        block_channels = config.in_channels * math.prod(self.block)
        # The shortcut's linear code, fitted and then fixed: a gradient step would be larger than its smallest entries.
        self.register_buffer("code_analysis", torch.zeros(config.latent_channels, block_channels))
        self.register_buffer("code_synthesis", torch.zeros(block_channels, config.latent_channels))
        self.register_buffer("code_center", torch.zeros(block_channels))
        # Per-channel statistics of the raw latents, measured on the training clips after training.
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every initialisation of the VAE.

        Convolutions: normal with standard deviation 1/sqrt(fan_in), biases zero. The last convolution of each residual
        block is zero, so that a block starts as the identity; the convolutions beside a shortcut start at a tenth, so
        that the shortcut leads; the encoder's last starts at a tenth and the decoder's at zero, so that the first
        reconstruction is the shortcut's coarse picture. Norms: weight one, bias zero. The log-variance's bias is
        INITIAL_LOGVAR: with a unit-variance posterior the first steps would train on noise.
        """
        for module in self.modules():
            if isinstance(module, CausalConv3d):
                fan_in = module.weight.shape[1]
                nn.init.normal_(module.weight, std=1.0 / math.sqrt(fan_in))
                nn.init.zeros_(module.bias)
            elif isinstance(module, ChannelNorm):
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, (ConvBlock, PointwiseBlock)):
                nn.init.zeros_(module.project.weight)
            elif isinstance(module, (CausalDownsample, CausalUpsample)):
                module.conv.weight.mul_(0.1)
        nn.init.zeros_(self.decoder.conv_out.weight)
        self.encoder.conv_out.weight[: self.config.latent_channels].zero_()
        nn.init.constant_(self.encoder.conv_out.bias[self.config.latent_channels :], INITIAL_LOGVAR)

    @torch.no_grad()
    def fit_shortcut(self, clips: Tensor) -> None:
        """Sets the shortcut to the principal components of the clips' blocks: the best linear code there is.

        Part of the initialisation; call it once, before training. Its latents have zero mean and unit variance.

        Args:
            clips: (b, c, t, h, w) in [-1, 1], a few dozen.
        """

        def rows(clip: Tensor) -> Tensor:  # clip by clip: all blocks in float64 may be more than a machine has
            return rearrange(fold(clip[None], self.block), "1 c t h w -> (t h w) c").double()

        center = torch.stack([rows(clip).mean(dim=0) for clip in clips]).mean(dim=0)
        covariance = torch.zeros(len(center), len(center), dtype=center.dtype, device=center.device)
        for clip in clips:
            centred = rows(clip) - center
            covariance += centred.T @ centred / (len(centred) * len(clips))
        values, vectors = torch.linalg.eigh(covariance)  # ascending
        values, vectors = values[-self.config.latent_channels :], vectors[:, -self.config.latent_channels :]
        # The sign of an eigenvector is arbitrary: make it a function of the data, not of the LAPACK build.
        vectors = vectors * torch.where(vectors.sum(dim=0) < 0, -1.0, 1.0)
        std = values.clamp(min=1e-6).sqrt()
        self.code_analysis.copy_((vectors / std).T)
        self.code_synthesis.copy_(vectors * std)
        self.code_center.copy_(center)

    @torch.no_grad()
    def set_latent_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Sets how latents are normalised.

        Args:
            mean: (latent_channels,) of the raw latents.
            std: (latent_channels,) of the raw latents, positive.
        """
        # How far a channel at its usual distance from the mean moves the pixels, by the linear code.
        contrast = std * self.code_synthesis.norm(dim=0)
        weight = (contrast / contrast.median().clamp(min=1e-8)).clamp(max=self.config.latent_contrast_limit)
        weight = weight**self.config.latent_spectrum
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std / (weight / weight.square().mean().sqrt()))

    def _analyse(self, clip: Tensor, first_chunk: bool) -> Tensor:
        """The shortcut's latents of a clip."""
        blocks = rearrange(fold(clip, self.block, first_chunk), "b c t h w -> b t h w c")
        latents = F.linear(blocks - self.code_center.to(clip.dtype), self.code_analysis.to(clip.dtype))
        return rearrange(latents, "b t h w c -> b c t h w")

    def _synthesise(self, latents: Tensor, first_chunk: bool) -> Tensor:
        """The shortcut's clip of raw latents."""
        positions = rearrange(latents, "b c t h w -> b t h w c")
        blocks = F.linear(positions, self.code_synthesis.to(latents.dtype), self.code_center.to(latents.dtype))
        return unfold(rearrange(blocks, "b t h w c -> b c t h w"), self.block, first_chunk)

    @property
    def _weight_dtype(self) -> torch.dtype:
        return self.encoder.conv_in.weight.dtype

    def _statistics(self) -> tuple[Tensor, Tensor]:
        return self.latent_mean.view(1, -1, 1, 1, 1), self.latent_std.view(1, -1, 1, 1, 1)

    def posterior(self, clip: Tensor, cache: StreamCache | None = None) -> Posterior:
        """Encodes (b, c, t, h, w) in [-1, 1] into a Posterior over normalised latents."""
        # The linear code and the statistics are float32 whatever the weights are: 8 bits of bf16 would band flat areas.
        exact = clip.to(torch.promote_types(clip.dtype, torch.float32))
        mean, logvar = self.encoder(clip.to(self._weight_dtype), cache).to(exact.dtype).chunk(2, dim=1)
        mean = mean + self._analyse(exact, cache is None or cache.first_chunk)
        shift, scale = self._statistics()
        return Posterior((mean - shift) / scale, logvar.clamp(-20.0, 10.0) - 2.0 * torch.log(scale))

    def encode(self, clip: Tensor) -> Tensor:
        """The posterior mean, normalised.

        Args:
            clip: (b, c, t, h, w) in [-1, 1], with t = 4k+1 and h, w multiples of 8 (for a 4x8x8 VAE).
        Returns:
            (b, latent_channels, k+1, h/8, w/8).
        Raises:
            ValueError: if the size does not fit; names the nearest that does.
        """
        self.config.latent_shape(*clip.shape[2:])
        return self.posterior(clip).mean

    def decode(self, latents: Tensor, cache: StreamCache | None = None) -> Tensor:
        """(b, latent_channels, k+1, h, w) normalised latents -> (b, c, 4k+1, 8h, 8w), about [-1, 1] (not clamped)."""
        shift, scale = self._statistics()
        raw = latents * scale + shift
        coarse = self._synthesise(raw, cache is None or cache.first_chunk)
        return coarse + self.decoder(raw.to(self._weight_dtype), cache).to(coarse.dtype)

    def decode_stream(self, latents: Tensor, positions: int = CHUNK) -> Tensor:
        """As `decode`, a few latent frames at a time: the same result with the memory of one chunk's activations.

        Args:
            latents: as for `decode`.
            positions: of latents that are decoded at once, over all rows of the batch; a frame at least.
        """
        b, _, t, h, w = latents.shape
        frames = max(1, positions // (b * h * w))
        if frames >= t:
            return self.decode(latents)
        cache = StreamCache()
        chunks = []
        for part in latents.split(frames, dim=2):
            chunks.append(self.decode(part, cache))
            cache.first_chunk = False
        return torch.cat(chunks, dim=2)

    def encode_stream(self, clip: Tensor) -> Tensor:
        """As `encode`, in chunks of 1, 4, 4, ... frames."""
        self.config.latent_shape(*clip.shape[2:])
        cache = StreamCache()
        chunks = []
        step = self.config.temporal_compression
        for chunk in clip.tensor_split(tuple(range(1, clip.shape[2], step)), dim=2):
            chunks.append(self.posterior(chunk, cache).mean)
            cache.first_chunk = False
        return torch.cat(chunks, dim=2)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        save_model(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VideoVAE":
        """Loads what `save_pretrained` wrote, in evaluation mode.

        Raises:
            UserError: if the folder or its weights are missing, damaged or do not fit the config.
        """
        return load_model(cls, VAEConfig, folder)
