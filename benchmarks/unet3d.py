"""A factorized 3D U-Net for latents of video: what `scaling.py` compares the DiT with.

Two levels, two blocks each on the way down and up. A block is a 3x3 convolution in each frame and a convolution over
three frames, each after a group norm and SiLU, with shift and scale from noise level and prompt; at the lower level it
is followed by spatial and by temporal attention, and by attention to the text.
Source: Ho et al. (2022), Video Diffusion Models, arXiv:2204.03458, Sec. 3 (factorized blocks and attention); Singer et
al. (2022), Make-A-Video, arXiv:2209.14792 (convolutions over time after those in space).

Legend: b batch, c latent channels, t h w latent frames, rows and columns, f width, d condition, l text tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodit.models.attention import CrossAttention, attend, text_attention_mask
from videodit.models.layers import sinusoidal_embedding

GROUPS, HEADS = 4, 4


class ConvBlock(nn.Module):
    """(b, f, t, h, w) -> (b, out, t, h, w)."""

    def __init__(self, width: int, out: int, condition: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(GROUPS, width), nn.GroupNorm(GROUPS, out)
        self.spatial = nn.Conv3d(width, out, (1, 3, 3), padding=(0, 1, 1))
        self.temporal = nn.Conv3d(out, out, (3, 1, 1), padding=(1, 0, 0))
        self.condition = nn.Linear(condition, 2 * out)
        self.skip = nn.Conv3d(width, out, 1) if width != out else nn.Identity()
        nn.init.zeros_(self.temporal.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        hidden = self.spatial(F.silu(self.norm1(x)))
        shift, scale = self.condition(condition)[:, :, None, None, None].chunk(2, dim=1)
        hidden = self.temporal(F.silu(torch.addcmul(shift, self.norm2(hidden), 1 + scale)))
        out: Tensor = self.skip(x) + hidden
        return out


class AttentionBlock(nn.Module):
    """Spatial attention, temporal attention and attention to the text, each added to x."""

    def __init__(self, width: int, text_dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(2))
        self.proj = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.text = nn.Linear(text_dim, width)
        self.cross = CrossAttention(width, HEADS, "head")
        for layer in (*self.proj, self.cross.proj):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """(b, f, t, h, w) -> the same; text is (b, l, d)."""
        b, f, t, h, w = x.shape
        tokens = x.permute(0, 2, 3, 4, 1).reshape(b, t, h * w, f)
        for kind, norm, qkv, proj in zip("st", self.norms, self.qkv, self.proj):
            parts = qkv(norm(tokens)).unflatten(-1, (3, HEADS, -1)).unbind(-3)
            tokens = tokens + proj(attend(kind, *(part.contiguous() for part in parts)))
        keys_values = self.cross.keys_values(self.text(text))
        tokens = tokens + self.cross(self.norms[2](tokens), keys_values, text_attention_mask(mask))
        return tokens.view(b, t, h, w, f).permute(0, 4, 1, 2, 3)


class UNet3D(nn.Module):
    """Predicts the velocity of noisy latents, called as `VideoDiT` is.

    Args:
        channels: c.
        width: f of the first level, a multiple of 4; the second has twice as much.
        text_dim: of the text encoder.
    """

    def __init__(self, channels: int, width: int, text_dim: int) -> None:
        super().__init__()
        d, low = 4 * width, 2 * width
        self.embedding = nn.Sequential(nn.Linear(256, d), nn.SiLU(), nn.Linear(d, d))
        self.pooled = nn.Linear(text_dim, d)
        self.conv_in = nn.Conv3d(channels, width, (1, 3, 3), padding=(0, 1, 1))
        self.down = nn.ModuleList([ConvBlock(width, width, d), ConvBlock(width, width, d)])
        self.shrink = nn.Conv3d(width, low, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
        self.middle = nn.ModuleList(ConvBlock(low, low, d) for _ in range(2))
        self.attention = nn.ModuleList(AttentionBlock(low, text_dim) for _ in range(2))
        self.grow = nn.Conv3d(low, width, (1, 3, 3), padding=(0, 1, 1))
        self.up = nn.ModuleList([ConvBlock(2 * width, width, d), ConvBlock(2 * width, width, d)])
        self.norm_out = nn.GroupNorm(GROUPS, width)
        self.conv_out = nn.Conv3d(width, channels, (1, 3, 3), padding=(0, 1, 1))
        nn.init.zeros_(self.conv_out.weight)

    def forward(self, latents: Tensor, sigma: Tensor, text: Tensor, mask: Tensor) -> Tensor:
        """latents (b, c, t, h, w), sigma (b,), text (b, l, d), mask (b, l) -> velocity, the latents' shape."""
        weight = mask.to(text.dtype)[..., None]
        pooled = (text * weight).sum(dim=1) / weight.sum(dim=1)
        condition = F.silu(self.embedding(sinusoidal_embedding(1000 * sigma, 256)) + self.pooled(pooled))
        x = self.conv_in(latents)
        skips = []
        for block in self.down:
            x = block(x, condition)
            skips.append(x)
        x = self.shrink(x)
        for block, attention in zip(self.middle, self.attention):
            x = attention(block(x, condition), text, mask)
        x = self.grow(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0)))
        for block in self.up:
            x = block(torch.cat([x, skips.pop()], dim=1), condition)
        out: Tensor = self.conv_out(F.silu(self.norm_out(x)))
        return out
