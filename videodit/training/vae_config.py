"""What a VAE training run is made of, and what of it the clips decide."""

import dataclasses
from dataclasses import dataclass, field

from videodit.data.clip_reader import DataConfig, measured_statistics
from videodit.data.mixture import open_shards
from videodit.errors import UserError
from videodit.models.vae import VAEConfig
from videodit.training.run_config import RunConfig
from videodit.training.stages import stages_of
from videodit.training.vae_objective import VAELossConfig


@dataclass(frozen=True)
class VAERunConfig(RunConfig):
    """A VAE training run."""

    data: DataConfig = field(default_factory=DataConfig)
    """clips to train on"""
    eval_shards: str | None = None
    """shards of held-out clips: every sample_every steps their PSNR is measured, and four are rebuilt into samples/, at
    the size of the last stage; without them, neither is done"""
    eval_clips: int = 32
    """how many of them"""
    model: VAEConfig = field(default_factory=VAEConfig)
    """shape of the VAE"""
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    """loss terms"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.data.shards and not self.stages:
            raise ValueError("data.shards is not set: give --data.shards FOLDER, as videodit ingest writes it")
        if self.eval_clips < 1:
            raise ValueError(f"eval_clips {self.eval_clips} is below 1: use a positive number")
        if self.stages:
            stages_of(self)


def follow_clips(config: VAERunConfig) -> VAERunConfig:
    """The config with the number of the clips' channels and, of fields, their statistics.

    Raises:
        UserError: if there are no clips, they are of several kinds, or ingest did not measure their channels.
    """
    first, *others = [(stage.number, stage.config.data) for stage in stages_of(config)]
    statistics = measured_statistics(open_shards(first[1]))
    for number, data in others:
        if data.folders != first[1].folders and measured_statistics(open_shards(data)) != statistics:
            raise UserError(
                f"stage {number}: {data.name} has other channels, or other statistics of them, than "
                f"{first[1].name} of stage 1: one model is trained on one kind of clip"
            )
    model = dataclasses.replace(
        config.model,
        in_channels=len(statistics.mean) if statistics else 3,
        channel_mean=statistics.mean if statistics else None,
        channel_std=statistics.std if statistics else None,
    )
    return dataclasses.replace(config, model=model)
