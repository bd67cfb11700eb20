"""The files of configs/ load, and fit together: DiT patches divide the latents of the VAE beside them."""

from pathlib import Path
from typing import Any

import pytest

from videodit.config import load_yaml
from videodit.data.buckets import parse_bucket
from videodit.data.ingest import IngestConfig
from videodit.demo import DemoConfig, _recipes, _settings
from videodit.models.vae import VAEConfig
from videodit.training.dit_config import DiTRunConfig
from videodit.training.vae_config import VAERunConfig

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(path.stem.removeprefix("dit_") for path in CONFIGS.glob("dit_*.yaml"))
VAES = sorted(path.stem.removeprefix("vae_") for path in CONFIGS.glob("vae_*.yaml"))


def test_the_sizes_of_dit_and_a_pair_for_each_vae() -> None:
    assert {"small", "base", "large", "xl", "2b", "5b"} | set(VAES) == set(NAMES)
    others = {"ingest_base.yaml"}
    assert len(NAMES) + len(VAES) + len(others) == len(list(CONFIGS.iterdir()))


def test_where_a_demo_lies_is_none_of_its_settings() -> None:
    """It may be moved between two starts: what training reads is where it is now."""

    def begun_at(out: str) -> tuple[str | None, dict[str, Any]]:
        config = DemoConfig(out=out)
        recipes = _recipes(config)
        return recipes[1].vae, _settings(config, recipes)

    before, after = begun_at("runs/demo"), begun_at("/elsewhere/demo")
    assert (before[0], after[0]) == ("runs/demo/vae/model", "/elsewhere/demo/vae/model")
    assert before[1] == after[1]


def test_the_filters_of_ingest_load() -> None:
    assert load_yaml(IngestConfig, CONFIGS / "ingest_base.yaml").filters.duplicate_bits == 12


@pytest.mark.parametrize("name", NAMES)
def test_recipes_load_and_fit_together(name: str) -> None:
    vae_name = name if name in VAES else "base"
    vae = load_yaml(VAERunConfig, CONFIGS / f"vae_{vae_name}.yaml", {"run_dir": "run", "data.shards": "clips"})
    dit = load_yaml(DiTRunConfig, CONFIGS / f"dit_{name}.yaml", {"run_dir": "run", "data.shards": "latents"})
    assert isinstance(vae.model, VAEConfig)
    for bucket in vae.data.buckets:
        frames, height, width = parse_bucket(bucket)
        _, *sizes = vae.model.latent_shape(frames, height, width)
        assert all(size % patch == 0 for size, patch in zip(sizes, dit.model.patch_size))
    assert dit.global_batch_size % dit.micro_batch_size == 0
