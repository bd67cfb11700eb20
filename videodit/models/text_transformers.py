"""Frozen text encoders of the `transformers` library (T5, UMT5, CLIP's text tower), with the interface of `text.py`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from videodit.errors import MissingExtra, UserError
from videodit.models.folder import WEIGHTS_NAME, weight_files
from videodit.models.text import TextFeatures

REFERENCE_NAME = "reference.json"
MAX_LENGTH = 128
"""Tokens that are read of a caption unless something else is said."""
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json")
# Encoder-only classes by config.model_type: AutoModel would build T5's decoder too.
_ENCODER_CLASSES = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


class TransformersTextEncoder:
    """A frozen encoder from a local folder; its weights stay where they are, a model folder keeps a reference.

    Args:
        source: folder with config.json, safetensors weights and tokenizer; or, as in diffusers' layout, with the
            tokenizer in a folder `tokenizer` beside it.
        max_length: tokens that are read of a caption, at most what the encoder has positions for; the rest is cut.
        device: where to compute.
        dtype: of the weights.
        read_weights: False only looks whether they are all there, in a second: for those who only need to know where
            the encoder lies. It cannot `encode` then.
    Raises:
        MissingExtra: if transformers is not installed.
        UserError: if the folder is no encoder that we know, or its tokenizer or weights are missing or damaged.
    """

    def __init__(
        self,
        source: str | Path,
        max_length: int = MAX_LENGTH,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        read_weights: bool = True,
    ) -> None:
        transformers, encoder_class = _find(source)
        self.source = str(source)
        # transformers would go on with an empty vocabulary, or with random weights: both are refused here.
        tokenizer = tokenizer_folder(source)
        if tokenizer is None:
            raise UserError(
                f"text encoder {source} has no tokenizer ({', '.join(_TOKENIZER_FILES)}): copy it there too"
            )
        try:
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(tokenizer, local_files_only=True)
            model: Any
            given: dict[str, Any] = {"pretrained_model_name_or_path": source, "local_files_only": True}
            if not read_weights:
                config = encoder_class.config_class.from_pretrained(**given)
                given = {"pretrained_model_name_or_path": None, "config": config, "state_dict": _hollow_weights(source)}
                dtype = torch.float32
            with no_progress_bar(transformers.utils.logging):
                model, loaded = encoder_class.from_pretrained(
                    **given, use_safetensors=True, dtype=dtype, output_loading_info=True
                )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(f"text encoder {source} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
        missing = sorted(loaded["missing_keys"])
        if missing:
            raise UserError(
                f"text encoder {source} lacks {len(missing)} weights, {missing[0]} for one: copy the folder again"
            )
        self.max_length = readable_length(model, max_length)
        self._config = model.config
        self._model = model.eval().requires_grad_(False).to(device) if read_weights else None
        self._device = torch.device(device)

    @property
    def dim(self) -> int:
        """Channels of the features."""
        return int(getattr(self._config, "d_model", None) or self._config.hidden_size)

    @torch.no_grad()
    def encode(self, captions: list[str]) -> TextFeatures:
        """Captions -> last hidden states (b, l, d), zero at padding, with their mask; l is the longest caption's.

        Raises:
            ValueError: if it was opened without its weights.
        """
        if self._model is None:
            raise ValueError(f"text encoder {self.source} was opened without its weights: read_weights is False")
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


def _hollow_weights(source: str | Path) -> dict[str, torch.Tensor]:
    """The weights of a folder by name, each a single zero in the weight's shape: only the files' headers are read."""
    whole = Path(source) / WEIGHTS_NAME
    weights: dict[str, torch.Tensor] = {}
    for path in [whole] if whole.is_file() else weight_files(Path(source), WEIGHTS_NAME):
        with safe_open(path, framework="pt") as file:
            weights |= {name: torch.zeros(()).expand(file.get_slice(name).get_shape()) for name in file.keys()}
    return weights


def _find(source: str | Path) -> tuple[Any, Any]:
    """The transformers library, and its class for the encoder of a folder."""
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "text") from None
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"text encoder {source} is not a folder with config.json: give a local transformers folder")
    try:
        model_type = dict(json.loads((Path(source) / "config.json").read_text())).get("model_type")
    except (ValueError, TypeError) as error:
        raise UserError(f"{Path(source) / 'config.json'} is damaged ({error}): copy the folder again") from None
    if model_type not in _ENCODER_CLASSES:
        kind = f"a {model_type}" if model_type else "no model of the transformers library"
        raise UserError(f"text encoder {source} is {kind}: give one of {', '.join(sorted(_ENCODER_CLASSES))}")
    return transformers, getattr(transformers, _ENCODER_CLASSES[model_type])


def empty_encoder(source: str | Path) -> nn.Module:
    """The encoder of a folder with the shapes of its config.json and no weights, on torch's default device.

    Raises:
        MissingExtra: if transformers is not installed.
        UserError: if the folder is no encoder that we know.
    """
    _, encoder_class = _find(source)
    encoder: nn.Module = encoder_class(encoder_class.config_class.from_pretrained(source, local_files_only=True))
    return encoder.eval().requires_grad_(False)


def readable_length(encoder: Any, max_length: int) -> int:
    """Tokens that it reads of a caption: CLIP has positions for 77, T5 for any number."""
    return int(min(max_length, getattr(encoder.config, "max_position_embeddings", None) or max_length))


@contextmanager
def no_progress_bar(logging: Any) -> Iterator[None]:
    """A bar for weights that lie on this disk would stand between a verb's own lines."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def tokenizer_folder(source: str | Path) -> Path | None:
    """Where the tokenizer of an encoder's folder lies: in it, or in `tokenizer` beside it; None if in neither."""
    folders = (Path(source), Path(source).resolve().parent / "tokenizer")
    return next((folder for folder in folders if any((folder / name).is_file() for name in _TOKENIZER_FILES)), None)
