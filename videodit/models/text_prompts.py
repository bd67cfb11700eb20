"""Prompts that were read beforehand, in place of a text encoder that is too large to be kept beside a training run."""

from collections.abc import Sequence
from pathlib import Path

from videodit.models.text import TextEncoder, TextFeatures


class EncodedPrompts:
    """Answers for a few known prompts, and for '', what an encoder answered once; the encoder itself is not kept.

    Args:
        encoder: a frozen text encoder.
        prompts: that will be asked for.
    """

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str]) -> None:
        known = list(dict.fromkeys([*prompts, ""]))
        self._rows = {prompt: row for row, prompt in enumerate(known)}
        self._features = encoder.encode(known)

    @property
    def dim(self) -> int:
        """Channels of the features."""
        return self._features.embeddings.shape[-1]

    def encode(self, captions: list[str]) -> TextFeatures:
        """Known prompts -> features (b, l, d) with their mask; l is the longest known prompt's.

        Raises:
            KeyError: for a prompt that was not given.
        """
        rows = [self._rows[caption] for caption in captions]
        return TextFeatures(self._features.embeddings[rows], self._features.mask[rows])

    def save_pretrained(self, folder: str | Path) -> None:
        """A model folder needs the encoder itself.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{folder}: a few encoded prompts are no text encoder; save the one that read them")
