"""Wan 2.1's transformer through VideoDiT: the same output as diffusers' model, from files that diffusers writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from videodit.errors import UserError
from videodit.models.dit import VideoDiT
from videodit.models.wan import TEXT_LENGTH, our_name, read_wan_transformer

diffusers = pytest.importorskip("diffusers")

SHAPE = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "text_dim": 10}
SHAPE |= {"freq_dim": 16, "ffn_dim": 40, "num_layers": 2}  # 40 / 24 is no round ratio


def write_wan(folder: Path, shard_size: str = "10GB", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**{**SHAPE, **changes}).eval()
    with torch.no_grad():  # norms of one and biases of zero would hide a wrong name
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return model


@pytest.mark.parametrize(
    ("changes", "size"),
    [
        ({}, (3, 4, 6)),
        ({"num_layers": 3, "attention_head_dim": 16}, (1, 6, 2)),
        ({"patch_size": (1, 1, 1), "num_attention_heads": 3}, (2, 3, 5)),
        ({"patch_size": (2, 2, 4), "in_channels": 6, "out_channels": 6, "ffn_dim": 24}, (4, 2, 8)),
    ],
)
def test_output_equals_diffusers(changes: dict, size: tuple[int, int, int], tmp_path: Path) -> None:
    theirs = write_wan(tmp_path, **changes)
    ours = read_wan_transformer(tmp_path)
    latents, text = torch.randn(2, theirs.config.in_channels, *size), torch.randn(2, 7, 10)
    mask = torch.arange(7) < torch.tensor([[4], [7]])
    sigma = torch.tensor([0.83, 0.2])
    padded = F.pad(text * mask[..., None], (0, 0, 0, TEXT_LENGTH - 7))
    with torch.no_grad():
        expected = theirs(latents, 1000 * sigma, padded).sample
        torch.testing.assert_close(ours(latents, sigma, text, mask), expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.1


def test_one_file_and_many_give_the_same_bits_there_and_back(tmp_path: Path) -> None:
    theirs = write_wan(tmp_path / "one")
    write_wan(tmp_path / "many", shard_size="20KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    one, many = (read_wan_transformer(tmp_path / name).state_dict() for name in ("one", "many"))
    read_wan_transformer(tmp_path / "many").save_pretrained(tmp_path / "ours")
    again = VideoDiT.from_pretrained(tmp_path / "ours").state_dict()
    assert one.keys() == many.keys() == again.keys()
    assert all(torch.equal(one[name], many[name]) and torch.equal(one[name], again[name]) for name in one)
    assert sum(value.numel() for value in one.values()) == sum(p.numel() for p in theirs.parameters())


def test_dtypes_of_the_files_are_kept(tmp_path: Path) -> None:
    write_wan(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    assert {p.dtype for p in read_wan_transformer(tmp_path).parameters()} == {torch.bfloat16}


def test_a_factorized_start_keeps_every_weight(tmp_path: Path) -> None:
    write_wan(tmp_path)
    full, factorized = (read_wan_transformer(tmp_path, pattern) for pattern in ("f", "st"))
    assert factorized.config.block_kinds == "st"
    assert all(torch.equal(a, b) for a, b in zip(full.state_dict().values(), factorized.state_dict().values()))
    text, mask, sigma = torch.randn(1, 3, 10), torch.ones(1, 3, dtype=torch.bool), torch.tensor([0.5])
    one_token = torch.randn(1, 4, 1, 2, 2)  # where there is one token, all three attentions are the same
    torch.testing.assert_close(factorized(one_token, sigma, text, mask), full(one_token, sigma, text, mask))
    more = torch.randn(1, 4, 3, 4, 4)
    assert not torch.allclose(factorized(more, sigma, text, mask), full(more, sigma, text, mask), atol=1e-3)


def test_every_weight_of_diffusers_model_has_its_own_place(tmp_path: Path) -> None:
    names = list(write_wan(tmp_path).state_dict())
    ours = [our_name(name) for name in names]
    assert None not in ours and len(set(ours)) == len(names)
    assert our_name("blocks.0.attn1.to_qkv.weight") is None and our_name("scale_shift_tables") is None


def change(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "LatteTransformer3DModel"}, "_class_name 'LatteTransformer3DModel'"),
        ({"image_dim": 1280}, "image_dim 1280"),
        ({"in_channels": 8}, "8 channels in and 4 out"),
        ({"num_layers": 3}, "do not fit its config.json"),
        ({"num_layers": "two"}, "no config of a WanTransformer3DModel|cannot be imported"),
        ({"patch_size": None}, "no config of a WanTransformer3DModel"),
    ],
)
def test_another_architecture_is_refused_in_one_line(changes: dict, message: str, tmp_path: Path) -> None:
    write_wan(tmp_path)
    change(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        read_wan_transformer(tmp_path)


def test_a_folder_that_is_not_whole_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_wan_transformer(tmp_path)
    write_wan(tmp_path, shard_size="20KB")
    with pytest.raises(UserError, match=r"depth 2 is not a multiple of the 3 letters"):
        read_wan_transformer(tmp_path, "sst")
    first = min(tmp_path.glob("*.safetensors"))
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(UserError, match="truncated or damaged"):
        read_wan_transformer(tmp_path)
    first.unlink()
    with pytest.raises(UserError, match=f"{first.name} is missing"):
        read_wan_transformer(tmp_path)
