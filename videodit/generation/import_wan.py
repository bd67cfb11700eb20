"""`videodit import wan`: a published Wan 2.1 text-to-video model, in diffusers' layout, as a videodit model folder."""

import json
from pathlib import Path
from typing import Any

from videodit.errors import UserError
from videodit.flow.path import Parameterization
from videodit.generation.pipeline import SamplingDefaults, TextToVideo
from videodit.models.folder import check_out, write_readme
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.text_transformers import TransformersTextEncoder
from videodit.models.vae_wan import WanVAE
from videodit.models.wan import TEXT_LENGTH, read_wan_transformer

PARTS = ("transformer", "vae", "text_encoder")
SHIFT = 3.0
"""of the sampling noise levels where the scheduler says nothing: 480p, Wan Team (2025), its published code"""


def import_wan(src: str | Path, out: str | Path, pattern: str = "f") -> Path:
    """Writes a model folder that `generate` and `train dit --init` read.

    DiT and VAE are copied; the text encoder stays where it is, and the folder keeps a reference to it.

    Args:
        src: with transformer/, vae/, text_encoder/ and tokenizer/, as diffusers lays a model out.
        out: folder to write.
        pattern: attention of the DiT's blocks: f as published, or for example st for a factorized start.
    Returns:
        out.
    Raises:
        UserError: if src is no such model or not whole, or out cannot be written.
        MissingExtra: if diffusers or transformers is not installed.
    """
    src, out = Path(src), Path(out)
    if not src.is_dir():
        raise UserError(f"no such folder: {src}; give a Wan 2.1 model in diffusers' layout")
    for part in PARTS:
        if not (src / part / "config.json").is_file():
            raise UserError(f"{src} has no {part}/config.json: give a Wan 2.1 model in diffusers' layout")
    if (src / "transformer_2").is_dir():
        raise UserError(f"{src} has two transformers (Wan 2.2): only Wan 2.1 text-to-video models can be imported")
    dit = read_wan_transformer(src / "transformer", pattern)
    check_out(out)
    vae = WanVAE.from_pretrained(src / "vae")
    if vae.config.latent_channels != dit.config.in_channels:
        raise UserError(
            f"{src}: the VAE has {vae.config.latent_channels} latent channels, the transformer {dit.config.in_channels}"
        )
    encoder = TransformersTextEncoder((src / "text_encoder").resolve(), TEXT_LENGTH, read_weights=False)
    if encoder.dim != dit.config.text_dim:
        raise UserError(
            f"{src}: the text encoder gives {encoder.dim} channels, the transformer reads {dit.config.text_dim}"
        )
    defaults = SamplingDefaults(
        num_frames=81, height=480, width=832, fps=16.0, num_steps=50, guidance_scale=5.0, shift=_shift(src)
    )
    TextToVideo(TextToVideoModel(dit, None), vae, encoder, Parameterization(), defaults).save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in dit.parameters())
    write_readme(out, "import wan", {"source": src, "pattern": pattern, "parameters of the DiT": parameters})
    return out


def _shift(src: Path) -> float:
    """The shift that the model's scheduler was published with."""
    path = src / "scheduler" / "scheduler_config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
        return float(config.get("flow_shift") or config.get("shift") or SHIFT)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it again") from None
