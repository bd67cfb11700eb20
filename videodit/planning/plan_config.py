"""What `videodit plan` is asked: a training run's config, and the machine to plan it for."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from videodit.planning.workload import DiTWorkload, VAEWorkload, Workload
from videodit.settings import group_types, leaf_types, read_yaml
from videodit.training.dit_config import DiTRunConfig
from videodit.training.vae_config import VAERunConfig

MOST_BLOCKS = 256
"""Of a model that is planned. A plan runs all of it some dozen times, which takes seconds for each block."""


@dataclass(frozen=True)
class PlanOptions:
    """What to plan for."""

    gpus: int = 1
    """ranks of the run"""
    gpu: str = "h100"
    """kind of GPU (b200, h200, h100, a100, a100-40gb, l40s, rtx4090, rtx3090, mi300x), or cpu: this machine"""
    buckets: tuple[str, ...] = ()
    """clip shapes FRAMESxHEIGHTxWIDTH; by default those of the config or the latents, else that of the samples"""
    mfu: float = 0.4
    """share of the peak speed that training is expected to reach; 0.4 is the best published for factorized attention"""

    def check(self) -> None:
        """Raises ValueError for a plan for nothing."""
        if self.gpus < 1:
            raise ValueError(f"gpus {self.gpus} is an empty plan: the nearest that works is 1")
        if not 0 < self.mfu <= 1:
            raise ValueError(f"mfu {self.mfu} is no share of the peak: use for example 0.4")


@dataclass(frozen=True)
class DiTPlanConfig(PlanOptions, DiTRunConfig):
    """A DiT training run, and what to plan it for."""

    text_tokens: int = 0
    """tokens of a caption; by default as many as the text encoder reads"""

    def __post_init__(self) -> None:
        self.check()
        _fill_in(self)
        super().__post_init__()
        if self.text_tokens < 0:
            raise ValueError(f"text_tokens {self.text_tokens} is below 0: use 0 for as many as the encoder reads")
        most = self.text_max_length if self.text_encoder else self.text.max_words
        if 0 < most < self.text_tokens:
            raise ValueError(f"text_tokens {self.text_tokens} is more than the {most} that the text encoder reads")
        depths = {"model.depth": self.model.depth, "model.local_depth": self.model.local_depth}
        for name, depth in (depths | {"text.depth": self.text.depth}).items():
            if depth > MOST_BLOCKS:
                raise ValueError(f"{name} {depth} is more than a plan takes on: use {MOST_BLOCKS} or less")

    def workload(self) -> Workload:
        """What is trained."""
        return DiTWorkload(self, self.buckets, self.text_tokens)


@dataclass(frozen=True)
class VAEPlanConfig(PlanOptions, VAERunConfig):
    """A VAE training run, and what to plan it for."""

    def __post_init__(self) -> None:
        self.check()
        _fill_in(self)
        super().__post_init__()

    def workload(self) -> Workload:
        """What is trained."""
        return VAEWorkload(self, self.buckets)


PlanConfig = DiTPlanConfig | VAEPlanConfig


def _fill_in(config: PlanConfig) -> None:
    """A plan needs no data and writes nothing."""
    object.__setattr__(config, "run_dir", config.run_dir or "unused")
    if not config.data.shards and not config.stages:
        object.__setattr__(config, "data", dataclasses.replace(config.data, shards="unused"))


def config_class(files: Sequence[str], argv: Sequence[str] = ()) -> type[DiTPlanConfig] | type[VAEPlanConfig]:
    """Which kind of run the config files and options describe, by the settings that only one of the two has."""
    given = {word[2:].partition("=")[0].replace("-", "_") for word in argv if word.startswith("--")}
    for file in files:
        for name, value in read_yaml(Path(file)).items():
            given |= {f"{name}.{key}" for key in value} if isinstance(value, dict) else {name}
    vae, dit = (set(group_types(cls)) | set(leaf_types(cls)) for cls in (VAEPlanConfig, DiTPlanConfig))
    return VAEPlanConfig if len(given & (vae - dit)) > len(given & (dit - vae)) else DiTPlanConfig
