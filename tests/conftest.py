"""What all tests share: real clips, a seed that does not depend on the tests before, a place for scraps."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Tests that run beside others share the cores with them; torch reads this when it is imported.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    _threads = (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _threads)))

import hypothesis
import pytest
import torch

from tests.forked_ranks import Ranks

# How long an example takes says nothing on a machine that does something else as well.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")

# Triton decides when it is first imported, by torch or by us, whether its kernels can run in its interpreter.
os.environ["TRITON_INTERPRET"] = "1"

_DEFAULT_CLIPS = Path(__file__).resolve().parents[2] / "shared" / "videos"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-clips", metavar="DIR", default=str(_DEFAULT_CLIPS), help="folder of real clips (default: %(default)s)"
    )


def pytest_runtest_setup() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def scraps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Temporary folders of the code under test, and of the processes it starts, go where pytest cleans up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("scraps")))
        patch.setattr(tempfile, "tempdir", None)
        yield


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ranks]:
    """Starts ranks: one process for all tests, for it takes seconds to import everything."""
    ranks = Ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def real_clips(request: pytest.FixtureRequest) -> Path:
    """The folder of real clips; tests that need it are skipped where it is absent."""
    folder = Path(request.config.getoption("--real-clips"))
    if not (folder / "sintel_trailer_30s.mp4").is_file():
        pytest.skip(f"no real clips in {folder} (choose the folder with --real-clips DIR)")
    return folder
