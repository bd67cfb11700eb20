"""Shape of the video VAE."""

from dataclasses import dataclass

from videodit.models.latent_shape import latent_shape


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
        for name in ("in_channels", "latent_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} {getattr(self, name)} is not positive: use 1 or more")
        for name, example in (("channels", [96, 192, 384]), ("patch_size", [1, 2, 2])):
            if min(getattr(self, name), default=0) < 1:
                raise ValueError(
                    f"model.{name} {list(getattr(self, name))} is not all positive numbers: use for example {example}"
                )
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
        for entry, wide, deep in zip(self.downsample, self.channels, self.channels[1:]):
            folded = wide * 2 ** (("t" in entry) + 2 * ("s" in entry))
            if folded % deep:
                nearest = min((n for n in range(1, folded + 1) if folded % n == 0), key=lambda n: (abs(n - deep), -n))
                raise ValueError(
                    f"model.channels {list(self.channels)}: {wide} channels halved in {entry!r} are {folded}, which "
                    f"{deep} does not divide: the nearest to {deep} that does is {nearest}"
                )

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
