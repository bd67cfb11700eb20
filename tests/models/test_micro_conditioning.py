"""The DiT's micro-conditions: nothing without them, nothing before they are learned, each one something after that."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.models.tiny import randomize, tiny_dit
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.micro_conditioning import MICRO_CONDITIONS

CONDITIONS = torch.tensor([[480.0, 640.0, 0.0, 16.0, 8.0], [1080.0, 1920.0, 4.0, 0.0, 30.0]])


def predict(model: VideoDiT, conditions: Tensor | None, rows: slice = slice(0, 2)) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    latents, sigma = torch.randn(2, 4, 3, 4, 6, generator=generator), torch.rand(2, 3, generator=generator)
    text, mask = torch.randn(2, 5, 12, generator=generator), torch.ones(2, 5, dtype=torch.bool)
    with torch.no_grad():
        return model(latents[rows], sigma[rows], text[rows], mask[rows], micro_conditions=conditions)


def test_without_the_option_there_is_no_weight_and_no_effect() -> None:
    model = tiny_dit()
    assert not [name for name in model.state_dict() if "micro" in name]
    assert torch.equal(predict(model, CONDITIONS), predict(model, None))


@pytest.mark.parametrize("local_width", [0, 8])
def test_before_training_the_model_is_the_one_without(local_width: int) -> None:
    shape = {
        "in_channels": 4,
        "hidden_size": 24,
        "depth": 2,
        "num_heads": 2,
        "text_dim": 12,
        "local_width": local_width,
    }
    told = VideoDiT(DiTConfig(**shape, micro_conditioning=True))
    out = told.micro_embedding.out
    assert not bool(out.weight.any()) and not bool(out.bias.any()) and bool(told.micro_embedding.hidden.weight.any())
    kept = {name: value.clone() for name, value in told.micro_embedding.state_dict().items()}
    randomize(told).micro_embedding.load_state_dict(kept)  # a fresh model predicts zero, which would prove nothing
    plain = VideoDiT(DiTConfig(**shape)).eval()
    others = {name: value for name, value in told.state_dict().items() if "micro" not in name}
    plain.load_state_dict(others)
    expected = predict(plain, None)
    assert expected.std() > 0.01
    assert torch.equal(predict(told, CONDITIONS), expected) and torch.equal(predict(told, CONDITIONS.flip(0)), expected)


@pytest.mark.parametrize("name", MICRO_CONDITIONS)
def test_each_condition_reaches_its_own_row_alone(name: str) -> None:
    model = tiny_dit(micro_conditioning=True)
    other = CONDITIONS.clone()
    other[0, MICRO_CONDITIONS.index(name)] += 24.0
    before, after = predict(model, CONDITIONS), predict(model, other)
    assert (after[0] - before[0]).abs().max() > 1e-3 and torch.equal(after[1], before[1])
    torch.testing.assert_close(predict(model, other[:1], slice(0, 1))[0], after[0])


def test_a_model_folder_gives_the_same_bits(tmp_path: Path) -> None:
    model = tiny_dit(micro_conditioning=True)
    model.save_pretrained(tmp_path)
    again = VideoDiT.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(predict(again, CONDITIONS), predict(model, CONDITIONS))


@pytest.mark.parametrize(
    ("conditions", "found"),
    [(None, "are missing"), (CONDITIONS[:1], r"have shape \(1, 5\)"), (CONDITIONS[:, :4], r"have shape \(2, 4\)")],
)
def test_what_is_missing_is_said(conditions: Tensor | None, found: str) -> None:
    with pytest.raises(ValueError, match=f"micro_conditions {found}: .*needs .2, 5., the original_height, .*, fps of"):
        predict(tiny_dit(micro_conditioning=True), conditions)
