"""Randomness of training samples: a function of (seed, epoch, sample key, stream) and of nothing else.

Rank, worker and batch position do not enter. `stream` names what the numbers are for ("noise", "sigma", "crop", ...),
so that adding a use does not change the others.
"""

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from numpy.random.bit_generator import ISeedSequence
from torch import Tensor


def stable_hash(seed: int, epoch: int, key: str, stream: str) -> int:
    """A 64-bit number that is the same on every machine, process and Python version.

    Args:
        seed: the run's seed.
        epoch: passes over the data set so far, from 0.
        key: the sample's key in its shard (no newline in it).
        stream: what the numbers are for.
    Returns:
        An int in [0, 2**64).
    """
    text = f"{seed}\n{epoch}\n{stream}\n{key}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def sample_rng(seed: int, epoch: int, key: str, stream: str) -> np.random.Generator:
    """A numpy generator for one sample: Philox keyed by `stable_hash` (about 10 us to make)."""
    key_of_sample: Any = _Key(stable_hash(seed, epoch, key, stream))  # numpy's stub knows SeedSequence only
    return np.random.Generator(np.random.Philox(key_of_sample))


class _Key(ISeedSequence):
    """Gives Philox its key. By `Philox(key=...)` it would first ask the system for a random one."""

    def __init__(self, key: int) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        return np.array([self._key, 0], dtype)


def sample_unit(seed: int, epoch: int, key: str, stream: str) -> float:
    """One uniform number for a sample, straight from the hash: strictly inside (0, 1) and exact in float32."""
    # 23 bits plus a half: neither 0 nor 1, so that logits and quantiles of it are finite.
    return ((stable_hash(seed, epoch, key, stream) >> 41) + 0.5) * 2.0**-23


def sample_uniform(seed: int, epochs: int | Sequence[int], keys: Sequence[str], stream: str) -> Tensor:
    """`sample_unit` of each sample (about 2 us each).

    Args:
        seed, stream: as in `stable_hash`.
        epochs: of each sample, or one for all.
        keys: b sample keys; an empty key (padding) is a key like any other.
    Returns:
        (b,) float32, strictly inside (0, 1).
    """
    pairs = zip(_of_each(epochs, keys), keys, strict=True)
    return torch.tensor([sample_unit(seed, epoch, key, stream) for epoch, key in pairs], dtype=torch.float32)


def sample_noise(
    seed: int, epochs: int | Sequence[int], keys: Sequence[str], shape: tuple[int, int, int, int], stream: str
) -> Tensor:
    """Standard normal noise per sample from a CPU generator, drawn in (t, c, h, w) order.

    Frames come first in the draw, so that a longer clip's noise starts with the shorter one's (where c*h*w is a
    multiple of 16, torch's block). One torch generator, reseeded for each row, takes a third to a half of the time of
    numpy's Philox at 2,560 numbers a row. It reads the low 32 bits of the seed: two of a million samples may share
    their noise, which does no harm.

    Args:
        seed, stream: as in `stable_hash`.
        epochs: of each sample, or one for all.
        keys: b sample keys.
        shape: (c, t, h, w) of one sample.
    Returns:
        (b, c, t, h, w) float32 on the CPU, contiguous.
    """
    c, t, h, w = shape
    noise = torch.empty(len(keys), t, c, h, w)
    generator = torch.Generator()
    for row, (epoch, key) in enumerate(zip(_of_each(epochs, keys), keys, strict=True)):
        noise[row].normal_(generator=generator.manual_seed(stable_hash(seed, epoch, key, stream)))
    return rearrange(noise, "b t c h w -> b c t h w").contiguous()


def _of_each(epochs: int | Sequence[int], keys: Sequence[str]) -> Sequence[int]:
    return [epochs] * len(keys) if isinstance(epochs, int) else epochs


def batch_digest(keys: Sequence[str]) -> str:
    """The `data/digest` of a step: sha256 hex of the sample keys, newline-joined, in global order, without padding."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()
