"""Frozen text encoders of the `transformers` library (T5, UMT5, CLIP's text tower) behind the interface of `text.py`."""

import json
from pathlib import Path
from typing import Any

import torch

from videodit.errors import MissingExtra, UserError
from videodit.models.text import TextFeatures

REFERENCE_NAME = "reference.json"
# Encoder-only classes by config.model_type: AutoModel would build T5's decoder too.
_ENCODER_CLASSES = {"t5": "T5EncoderModel", "umt5": "UMT5EncoderModel", "clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"}


class TransformersTextEncoder:
    """A frozen encoder from a local folder; its weights stay where they are, a model folder keeps a reference.

    Args:
        source: folder with config.json, tokenizer and safetensors weights.
        max_length: tokens that are read of a caption; the rest is cut.
        device: where to compute.
        dtype: of the weights.
    Raises:
        MissingExtra: if transformers is not installed.
        UserError: if the folder is no encoder that we know, or its weights are missing.
    """

    def __init__(
        self,
        source: str | Path,
        max_length: int = 128,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        try:
            import transformers
        except ImportError:
            raise MissingExtra("transformers", "text") from None
        self.source, self.max_length = str(source), max_length
        if not (Path(source) / "config.json").is_file():
            raise UserError(f"text encoder {source} is not a folder with config.json: give a local transformers folder")
        model_type = json.loads((Path(source) / "config.json").read_text()).get("model_type")
        if model_type not in _ENCODER_CLASSES:
            raise UserError(f"text encoder {source} is a {model_type!r}: give one of {', '.join(sorted(_ENCODER_CLASSES))}")
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True)
            model: Any = getattr(transformers, _ENCODER_CLASSES[model_type]).from_pretrained(
                source, local_files_only=True, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError) as error:
            raise UserError(f"text encoder {source} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        self._model = model.eval().requires_grad_(False).to(device)
        self._device = torch.device(device)

    @property
    def dim(self) -> int:
        """Channels of the features."""
        config = self._model.config
        return int(getattr(config, "d_model", None) or config.hidden_size)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextFeatures:
        """Captions -> last hidden states (b, l, d), zero at padding, with their mask; l is the longest caption's."""
        tokens = self._tokenizer(
            captions, padding="longest", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(self._device)
        hidden = self._model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
        mask = tokens.attention_mask.bool()
        return TextFeatures(hidden * mask[..., None], mask)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the reference: where the encoder lies and how many tokens it reads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        text = json.dumps({"source": self.source, "max_length": self.max_length}, indent=2)
        (Path(folder) / REFERENCE_NAME).write_text(text + "\n")
