"""Text encoders behind one small interface, and the byte-level one that is trained jointly with the DiT (no download).

Legend: b batch, l words of a caption, u different words in the batch, n n-grams of a word, d channels.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from videodit.models.folder import load_model, save_model
from videodit.models.initialise import init_norm, whole

MAX_WORD_BYTES = 16
GRAM_SIZES = (3, 4, 5)
"""bytes of the n-grams of a word, its two borders included"""


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
    buckets: int = 16384
    """rows of the table that n-grams are hashed into"""
    depth: int = 2
    """transformer layers over the words; 0 leaves each word to itself"""
    num_heads: int = 4
    """attention heads of these layers"""
    max_words: int = 64
    """words that are read of a caption; the rest is cut"""

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"text.dim {self.dim} is not a multiple of text.num_heads {self.num_heads}")
        if self.buckets < 2:
            raise ValueError(f"text.buckets {self.buckets} is below 2: use for example 16384")
        if self.depth < 0:
            raise ValueError(f"text.depth {self.depth} is negative: use 0 for none")


@dataclass
class ByteTokens:
    """A batch of captions as n-grams of bytes, each different word once.

    Attributes:
        grams: (u, n) rows of the hashed table, 0 is padding; row 0 is the empty word that begins every caption.
        index: (b, l) row of `grams`.
        mask: (b, l) bool.
    """

    grams: Tensor
    index: Tensor
    mask: Tensor


@lru_cache(maxsize=1 << 14)
def split_words(caption: str) -> tuple[bytes, ...]:
    """UTF-8 bytes of a caption, split at white space and at MAX_WORD_BYTES (for scripts that write no spaces)."""
    return tuple(
        word[start : start + MAX_WORD_BYTES]
        for word in caption.encode("utf-8").split()
        for start in range(0, len(word), MAX_WORD_BYTES)
    )


def word_grams(word: bytes) -> list[bytes]:
    """The word with its borders marked, and all its different n-grams of GRAM_SIZES bytes: "<red>", "<re", "red", …"""
    whole = b"<" + word + b">"
    grams = {whole[start : start + size]: None for size in GRAM_SIZES for start in range(len(whole) - size + 1)}
    return list({whole: None} | grams)


@lru_cache(maxsize=1 << 16)
def hashed_grams(word: bytes, buckets: int) -> tuple[int, ...]:
    """Rows of the table for the n-grams of a word; kept, as most words of a batch were in the ones before."""
    return tuple(1 + zlib.crc32(gram) % (buckets - 1) for gram in word_grams(word))


def tokenize(captions: list[str], max_words: int, buckets: int) -> ByteTokens:
    """Captions to hashed n-grams; every caption begins with the empty word, so that '' has one token."""
    rows: dict[bytes, int] = {b"": 0}
    sentences = [[0, *(rows.setdefault(w, len(rows)) for w in split_words(c)[: max_words - 1])] for c in captions]
    grams, index = _padded([hashed_grams(word, buckets) for word in rows]), _padded(sentences)
    lengths = torch.tensor([len(sentence) for sentence in sentences])
    return ByteTokens(grams, index, torch.arange(index.shape[1]) < lengths[:, None])


def _padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """Rows of different lengths, zeros behind the shorter ones: (rows, longest) int64."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])


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
    """Reads UTF-8 bytes: a word is the sum of its n-grams' vectors, and a small transformer reads the words in order.

    No vocabulary: n-grams are hashed into a table, so that a word it has never seen is read by its parts. Every
    different word of a batch is read once.
    Source: Bojanowski et al. (2017), fastText, arXiv:1607.04606, Sec. 3.2 (n-grams of a word, hashed); Pagnoni et al.
    (2024), Byte Latent Transformer, arXiv:2412.09871, Sec. 3.2.1 (of bytes).
    """

    # An embedding: Muon is meant for the hidden matrices only.
    muon_exclude = ("word_position",)

    def __init__(self, config: ByteTextConfig) -> None:
        super().__init__()
        self.config = config
        self.gram_embedding = nn.Embedding(config.buckets, config.dim)
        self.word_position = nn.Parameter(torch.zeros(config.max_words, config.dim))
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

        Embeddings: normal 1 (n-grams) and 0.1 (positions). Linear layers: Xavier uniform, biases zero, the two that end
        a residual branch scaled by 1/sqrt(2 depth). Norms: weight one, bias zero.
        """
        with whole(self.gram_embedding.weight):
            nn.init.normal_(self.gram_embedding.weight)
        with whole(self.word_position):
            nn.init.normal_(self.word_position, std=0.1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                with whole(module.weight, module.bias):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                init_norm(module)
        for layer in cast("Iterable[WordTransformerLayer]", self.layers):
            for weight in (layer.proj.weight, layer.fc2.weight):
                with whole(weight):
                    weight.mul_((2 * self.config.depth) ** -0.5)

    def encode(self, captions: list[str]) -> TextFeatures:
        """Captions -> features (b, l, d) with their mask."""
        tokens = tokenize(captions, self.config.max_words, self.config.buckets)
        device = self.word_position.device
        mask = tokens.mask.to(device)
        return TextFeatures(self(tokens.grams.to(device), tokens.index.to(device), mask), mask)

    def forward(self, grams: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        """See `ByteTokens` for the arguments. Gives (b, l, d), a plain tensor: ZeRO-3's hooks see into no dataclass."""
        vectors = self.gram_embedding(grams)  # u n d
        real = (grams > 0)[..., None].to(vectors.dtype)
        words = (vectors * real).sum(dim=1) * real.sum(dim=1).rsqrt()  # u d; variance 1 at first
        x = words[index] + self.word_position[: index.shape[1]]  # b l d
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
