"""Wan 2.1 text-to-video transformers as VideoDiT: their config and weights, renamed and reordered.

Read is the folder that diffusers writes for `WanTransformer3DModel`. The architecture is Wan Team (2025),
arXiv:2503.20314, Sec. 4.2: full attention with QK norm over all heads, text cross-attention without a mask to prompts
padded with zeros, a shared adaLN layer with a bias per block, and a last norm modulated by the embedding and a bias.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from safetensors import SafetensorError, safe_open
from torch import Tensor

from videodit.errors import UserError
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.folder import weight_files

TEXT_LENGTH = 512
"""tokens of a prompt, padded with zeros, in Wan's training"""
_WEIGHTS = "diffusion_pytorch_model.safetensors"
# What a text-to-video model of Wan 2.1 has; anything else is another architecture.
_FIXED = {
    "_class_name": "WanTransformer3DModel",
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "eps": 1e-6,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}
# Theirs, as a regular expression, to ours; {0} is the block.
_NAMES = {
    r"patch_embedding\.": "patch_in.",
    r"proj_out\.": "patch_out.",
    r"scale_shift_table": "final_modulation.bias",
    r"condition_embedder\.time_embedder\.linear_1\.": "sigma_embedding.0.",
    r"condition_embedder\.time_embedder\.linear_2\.": "sigma_embedding.2.",
    r"condition_embedder\.time_proj\.": "modulation.",
    r"condition_embedder\.text_embedder\.linear_1\.": "text_projection.fc1.",
    r"condition_embedder\.text_embedder\.linear_2\.": "text_projection.fc2.",
    r"blocks\.(\d+)\.scale_shift_table": "blocks.{0}.modulation_bias",
    r"blocks\.(\d+)\.norm2\.": "blocks.{0}.cross_norm.",
    r"blocks\.(\d+)\.ffn\.net\.0\.proj\.": "blocks.{0}.mlp.fc1.",
    r"blocks\.(\d+)\.ffn\.net\.2\.": "blocks.{0}.mlp.fc2.",
    **{
        rf"blocks\.(\d+)\.{theirs}\.{layer}\.": f"blocks.{{0}}.{ours}.{name}."
        for theirs, ours in (("attn1", "attention"), ("attn2", "cross_attention"))
        for layer, name in {
            "to_q": "query",
            "to_k": "key",
            "to_v": "value",
            r"to_out\.0": "proj",
            "norm_q": "norm.query",
            "norm_k": "norm.key",
        }.items()
    },
}


def read_wan_transformer(folder: str | Path, pattern: str = "f") -> VideoDiT:
    """A VideoDiT with the weights of a Wan 2.1 text-to-video transformer, in the files' dtypes.

    With pattern f it computes what the original does. With another one, such as st, each block keeps its weights but
    its self-attention sees only its frame, or only its place over time: a start for training a factorized model.

    Args:
        folder: in diffusers' layout: config.json beside one or several safetensors files.
        pattern: attention of the blocks, repeated to the depth, see `DiTConfig`.
    Raises:
        UserError: if the folder is no such model or not whole, or the pattern does not fit its depth.
    """
    folder = Path(folder)
    config = wan_config(_read_json(folder / "config.json"), folder, pattern)
    with torch.device("meta"):
        model = VideoDiT(config)
    weights = {name: _reorder(name, value, config) for name, value in _read_weights(folder)}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        detail = " ".join(str(error).split())
        raise UserError(f"the weights in {folder} do not fit its config.json: {detail[:300]}") from None
    return model.eval()


def wan_config(theirs: dict[str, Any], folder: Path, pattern: str = "f") -> DiTConfig:
    """The shape of a `WanTransformer3DModel`, given its config.json."""
    for name, wanted in _FIXED.items():
        if theirs.get(name, wanted) != wanted:
            raise UserError(
                f"{folder / 'config.json'} has {name} {theirs[name]!r}: only Wan 2.1 text-to-video transformers can be "
                f"imported, which have {wanted!r}"
            )
    try:
        dim = theirs["num_attention_heads"] * theirs["attention_head_dim"]
        if theirs.get("out_channels") not in (None, theirs["in_channels"]):
            raise UserError(
                f"{folder / 'config.json'} has {theirs['in_channels']} channels in and {theirs['out_channels']} out: "
                "only text-to-video transformers can be imported, which have as many out as in"
            )
        return DiTConfig(
            in_channels=theirs["in_channels"],
            hidden_size=dim,
            depth=theirs["num_layers"],
            num_heads=theirs["num_attention_heads"],
            patch_size=tuple(theirs["patch_size"]),
            pattern=pattern,
            cross_attention="stf",
            text_dim=theirs["text_dim"],
            text_length=TEXT_LENGTH,
            pooled_text=False,
            mask_text=False,
            mlp_ratio=theirs["ffn_dim"] / dim,
            qk_norm="all",
            final_modulation="bias",
            frequency_dim=theirs["freq_dim"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / 'config.json'} is no config of a WanTransformer3DModel: {error}") from None
    except ValueError as error:
        raise UserError(f"{folder} cannot be imported: {error}") from None


def our_name(theirs: str) -> str | None:
    """Where a weight of `WanTransformer3DModel` goes in VideoDiT; None if there is no such place."""
    for pattern, ours in _NAMES.items():
        match = re.match(pattern, theirs)
        if match and (match.end() == len(theirs) or pattern.endswith(r"\.")):
            return ours.format(*match.groups()) + theirs[match.end() :]
    return None


def _reorder(name: str, value: Tensor, config: DiTConfig) -> Tensor:
    pt, ph, pw = config.patch_size
    if name == "patch_in.weight":  # a convolution there: d c pt ph pw
        return value.flatten(1)
    if name.startswith("patch_out."):  # rows: channels last there, first here
        return rearrange(value, "(pt ph pw c) ... -> (c pt ph pw) ...", pt=pt, ph=ph, pw=pw).contiguous()
    if name.endswith(("modulation_bias", "final_modulation.bias")):
        return value.squeeze(0)
    return value


def _read_weights(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """(our name, tensor) of every weight, file after file."""
    for path in weight_files(folder, _WEIGHTS):
        if not path.is_file():
            raise UserError(f"{folder} has no weights: {path.name} is missing; copy it there")
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    ours = our_name(key)
                    if ours is None:
                        raise UserError(f"{path} has a weight that no Wan 2.1 text-to-video transformer has: {key}")
                    yield ours, file.get_tensor(key)
        except SafetensorError as error:
            raise UserError(f"{path} is truncated or damaged ({error}): copy it again") from None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except OSError:
        raise UserError(f"no such file: {path}; give a folder in diffusers' layout") from None
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from None
