"""Prompts that were read beforehand: the encoder's own answers."""

from pathlib import Path

import pytest
import torch

from tests.models.tiny import tiny_text
from videodit.models.text_prompts import EncodedPrompts


def test_known_prompts_are_answered_as_the_encoder_would(tmp_path: Path) -> None:
    encoder = tiny_text().requires_grad_(False)
    prompts = EncodedPrompts(encoder, ["a small red circle", "star", "star"])
    asked = ["star", "a small red circle", "", ""]
    answered, expected = prompts.encode(asked), encoder.encode(asked)
    assert prompts.dim == encoder.dim
    assert torch.equal(answered.mask, expected.mask)
    torch.testing.assert_close(answered.embeddings[answered.mask], expected.embeddings[expected.mask])
    with pytest.raises(KeyError):
        prompts.encode(["blue star"])
    with pytest.raises(ValueError, match="no text encoder"):
        prompts.save_pretrained(tmp_path)
