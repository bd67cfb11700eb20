"""Mean and standard deviation of each channel of a set of fields: ingest measures them, models read and write fields
in units of them.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from einops import rearrange

if TYPE_CHECKING:  # ingest's processes come here: they need no torch, which takes them seconds and address space
    from torch import Tensor

    from videodit.models.vae_folder import VideoAutoencoderConfig

SCALE = 3.0
"""Standard deviations that are 1 to a model: nearly all values lie in [-1, 1] then, as those of pixels do."""
_CONSTANT = 1e-6  # a spread of so little of the mean is float32's rounding


@dataclass(frozen=True)
class ChannelMoments:
    """What is summed up over values, in float64; those of two parts give those of the whole by +.

    Attributes:
        count: values of each channel.
        mean: (c,) their mean.
        squares: (c,) sum of their squared distances from it.
    """

    count: int
    mean: np.ndarray
    squares: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray) -> "ChannelMoments":
        """Moments of (..., c) values."""
        rows = values.reshape(-1, values.shape[-1]).astype(np.float64)
        mean = rows.mean(axis=0)
        return cls(len(rows), mean, np.square(rows - mean).sum(axis=0))

    def __add__(self, other: "ChannelMoments") -> "ChannelMoments":
        """Of both together. Source: Chan, Golub & LeVeque (1979), STAN-CS-79-773, the pairwise update."""
        count = self.count + other.count
        apart = other.mean - self.mean
        squares = self.squares + other.squares + np.square(apart) * (self.count * other.count / count)
        return ChannelMoments(count, self.mean + apart * (other.count / count), squares)


@dataclass(frozen=True)
class ChannelStatistics:
    """Mean and standard deviation of each channel, in the fields' units; 0 for a channel that is constant."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_moments(cls, moments: ChannelMoments) -> "ChannelStatistics":
        """Of all the values that were summed up."""
        std = np.sqrt(moments.squares / moments.count)
        std = np.where(std > _CONSTANT * np.abs(moments.mean), std, 0.0)
        return cls(tuple(moments.mean.tolist()), tuple(std.tolist()))

    @classmethod
    def of_vae(cls, config: "VideoAutoencoderConfig") -> "ChannelStatistics | None":
        """Of the fields that a VAE was trained on; None if these were videos or pictures."""
        mean, std = config.channel_mean, config.channel_std
        return None if mean is None or std is None else cls(mean, std)

    def standardise(self, clip: np.ndarray) -> np.ndarray:
        """What models see of (..., c) float32: zero mean, SCALE standard deviations are 1, nothing is clipped."""
        scale = np.array([SCALE * std or 1.0 for std in self.std], clip.dtype)
        return (clip - np.array(self.mean, clip.dtype)) / scale

    def restore(self, clips: "Tensor") -> "Tensor":
        """The way back: (b, c, t, h, w) as models see them -> (b, t, h, w, c) float32 in the fields' units."""
        values = rearrange(clips.float(), "b c t h w -> b t h w c")
        std, mean = values.new_tensor(self.std), values.new_tensor(self.mean)
        return (values * (SCALE * std) + mean).contiguous()
