"""The module that a DiT run trains: how it is built, where its weights come from, and what becomes of them."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from videodit.data.batches import LatentBatch
from videodit.errors import UserError
from videodit.generation.pipeline import TextToVideo
from videodit.models.dit import VideoDiT
from videodit.models.dit_block import DiTBlock
from videodit.models.folder import WEIGHTS_NAME, read_weights, weights_sha256
from videodit.models.initialise import whole
from videodit.models.level_error import LevelError
from videodit.models.lora import add_lora, merge_lora
from videodit.models.text import ByteTextEncoder, TextFeatures
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.text_transformers import TransformersTextEncoder
from videodit.models.vae_folder import load_vae
from videodit.training.checkpoint import Checkpoint, load_average
from videodit.training.dit_config import DiTRunConfig
from videodit.training.engine import gather_at_once

MOST_GRAPHS = 64
"""Of compiled blocks: three kinds; first sizes, any frames, positions or words, one frame, one word; to sample, too."""


def build_model(config: DiTRunConfig) -> TextToVideoModel:
    """The module of a run with fresh weights, before LoRA; without text_encoder if that is frozen."""
    encoder = None if config.text_encoder else ByteTextEncoder(config.text)
    level_error = LevelError() if config.weighting == "learned" else None
    return TextToVideoModel(VideoDiT(config.model), encoder, level_error)


def fine_tuned(model: TextToVideoModel, config: DiTRunConfig) -> TextToVideoModel:
    """The module with what training starts from and, with LoRA, all weights frozen beside its own.

    Raises:
        UserError: if init is not whole or does not fit, or the rank of LoRA is above that of a layer.
    """
    if config.init:
        load_init(model, config.init)
    if config.lora.rank:
        for part in (model.dit, model.text_encoder):
            if part is not None:
                part.requires_grad_(False)
        try:
            add_lora(model.dit.blocks, config.lora)
        except ValueError as error:
            raise UserError(str(error)) from None
    return model


def frozen_facts(config: DiTRunConfig) -> dict[str, Any]:
    """What a run with LoRA must find again when it goes on, for its checkpoints do not hold it."""
    assert config.init is not None  # LoRA needs one
    parts = [name for name in ("dit", "text_encoder") if (Path(config.init) / name / WEIGHTS_NAME).is_file()]
    return {f"init/{name}": weights_sha256(Path(config.init), name) for name in parts} | {
        "lora.alpha": config.lora.alpha
    }


def compile_blocks(dit: VideoDiT, *, exchanging: bool = False, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each block's forward function, as one graph; blocks of a kind share it.

    The function and not the block: ZeRO-3's hooks stay outside, where a block's weights are gathered for all of it. So
    call it before the engine takes the model.

    Args:
        dit: its blocks are compiled when they first run.
        exchanging: whether ranks share a clip's tokens: full attention then exchanges them in the middle of a block,
            which may be two graphs.
        backend: of torch.compile.
    """
    limits = torch._dynamo.config  # of all graphs of a function, which blocks of all kinds share
    limits.recompile_limit = max(limits.recompile_limit, MOST_GRAPHS)
    for block in cast("Iterable[DiTBlock]", dit.blocks):
        fullgraph = not (exchanging and block.kind == "f")
        block.forward = torch.compile(block.forward, fullgraph=fullgraph, backend=backend)  # type: ignore[method-assign]
        text = block.cross_attention
        gather_at_once(block, kept=[] if text is None else [text.key, text.value])  # see VideoDiT.text_context


@torch.no_grad()
def load_init(model: TextToVideoModel, folder: str) -> None:
    """Fills the DiT, and a text encoder that is trained with it, with a model folder's weights.

    Raises:
        UserError: if the folder is not whole, or its weights do not fit its config.
    """
    for name in ("dit", "text_encoder"):
        part = getattr(model, name)
        if part is None:
            continue
        weights = read_weights(Path(folder) / name)
        own = dict(part.named_parameters())
        if weights.keys() != own.keys():
            odd = sorted(weights.keys() ^ own.keys())[0]
            raise UserError(f"{Path(folder) / name} does not fit its config.json: {odd}; export the run again")
        for key, parameter in own.items():
            with whole(parameter):
                parameter.copy_(weights[key])


def read_text(batch: LatentBatch, device: torch.device, dtype: torch.dtype) -> list[str] | TextFeatures:
    """What the module reads: captions, or their embeddings on the device where a frozen encoder made them."""
    if batch.text is None or batch.text_mask is None:
        return batch.captions
    return TextFeatures(batch.text.to(device, dtype), batch.text_mask.to(device))


def export_dit(
    config: DiTRunConfig, checkpoint: Checkpoint, out: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes the model folder of a run: averaged weights of DiT and text encoder (or where it lies), and the VAE.

    Args:
        config: of the run, as its folder has it.
        checkpoint: of the run.
        out: folder to write.
        weights: an average by parameter name; None for the run's first.
    """
    model = build_model(config)
    if config.lora.rank:
        model = fine_tuned(model, config)
    load_average(model, checkpoint, weights)
    merge_lora(model.dit)
    assert config.vae is not None  # a run's own config has it
    vae = load_vae(config.vae)
    text_encoder = model.text_encoder or frozen_text_encoder(config, read_weights=False)
    TextToVideo(model, vae, text_encoder, config.flow, config.sampling).save_pretrained(out)


def frozen_text_encoder(
    config: DiTRunConfig,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    read_weights: bool = True,
) -> TransformersTextEncoder:
    """The encoder that made the latents' embeddings: for prompts, or, without its weights, for a reference to it.

    Raises:
        UserError: if its folder is gone.
    """
    assert config.text_encoder is not None  # a run without one has its own in the model
    source, length = config.text_encoder, config.text_max_length
    return TransformersTextEncoder(source, length, device, dtype, read_weights=read_weights)
