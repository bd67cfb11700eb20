"""Text encoders behind one small interface, and the byte-level one that is trained jointly with the DiT (no download).

Legend: b batch, l words of a caption, u different words in the batch, n bytes of a word, d channels.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodit.models.folder import load_model, save_model

MAX_WORD_BYTES = 16


@dataclass
class TextFeatures:
    """What the DiT attends to.

    Attributes:
        embeddings: (b, l, d).
        mask: (b, l) bool, true where there is text; at least one token each.
    """

    embeddings: Tensor
    mask: Tensor


class TextEncoder(Protocol):
    """Captions in, features out; '' is the unconditional prompt of classifier-free guidance."""

    @property
    def dim(self) -> int:
        """Channels of the features."""

    def encode(self, captions: list[str]) -> TextFeatures:
        """Features of a batch of captions, on the encoder's device."""

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the encoder, or the reference to it, into a model folder."""


@dataclass(frozen=True)
class ByteTextConfig:
    """Shape of the byte-level text encoder."""

    dim: int = 256
    """channels of a word and of the output"""
    byte_dim: int = 64
    """channels of a byte inside a word"""
    depth: int = 2
    """transformer layers over the words"""
    num_heads: int = 4
    """attention heads of these layers"""
    max_words: int = 64
    """words that are read of a caption; the rest is cut"""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"text.dim {self.dim} is not a multiple of text.num_heads {self.num_heads}")


@dataclass
class ByteTokens:
    """A batch of captions as bytes, each different word once.

    Attributes:
        words: (u, n) uint8 values + 1, 0 is padding; row 0 is the empty word that begins every caption.
        index: (b, l) row of `words`.
        mask: (b, l) bool.
    """

    words: Tensor
    index: Tensor
    mask: Tensor


def split_words(caption: str) -> list[bytes]:
    """UTF-8 bytes of a caption, split at white space and at MAX_WORD_BYTES (for scripts that write no spaces)."""
    return [
        word[start : start + MAX_WORD_BYTES]
        for word in caption.encode("utf-8").split()
        for start in range(0, len(word), MAX_WORD_BYTES)
    ]


def tokenize(captions: list[str], max_words: int) -> ByteTokens:
    """Captions to bytes; every caption begins with the empty word, so that '' has one token."""
    rows: dict[bytes, int] = {b"": 0}
    sentences = [[0, *(rows.setdefault(w, len(rows)) for w in split_words(c)[: max_words - 1])] for c in captions]
    width = max(len(word) for word in rows) or 1
    length = max(len(sentence) for sentence in sentences)
    words = torch.zeros(len(rows), width, dtype=torch.long)
    for word, row in rows.items():
        words[row, : len(word)] = torch.tensor(list(word), dtype=torch.long) + 1
    index = torch.tensor([sentence + [0] * (length - len(sentence)) for sentence in sentences])
    mask = torch.tensor([[i < len(sentence) for i in range(length)] for sentence in sentences])
    return ByteTokens(words, index, mask)


class WordTransformerLayer(nn.Module):
    """Pre-norm self-attention over the words of a caption, then an MLP."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """(b, l, d) -> the same; mask is (b, 1, 1, l) bool."""
        hidden = self.norm1(x)
        query, key, value = (
            layer(hidden).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        x = x + self.proj(attended.transpose(1, 2).flatten(-2))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)), approximate="tanh"))


class ByteTextEncoder(nn.Module):
    """Reads UTF-8 bytes: convolutions make one vector of each word, a small transformer reads the words in order.

    No vocabulary: a word it has never seen is read letter by letter like any other. Every different word of a batch is
    read once.
    Source: Kim et al. (2016), character-aware neural language models, arXiv:1508.06615.
    """

    # Embeddings and what follows them directly: Muon is meant for the hidden matrices only.
    muon_exclude = ("byte_embedding", "byte_position", "word_position")

    def __init__(self, config: ByteTextConfig) -> None:
        super().__init__()
        self.config = config
        self.byte_embedding = nn.Embedding(257, config.byte_dim)
        self.byte_position = nn.Parameter(torch.empty(MAX_WORD_BYTES, config.byte_dim))
        self.conv1 = nn.Conv1d(config.byte_dim, 2 * config.byte_dim, 3, padding=1)
        self.conv2 = nn.Conv1d(2 * config.byte_dim, config.dim, 3, padding=1)
        self.word_position = nn.Parameter(torch.empty(config.max_words, config.dim))
        self.layers = nn.ModuleList(WordTransformerLayer(config.dim, config.num_heads) for _ in range(config.depth))
        self.norm_out = nn.LayerNorm(config.dim)
        self.init_weights()

    @property
    def dim(self) -> int:
        """Channels of the features."""
        return self.config.dim

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every initialisation of the encoder.

        Embeddings: normal 1 (bytes) and 0.1 (positions). Linear layers: Xavier uniform, biases zero, the two that end a
        residual branch scaled by 1/sqrt(2 depth). Convolutions: He normal, biases zero.
        """
        nn.init.normal_(self.byte_embedding.weight)
        nn.init.normal_(self.byte_position, std=0.1)
        nn.init.normal_(self.word_position, std=0.1)
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
            if isinstance(module, (nn.Conv1d, nn.Linear)) and module.bias is not None:
                nn.init.zeros_(module.bias)
        for layer in cast("Iterable[WordTransformerLayer]", self.layers):
            layer.proj.weight.mul_((2 * self.config.depth) ** -0.5)
            layer.fc2.weight.mul_((2 * self.config.depth) ** -0.5)

    def encode(self, captions: list[str]) -> TextFeatures:
        """Captions -> features (b, l, d) with their mask."""
        tokens = tokenize(captions, self.config.max_words)
        device = self.byte_embedding.weight.device
        mask = tokens.mask.to(device)
        return TextFeatures(self(tokens.words.to(device), tokens.index.to(device), mask), mask)

    def forward(self, words: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """See `ByteTokens` for the arguments. Gives (b, l, d), a plain tensor: ZeRO-3's hooks see into no dataclass."""
        padding = (words == 0)[:, None]  # u 1 n
        x = self.byte_embedding(words) + self.byte_position[: words.shape[1]]  # u n byte_dim
        # Zeros behind a word, as the convolutions see them behind the longest one: a word's neighbours change nothing.
        x = x.transpose(1, 2).masked_fill(padding, 0.0)
        x = F.silu(self.conv1(x)).masked_fill(padding, 0.0)
        x = self.conv2(x)  # u d n
        x = x.masked_fill(padding, -torch.inf).amax(dim=-1)  # u d
        x = x.masked_fill(x.isinf(), 0.0)  # the empty word has no bytes
        x = x[index] + self.word_position[: index.shape[1]]  # b l d
        for layer in self.layers:
            x = layer(x, mask[:, None, None])
        return self.norm_out(x)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        save_model(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "ByteTextEncoder":
        """Loads what `save_pretrained` wrote, in evaluation mode; raises UserError if the folder is not whole."""
        return load_model(cls, ByteTextConfig, folder)
