"""Models of the `transformers` library that look at pictures: how well a text fits, how good it looks, what it shows.

All are read from local folders, with safetensors weights; image processors that need no torchvision are enough. The
frames of a clip are (h, w, 3) uint8 RGB arrays.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from videodit.errors import MissingExtra, UserError
from videodit.models.text_transformers import no_progress_bar


class ImageTextMatcher:
    """A CLIP-like model: pictures and texts as directions in one space.

    Args:
        source: folder of a model with get_image_features and get_text_features (CLIP, SigLIP).
        device: where to compute; bf16 on a GPU.
    Raises:
        MissingExtra: if transformers is not installed.
        UserError: if the folder does not hold such a model, its image processor and its tokenizer.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        features = ("get_image_features", "get_text_features")
        self._model = _load(source, "AutoModel", device, features, "give a folder of CLIP or SigLIP")
        self._processor = _load_processor(source, "AutoImageProcessor")
        self._tokenizer = _load_processor(source, "AutoTokenizer")
        self._length = int(self._model.config.text_config.max_position_embeddings)

    @torch.no_grad()
    def images(self, clips: Sequence[Sequence[np.ndarray]]) -> Tensor:
        """(b, d) float32 of length 1: the mean direction of each clip's frames."""
        inputs = _pixels(self._processor, [frame for clip in clips for frame in clip], self._model)
        rows = _directions(self._model.get_image_features(**inputs)).split([len(clip) for clip in clips])
        return torch.nn.functional.normalize(torch.stack([of_clip.mean(0) for of_clip in rows]), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """(b, d) float32 of length 1; what is longer than the model reads is cut."""
        # SigLIP was trained with padding to the full length, and CLIP does not mind it.
        tokens = self._tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=self._length, return_tensors="pt"
        )
        inputs = {
            name: tokens[name].to(self._model.device) for name in ("input_ids", "attention_mask") if name in tokens
        }
        return _directions(self._model.get_text_features(**inputs))


class ImageScorer:
    """An image classifier with one output: a score, such as how good a picture looks.

    Args:
        source: folder of a model for AutoModelForImageClassification.
        device: where to compute; bf16 on a GPU.
    Raises:
        MissingExtra: if transformers is not installed.
        UserError: if the folder does not hold such a model with one output, and its image processor.
    """

    def __init__(self, source: str, device: torch.device) -> None:
        self._model = _load(source, "AutoModelForImageClassification", device)
        if self._model.config.num_labels != 1:
            raise UserError(
                f"{source} has {self._model.config.num_labels} outputs: a model with one, the score, is needed"
            )
        self._processor = _load_processor(source, "AutoImageProcessor")

    @torch.no_grad()
    def score(self, clips: Sequence[Sequence[np.ndarray]]) -> list[float]:
        """The mean score of each clip's frames."""
        inputs = _pixels(self._processor, [frame for clip in clips for frame in clip], self._model)
        rows = self._model(**inputs).logits[:, 0].float().cpu().split([len(clip) for clip in clips])
        return [float(of_clip.mean()) for of_clip in rows]


class Captioner:
    """A vision-language model that says what a clip shows.

    A model with a chat template (LLaVA, Qwen-VL) sees all frames and the prompt; one without (BLIP, GIT) sees the
    middle frame alone.

    Args:
        source: folder of a model for AutoModelForImageTextToText.
        device: where to compute; bf16 on a GPU.
        prompt: what a model that chats is asked.
        max_tokens: of a caption, at most.
    Raises:
        MissingExtra: if transformers is not installed.
        UserError: if the folder does not hold such a model and its processor.
    """

    def __init__(self, source: str, device: torch.device, prompt: str, max_tokens: int) -> None:
        self._model = _load(source, "AutoModelForImageTextToText", device)
        self._processor = _load_processor(source, "AutoProcessor")
        self._prompt, self._max_tokens = prompt, max_tokens
        self._chats = bool(getattr(self._processor, "chat_template", None))
        if self._chats:
            self._processor.tokenizer.padding_side = "left"  # the answer follows at once
        else:
            text = self._model.config.get_text_config()
            self._max_tokens = min(max_tokens, getattr(text, "max_position_embeddings", max_tokens + 1) - 1)

    @torch.no_grad()
    def caption(self, clips: Sequence[Sequence[np.ndarray]]) -> list[str]:
        """A caption of each clip, on one line; the likeliest words, so that it is always the same."""
        inputs = self._questions(clips) if self._chats else self._middles(clips)
        words = self._model.generate(**inputs, max_new_tokens=self._max_tokens, do_sample=False)
        asked = inputs.get("input_ids")
        if asked is not None and words.shape[1] >= asked.shape[1] and torch.equal(words[:, : asked.shape[1]], asked):
            words = words[:, asked.shape[1] :]
        return [" ".join(text.split()) for text in self._processor.batch_decode(words, skip_special_tokens=True)]

    def _middles(self, clips: Sequence[Sequence[np.ndarray]]) -> dict[str, Tensor]:
        return _pixels(self._processor.image_processor, [clip[len(clip) // 2] for clip in clips], self._model)

    def _questions(self, clips: Sequence[Sequence[np.ndarray]]) -> dict[str, Tensor]:
        texts = []
        for clip in clips:
            content = [*({"type": "image"} for _ in clip), {"type": "text", "text": self._prompt}]
            chat = [{"role": "user", "content": content}]
            texts.append(self._processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        images = [list(clip) for clip in clips]
        return _placed(self._processor(text=texts, images=images, padding=True, return_tensors="pt"), self._model)


def _load(
    source: str, auto_class: str, device: torch.device, methods: Sequence[str] = (), fix: str = "it is of another kind"
) -> Any:
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "text") from None
    if not (Path(source) / "config.json").is_file():
        raise UserError(f"{source} is not a folder with config.json: give a local transformers folder")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        with _quiet(transformers.utils.logging):
            model, loaded = getattr(transformers, auto_class).from_pretrained(
                source, local_files_only=True, use_safetensors=True, dtype=dtype, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"{source} cannot be loaded: {' '.join(str(error).split())[:300]}") from None
    if absent := [method for method in methods if not hasattr(model, method)]:
        raise UserError(f"{source} is a {type(model).__name__} without {absent[0]}: {fix}")
    if missing := sorted(loaded["missing_keys"]):  # transformers would go on with random weights
        raise UserError(
            f"{source} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]} for one: {fix}"
        )
    return model.eval().requires_grad_(False).to(device)


@contextmanager
def _quiet(logging: Any) -> Iterator[None]:
    """What transformers would report of weights is said in one line of our own."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_progress_bar(logging):
            yield
    finally:
        logging.set_verbosity(verbosity)


def _load_processor(source: str, auto_class: str) -> Any:
    import transformers

    try:
        with _quiet(transformers.utils.logging):  # it would ask for torchvision, and does without
            return getattr(transformers, auto_class).from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        kind = auto_class.removeprefix("Auto")
        raise UserError(f"{source} has no usable {kind}: {' '.join(str(error).split())[:300]}") from None


def _pixels(processor: Any, images: list[np.ndarray], model: Any) -> dict[str, Tensor]:
    return _placed(processor(images=images, return_tensors="pt"), model)


def _placed(inputs: Any, model: Any) -> dict[str, Tensor]:
    """On the model's device, floats in its dtype."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def _directions(output: Any) -> Tensor:
    """(b, d) float32 of length 1, on the CPU."""
    features: Tensor = getattr(output, "pooler_output", output)
    return torch.nn.functional.normalize(features.float(), dim=-1).cpu()
