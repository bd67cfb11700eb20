"""Which models look at clips in ingest, and how."""

import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from videodit.data.files_fingerprint import files_fingerprint
from videodit.data.shards import json_bytes, sha256_hex
from videodit.errors import MissingExtra, UserError

SCORES = frozenset(["text_match", "aesthetic"])
"""Names of the models' scores in the index."""
_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.safetensors")


@dataclass(frozen=True)
class ModelsConfig:
    """Models that look at clips, each a local folder of the transformers library; by default none."""

    match: str = ""
    """CLIP or SigLIP: how well captions fit the frames; `filters.min_match`"""
    aesthetic: str = ""
    """An image classifier with one output: how good frames look; `filters.min_aesthetic`"""
    caption: str = ""
    """A vision-language model (LLaVA, Qwen-VL, BLIP) that writes a caption for every clip"""
    caption_prompt: str = "Describe what happens in this video in one or two sentences."
    """What a model that chats is asked"""
    caption_tokens: int = 96
    """Longest caption, in the model's tokens"""
    caption_weight: float = 1.0
    """How often training reads the model's caption, where 1 is a caption that the clip came with"""
    keep_captions: bool = True
    """Whether training still reads the captions that clips came with"""
    frames: int = 4
    """Frames of a clip that models see"""
    batch_size: int = 16
    """Clips that a model sees at once"""
    device: str = "auto"
    """auto, cpu or cuda"""

    def __post_init__(self) -> None:
        for name in ("caption_tokens", "frames", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"models.{name} is {getattr(self, name)}: at least 1 is needed")
        if not 0 < self.caption_weight < float("inf"):
            raise ValueError(f"models.caption_weight is {self.caption_weight}: a number above 0 is needed")

    @property
    def reads_captions(self) -> bool:
        """Whether training reads the captions that clips came with."""
        return self.keep_captions or not self.caption

    def record(self) -> dict[str, Any]:
        """What the index depends on: the models' contents and how they are used; nothing without models.

        Raises:
            UserError: if a folder cannot be read.
        """
        record: dict[str, Any] = {}
        if self.match or self.aesthetic or self.caption:
            others = ("batch_size", "device")
            record = {name: value for name, value in asdict(self).items() if name not in others}
            record |= {kind: self.identity(kind) for kind in ("match", "aesthetic", "caption")}
        return record

    def identity(self, kind: str) -> str:
        """A hash of all that one model's answers depend on; empty without that model."""
        folder = getattr(self, kind)
        if not folder:
            return ""
        if not (Path(folder) / "config.json").is_file():
            raise UserError(
                f"models.{kind} {folder} is no folder with config.json: give a local folder of the transformers library"
            )
        if importlib.util.find_spec("transformers") is None:  # said before hours of decoding
            raise MissingExtra("transformers", "text")
        used: list[Any] = [files_fingerprint(folder, _FILES), self.frames]
        if kind == "caption":
            used += [self.caption_prompt, self.caption_tokens]
        return sha256_hex(json_bytes(used))[:16]
