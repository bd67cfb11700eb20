"""Causal 3D convolution and causal resampling: frame i of the output never looks past frame i of the input.

Nothing here has statistics over time, so a clip can be processed in chunks: a `StreamCache` holds what each layer must
remember.

Legend: b batch, c channels, t frames, h height, w width.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class StreamCache:
    """What the layers remember between the chunks of one clip: the last input frames of each convolution."""

    def __init__(self) -> None:
        self.frames: dict[nn.Module, Tensor] = {}
        self.first_chunk = True


class CausalConv3d(nn.Module):
    """3D convolution with 'same' size: zeros around in space, zeros in front (never behind) in time.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        kernel: odd sizes over (t, h, w).
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int] = (3, 3, 3)) -> None:
        super().__init__()
        self.kernel = kernel
        # A matrix, so that Muon can take it: one row an output channel.
        self.weight = nn.Parameter(torch.zeros(out_channels, in_channels * kernel[0] * kernel[1] * kernel[2]))
        self.bias = nn.Parameter(torch.zeros(out_channels))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        """(b, c, t, h, w) -> (b, out_channels, t, h, w).

        A kernel without extent over time is a 2D convolution of the frames, one without extent over space a matrix
        product of shifted frames: on channels-last tensors both are several times faster than the general 3D
        convolution on CPUs (docs/decisions.md).
        """
        kt, kh, kw = self.kernel
        weight = rearrange(self.weight, "o (i kt kh kw) -> o i kt kh kw", kt=kt, kh=kh, kw=kw)
        if kt > 1:
            if cache is None or cache.first_chunk:
                x = F.pad(x, (0, 0, 0, 0, kt - 1, 0))
            else:
                x = torch.cat([cache.frames[self], x], dim=2)
            if cache is not None:
                cache.frames[self] = x[:, :, -(kt - 1) :].clone()  # a view would keep all of x
        if kt == 1 and kh > 1:
            frames = rearrange(x, "b c t h w -> (b t) c h w")
            frames = F.conv2d(frames, weight[:, :, 0], self.bias, padding=(kh // 2, kw // 2))
            return rearrange(frames, "(b t) c h w -> b c t h w", b=x.shape[0])
        if kh == kw == 1:
            positions = rearrange(x, "b c t h w -> b t h w c")
            num_frames = x.shape[2] - kt + 1
            if kt > 1:
                positions = torch.cat([positions[:, i : i + num_frames] for i in range(kt)], dim=-1)
            matrix = rearrange(weight, "o i kt 1 1 -> o (kt i)")
            return rearrange(F.linear(positions, matrix, self.bias), "b t h w c -> b c t h w")
        return F.conv3d(x, weight, self.bias, padding=(0, kh // 2, kw // 2))


class ChannelNorm(nn.Module):
    """Layer norm over the channels of each position: no statistics over time or space.

    Chosen over RMS norm because torch has one fused CPU kernel for it (docs/decisions.md).
    Source: Ba et al. (2016), arXiv:1607.06450.
    """

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, t, h, w) -> the same shape."""
        channels_last = x.permute(0, 2, 3, 4, 1)
        return F.layer_norm(channels_last, self.weight.shape, self.weight, self.bias, self.eps).permute(0, 4, 1, 2, 3)


def fold(x: Tensor, factor: tuple[int, int, int], first_chunk: bool = True) -> Tensor:
    """Moves (t, h, w) blocks of `factor` into channels; time is causal: ft * k + 1 frames become k + 1.

    The first frame of a clip is a block of its own (it is repeated in front).

    Args:
        x: (b, c, t, h, w).
        factor: block size (ft, fh, fw).
        first_chunk: whether x begins the clip.
    Returns:
        (b, c * prod(factor), t', h / factor, w / factor).
    """
    ft, fh, fw = factor
    if ft > 1 and first_chunk:
        x = torch.cat([x[:, :, :1].expand(-1, -1, ft - 1, -1, -1), x], dim=2)
    return rearrange(x, "b c (t ft) (h fh) (w fw) -> b (c ft fh fw) t h w", ft=ft, fh=fh, fw=fw)


def unfold(x: Tensor, factor: tuple[int, int, int], first_chunk: bool = True) -> Tensor:
    """The inverse of `fold`: (b, c * prod(factor), t', h, w) -> (b, c, t, h * factor, w * factor)."""
    ft, fh, fw = factor
    x = rearrange(x, "b (c ft fh fw) t h w -> b c (t ft) (h fh) (w fw)", ft=ft, fh=fh, fw=fw)
    return x[:, :, ft - 1 :] if first_chunk else x


class CausalDownsample(nn.Module):
    """Halves time and/or space: fold into channels, then a 1x1x1 convolution beside a channel-averaging shortcut.

    Source: Chen et al. (2024), DC-AE, arXiv:2410.10733, Sec. 3.2 (residual autoencoding), here causal in time.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        folded = in_channels * factor[0] * factor[1] * factor[2]
        if folded % out_channels:
            raise ValueError(
                f"cannot average {folded} folded channels into {out_channels}: choose a divisor of {folded}"
            )
        self.group = folded // out_channels
        self.conv = CausalConv3d(folded, out_channels, (1, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        x = fold(x, self.factor, cache is None or cache.first_chunk)
        return self.conv(x) + rearrange(x, "b (c g) t h w -> b c g t h w", g=self.group).mean(dim=2)


class CausalUpsample(nn.Module):
    """Doubles time and/or space: a 1x1x1 convolution beside a channel-repeating shortcut, then unfolded into positions.

    Source: as `CausalDownsample`.
    """

    def __init__(self, in_channels: int, out_channels: int, factor: tuple[int, int, int]) -> None:
        super().__init__()
        self.factor = factor
        folded = out_channels * factor[0] * factor[1] * factor[2]
        if folded % in_channels:
            raise ValueError(f"cannot repeat {in_channels} channels into {folded}: choose a multiple of {in_channels}")
        self.repeats = folded // in_channels
        self.conv = CausalConv3d(in_channels, folded, (1, 1, 1))

    def forward(self, x: Tensor, cache: StreamCache | None = None) -> Tensor:
        x = self.conv(x) + x.repeat_interleave(self.repeats, dim=1)
        return unfold(x, self.factor, cache is None or cache.first_chunk)
