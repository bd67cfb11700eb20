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
from videodit.models.latent_shape import latent_shape

INITIAL_LOGVAR = -6.0


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the video VAE."""

    in_channels: int = 3
    """channels of a frame; 3 is RGB; follows the clips"""
    latent_channels: int = 16
    """channels of a latent frame"""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """frames, rows and columns folded into channels before the first convolution; the first frame is alone in time"""
    channels: tuple[int, ...] = (96, 192, 384)
    """width of each level, from the pixels to the latents"""
    downsample: tuple[str, ...] = ("st", "st")
    """what is halved between two levels: s space, t time, st both"""
    encoder_blocks: tuple[str, ...] = ("cc", "cc", "cc")
    """residual blocks at each level of the encoder, a letter each: c convolution over space and time, p pointwise"""
    decoder_blocks: tuple[str, ...] = ("ccc", "ccc", "ccc")
    """residual blocks at each level of the decoder, in the levels' order (the last level comes first)"""
    latent_spectrum: float = 0.0
    """spread of the normalised channels: 0 gives each unit variance, 1 as much as it moves the pixels (within
    latent_contrast_limit), 0.5 the root of that; the mean square over all channels is 1"""
    latent_contrast_limit: float = 6.0
    """most that a channel counts in units of the median one: the blocks' mean brightness alone would else have nearly
    all of the variance (31 of 32 parts in the shapes world), and bf16 would round the rest away"""
    channel_mean: tuple[float, ...] | None = None
    """of fields (clips that are no video), each channel's mean in their units; follows the clips"""
    channel_std: tuple[float, ...] | None = None
    """of fields, each channel's standard deviation; the VAE sees (value - mean) / (3 std)"""

    def __post_init__(self) -> None:
        levels = len(self.channels)
        if len(self.downsample) != levels - 1:
            raise ValueError(
                f"model.downsample has {len(self.downsample)} entries for {levels} levels: give {levels - 1}"
            )
        for name in ("encoder_blocks", "decoder_blocks"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"model.{name} {list(getattr(self, name))} does not fit {levels} levels: give {levels} strings"
                )
            if set("".join(getattr(self, name))) - set("cp"):
                raise ValueError(f"model.{name} {list(getattr(self, name))} has letters other than c and p")
        if self.patch_size[1] != self.patch_size[2]:
            raise ValueError(
                f"model.patch_size {list(self.patch_size)} is not square in space: use equal rows and columns"
            )
        if not 0 <= self.latent_spectrum <= 1:
            raise ValueError(f"model.latent_spectrum {self.latent_spectrum} is not in [0, 1]: use 0, 0.5 or 1")
        if self.latent_contrast_limit < 1:
            raise ValueError(f"model.latent_contrast_limit {self.latent_contrast_limit} is below 1: use for example 6")
        for name in ("channel_mean", "channel_std"):
            if (values := getattr(self, name)) is not None and len(values) != self.in_channels:
                raise ValueError(
                    f"model.{name} has {len(values)} entries for {self.in_channels} channels: leave it out"
                )
        for entry in self.downsample:
            if entry not in ("s", "t", "st"):
                raise ValueError(f"model.downsample entry {entry!r} is not one of s, t, st")

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent position, along height and along width."""
        return self.patch_size[1] * 2 ** sum("s" in entry for entry in self.downsample)

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, after the first."""
        return self.patch_size[0] * 2 ** sum("t" in entry for entry in self.downsample)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(c, t, h, w) of the latents of a clip.

        Raises:
            ValueError: if the clip's size does not fit; names the nearest that does.
        """
        shape = (self.latent_channels, self.temporal_compression, self.spatial_compression)
        return latent_shape(*shape, num_frames, height, width)


class ConvBlock(nn.Module):
    """norm, 1x3x3 convolution, SiLU, causal 3x1x1 convolution, added to the input.

    The factorized pair has 12 instead of 27 weights per channel pair. Source: Tran et al. (2018), R(2+1)D,
    arXiv:1711.11248; one norm and one activation a block as in Liu et al. (2022), ConvNeXt, arXiv:2201.03545.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.expand = CausalConv3d(channels, channels, (1, 3, 3))
        self.project = CausalConv3d(channels, channels, (3, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        return x + self.project(F.silu(self.expand(self.norm(x))), cache)


class PointwiseBlock(nn.Module):
    """norm, linear to twice the channels, SiLU, linear back, added to the input.

    Each position by itself, nothing but matrix products.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.expand = CausalConv3d(channels, 4 * channels, (1, 1, 1))
        self.project = CausalConv3d(2 * channels, channels, (1, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        gate, value = self.expand(self.norm(x)).chunk(2, dim=1)
        return x + self.project(F.silu(gate) * value)


def _block(letter: str, channels: int) -> nn.Module:
    return ConvBlock(channels) if letter == "c" else PointwiseBlock(channels)


def _factor(entry: str) -> tuple[int, int, int]:
    space = 2 if "s" in entry else 1
    return (2 if "t" in entry else 1, space, space)


class Encoder(nn.Module):
    """(b, c, t, h, w) pixels -> (b, 2 * latent_channels, t', h', w') mean and log-variance."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.conv_in = CausalConv3d(config.in_channels * math.prod(self.patch), config.channels[0], (1, 1, 1))
        layers: list[nn.Module] = []
        for level, width in enumerate(config.channels):
            layers += [_block(letter, width) for letter in config.encoder_blocks[level]]
            if level < len(config.downsample):
                layers.append(CausalDownsample(width, config.channels[level + 1], _factor(config.downsample[level])))
        self.layers = nn.ModuleList(layers)
        self.norm_out = ChannelNorm(config.channels[-1])
        self.conv_out = CausalConv3d(config.channels[-1], 2 * config.latent_channels, (3, 3, 3))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        x = fold(x, self.patch, cache is None or cache.first_chunk)
        x = self.conv_in(x.contiguous(memory_format=torch.channels_last_3d))
        for layer in self.layers:
            x = layer(x, cache)
        return self.conv_out(F.silu(self.norm_out(x)), cache)


class Decoder(nn.Module):
    """(b, latent_channels, t', h', w') -> (b, c, t, h, w) pixels."""

    def __init__(self, config: VAEConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.conv_in = CausalConv3d(config.latent_channels, config.channels[-1], (3, 3, 3))
        layers: list[nn.Module] = []
        for level in reversed(range(len(config.channels))):
            width = config.channels[level]
            layers += [_block(letter, width) for letter in config.decoder_blocks[level]]
            if level > 0:
                layers.append(CausalUpsample(width, config.channels[level - 1], _factor(config.downsample[level - 1])))
        self.layers = nn.ModuleList(layers)
        self.norm_out = ChannelNorm(config.channels[0])
        self.conv_out = CausalConv3d(config.channels[0], config.in_channels * math.prod(self.patch), (1, 1, 1))

    def forward(self, z: Tensor, cache: StreamCache | None = None) -> Tensor:
        x = self.conv_in(z.contiguous(memory_format=torch.channels_last_3d), cache)
        for layer in self.layers:
            x = layer(x, cache)
        return unfold(self.conv_out(F.silu(self.norm_out(x))), self.patch, cache is None or cache.first_chunk)


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
        blocks = rearrange(fold(clips, self.block), "b c t h w -> (b t h w) c").double()
        center = blocks.mean(dim=0)
        covariance = (blocks - center).T @ (blocks - center) / len(blocks)
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

    def decode_stream(self, latents: Tensor) -> Tensor:
        """As `decode`, one latent frame at a time: the same result with the memory of one chunk's activations."""
        cache = StreamCache()
        chunks = []
        for frame in latents.split(1, dim=2):
            chunks.append(self.decode(frame, cache))
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
