"""Loading whichever text encoder a model folder holds."""

import json
from pathlib import Path

import torch

from videodit.errors import UserError
from videodit.models.text import ByteTextEncoder, TextEncoder
from videodit.models.text_transformers import REFERENCE_NAME, TransformersTextEncoder


def load_text_encoder(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> TextEncoder:
    """The byte-level encoder (config.json + model.safetensors) or a reference to a `transformers` one.

    Raises:
        UserError: if the folder holds neither.
    """
    folder = Path(folder)
    reference = folder / REFERENCE_NAME
    if reference.is_file():
        try:
            values = json.loads(reference.read_text())
            source, max_length = str(values["source"]), int(values["max_length"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{reference} is damaged ({error}): export the run again") from None
        return TransformersTextEncoder(source, max_length=max_length, device=device, dtype=dtype)
    return ByteTextEncoder.from_pretrained(folder).to(device, dtype)
