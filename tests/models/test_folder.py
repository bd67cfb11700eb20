"""Model folders: what is saved comes back bit for bit, and every kind of damage is one line for the user."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.models.tiny import tiny_dit, tiny_text, tiny_vae
from videodit.errors import UserError
from videodit.models.dit import VideoDiT
from videodit.models.text import ByteTextEncoder
from videodit.models.vae import VideoVAE

MODELS = {VideoDiT: tiny_dit, VideoVAE: tiny_vae, ByteTextEncoder: tiny_text}


@pytest.mark.parametrize("kind", MODELS)
def test_comes_back_bit_for_bit(kind: type, tmp_path: Path) -> None:
    model = MODELS[kind]()
    model.save_pretrained(tmp_path / "new" / "folder")
    loaded = kind.from_pretrained(tmp_path / "new" / "folder")
    assert loaded.config == model.config and not loaded.training
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


@pytest.mark.parametrize("kind", MODELS)
def test_saving_again_gives_the_same_bytes(kind: type, tmp_path: Path) -> None:
    MODELS[kind]().save_pretrained(tmp_path / "a")
    kind.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_weights_are_as_readable_as_the_config(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path)  # safetensors itself writes files that only their owner may read
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "config.json").stat().st_mode


def test_weights_that_share_or_stride_memory_are_saved(tmp_path: Path) -> None:
    model = tiny_vae()
    with torch.no_grad():
        first = next(p for p in model.parameters() if p.dim() >= 2)
        first.data = first.detach().transpose(0, 1).contiguous().transpose(0, 1)
    assert not first.is_contiguous()
    model.save_pretrained(tmp_path)
    assert torch.equal(next(p for p in VideoVAE.from_pretrained(tmp_path).parameters() if p.dim() >= 2), first)


def edit(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def config_text(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.json").write_text(text)


def weights(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(change(path.read_bytes()))

    return apply


FAULTS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "it has no config.json; make one with"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no weights: model.safetensors is miss"),
    "cut by a byte": (weights(lambda data: data[:-1]), "model.safetensors is truncated or damaged"),
    "cut in half": (weights(lambda data: data[: len(data) // 2]), "is truncated or damaged"),
    "cut in the header": (weights(lambda data: data[:20]), "is truncated or damaged"),
    "empty": (weights(lambda data: b""), "is truncated or damaged"),
    "garbage": (weights(lambda data: b"\xff" * 100), "is truncated or damaged"),
    "a typo": (edit(hiden_size=24), "does not describe a DiTConfig: .*hiden_size"),
    "half a config": (config_text('{"hidden_size": 2'), "does not describe a DiTConfig"),
    "a list": (config_text("[1, 2]"), "does not describe a DiTConfig"),
    "not text": (lambda folder: (folder / "config.json").write_bytes(b"\xff\xfe"), "does not describe a DiTConfig"),
    "a refused value": (edit(qk_norm="layer"), "'layer' is not one of head, all, none"),
    "no heads": (edit(num_heads=0), "model.num_heads 0 is not positive"),
    "a word for a number": (edit(hidden_size="wide"), "does not describe a DiTConfig"),
    "a fraction": (edit(hidden_size=24.0), "does not describe a model"),
    "another size": (edit(hidden_size=48), "does not fit .*config.json.*size mismatch"),
    "more blocks": (edit(depth=4), "does not fit .*config.json.*Missing key"),
    "fewer blocks": (edit(depth=1, pattern="s"), "does not fit .*config.json.*Unexpected key"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_one_line_for_the_user(fault: str, tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path)
    damage, message = FAULTS[fault]
    damage(tmp_path)
    with pytest.raises(UserError, match=message) as caught:
        VideoDiT.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is not a model folder"):
        VideoVAE.from_pretrained(tmp_path / "nowhere")


def test_one_models_weights_are_not_another_models(tmp_path: Path) -> None:
    tiny_vae().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="does not describe a DiTConfig"):
        VideoDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match="does not fit"):
        ByteTextEncoder.from_pretrained(tmp_path)


def test_loading_does_not_touch_the_global_generator_state_of_the_result(tmp_path: Path) -> None:
    tiny_dit().save_pretrained(tmp_path)
    one, other = (VideoDiT.from_pretrained(tmp_path) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
    assert isinstance(one, nn.Module)
