"""Tiny models with random weights, saved as the transformers library saves its own."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

SIDE = 16
_TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
_VISION = _TOWER | {"image_size": SIDE, "patch_size": 8}
_SPECIAL = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
_CROP = {"size": {"shortest_edge": SIDE}, "crop_size": {"height": SIDE, "width": SIDE}}
_SQUARE = {"size": {"height": SIDE, "width": SIDE}}
_TEXT = {"vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_CHAT = (
    "{% for turn in messages %}{% for part in turn['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token for each character of ASCII."""
    words = {token: number for number, token in enumerate([*_SPECIAL, *map(chr, range(32, 127))])}
    table = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    table.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=table, additional_special_tokens=["<image>"], model_max_length=64, **names
    )


def save_clip(folder: Path, seed: int = 0) -> None:
    torch.manual_seed(seed)
    text = _TOWER | _TEXT | {"max_position_embeddings": 32}
    config = transformers.CLIPConfig(text_config=text, vision_config=_VISION, projection_dim=8)
    transformers.CLIPModel(config).save_pretrained(folder)
    transformers.CLIPImageProcessor(**_CROP).save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def save_scorer(folder: Path, outputs: int = 1) -> None:
    torch.manual_seed(1)
    transformers.ViTForImageClassification(transformers.ViTConfig(**_VISION, num_labels=outputs)).save_pretrained(
        folder
    )
    transformers.ViTImageProcessor(**_SQUARE).save_pretrained(folder)


def save_blip(folder: Path) -> None:
    torch.manual_seed(2)
    text = _TOWER | _TEXT | {"max_position_embeddings": 32, "encoder_hidden_size": 16, "sep_token_id": 2}
    config = transformers.BlipConfig(
        text_config=text | {"projection_dim": 8}, vision_config=_VISION, projection_dim=8, image_text_hidden_size=8
    )
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    transformers.BlipProcessor(transformers.BlipImageProcessor(**_SQUARE), tokenizer()).save_pretrained(folder)


def save_llava(folder: Path) -> None:
    torch.manual_seed(3)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**_VISION),
        text_config=transformers.LlamaConfig(**_TOWER, **_TEXT, max_position_embeddings=256),
        image_token_id=_SPECIAL.index("<image>"),
        vision_feature_layer=-1,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    processor = transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(**_CROP),
        tokenizer(),
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_CHAT,
    )
    processor.save_pretrained(folder)
