"""Encoder and decoder of the video VAE, and the blocks that they are made of.

Legend: b batch, c channels, t frames, h rows, w columns.
"""

import math

import torch
import torch.nn.functional as F
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
from videodit.models.vae_config import VAEConfig


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
