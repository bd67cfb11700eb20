"""Eight clips and their latents, made once a file of tests; a file may have its own instead. Ranks for all files."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tiny
from tests.forked_ranks import Ranks


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_shards(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    return tiny.make_latents(root / "latents", shards, tiny.make_vae(root / "vae"))


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()
