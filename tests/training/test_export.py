"""`videodit export --ema_length`: the folder has the average that is asked for."""

from pathlib import Path

import pytest
import torch

from tests.training.test_trainers import dit_config
from videodit import TextToVideo, cli
from videodit.training.checkpoint import Checkpoint, folder_of, read_full
from videodit.training.dit_trainer import train_dit
from videodit.training.posthoc_ema import StoredAverage, mix

LENGTH, STEPS = 0.07, 4


def test_an_average_of_another_length(latents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = dit_config(tmp_path / "run", latents, max_steps=STEPS, save_every=1, keep_last=STEPS)
    run = train_dit(config)
    assert cli.main(["export", str(run), "--out", str(tmp_path / "model"), f"--ema_length={LENGTH}"]) == 0
    assert f"average of relative width {LENGTH}, from {STEPS} checkpoints" in capsys.readouterr().out
    assert f"{LENGTH}, from {STEPS} checkpoints" in (tmp_path / "model/README.md").read_text()
    steps = range(1, STEPS + 1)
    stored = [StoredAverage(step, width, f"ema{k}") for step in steps for k, width in enumerate(config.ema_profiles)]
    shares = mix(stored, LENGTH, STEPS).weights
    assert sum(share != 0 for share in shares) > 2
    kept = [read_full(Checkpoint.open(folder_of(run, average.step)), average.kind) for average in stored]
    exported = dict(TextToVideo.from_pretrained(tmp_path / "model").model.named_parameters())
    assert exported.keys() == kept[0].keys() - {"level_error.knots"}
    for name, value in exported.items():
        wanted = sum(float(share) * average[name].double() for share, average in zip(shares, kept, strict=True))
        assert isinstance(wanted, torch.Tensor)
        torch.testing.assert_close(value.detach().double(), wanted, rtol=1e-5, atol=1e-7)
    # It is none of those that the last checkpoint has.
    assert all(any((average[name] - value).abs().max() > 1e-6 for name, value in exported.items()) for average in kept)
