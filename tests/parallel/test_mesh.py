"""Who may join: as many ranks on a machine as it has GPUs."""

import pytest
import torch

from videodit.errors import UserError
from videodit.parallel.mesh import init_process


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])
def test_more_ranks_than_gpus_are_one_line_on_every_rank(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the first rank of the machine too, which alone is heard (`cli._report`)."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    for name, value in {"RANK": 0, "WORLD_SIZE": 8, "LOCAL_RANK": 0, launcher: 8, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with pytest.raises(
        UserError, match="8 ranks were started on a machine where torch sees 4 GPUs: use --nproc_per_nod"
    ):
        init_process("cuda")
