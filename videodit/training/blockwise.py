"""Moments of an optimizer in 8 bits a value: codes of a dynamic map, and an fp32 scale for each block of 256.

Source: Dettmers et al. (2022), "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861, sections 2.1 and 2.2.
"""

import functools

import torch
from torch import Tensor

BLOCK = 256
"""Values that share a scale."""
TINY = 1e-30
"""Scales below it are 0, so that code times scale is never denormal and comes back as the same code."""
CHUNK = 1 << 14
"""Blocks that are held in fp32 at once."""


def dynamic_map(*, signed: bool) -> Tensor:
    """The 256 values that codes stand for, ascending, float32.

    A code has e leading zeros, which say 10^-e, and what bits are left divide [0.1, 1] evenly; 0 and 1 are added.
    The signed map has no -1: `quantize` never needs one.
    """
    values = [torch.tensor([0.0, 1.0], dtype=torch.float64)]
    for exponent in range(7):
        parts = 2 ** (exponent if signed else exponent + 1)
        edges = torch.linspace(0.1, 1, parts + 1, dtype=torch.float64)
        fractions = 10.0 ** (exponent - 6) * (edges[:-1] + edges[1:]) / 2
        values += [fractions, -fractions] if signed else [fractions]
    return torch.cat(values).sort().values.float()


@functools.cache
def _tables(signed: bool, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """The map, the bounds between its values, and the code of 0."""
    values = dynamic_map(signed=signed)
    bounds = (values[:-1] + values[1:]) / 2
    return values.to(device), bounds.to(device), int((values == 0).nonzero())


def quantize(x: Tensor, *, signed: bool) -> tuple[Tensor, Tensor]:
    """Nearest codes, and scales such that the value of a block that lies furthest from 0 is kept exactly.

    A scale has that value's sign, so that it is always the code of 1, and quantizing what `dequantize` gives returns
    the same codes and scales. Unsigned values are denominators: none but 0 becomes 0.

    Args:
        x: (n, BLOCK) float32; not negative if not signed.
        signed: which map.
    Returns:
        (n, BLOCK) uint8 and (n, 1) float32.
    """
    values, bounds, zero = _tables(signed, x.device)
    scale = x.gather(1, x.abs().argmax(1, keepdim=True))
    scale = scale.masked_fill(scale.abs() < TINY, 0.0)
    parts = x / scale.masked_fill(scale == 0, 1.0)
    codes = torch.bucketize(parts, bounds, out_int32=True).to(torch.uint8)
    if not signed:
        codes = codes.masked_fill((codes == zero) & (x > 0), zero + 1)
    return codes.masked_fill_(scale == 0, zero), scale


def dequantize(codes: Tensor, scale: Tensor, *, signed: bool) -> Tensor:
    """(n, BLOCK) float32 from what `quantize` gave."""
    values, _, _ = _tables(signed, codes.device)
    return values[codes.int()] * scale


class BlockwiseMoment:
    """A flat moment in blocks; the last one is filled up with zeros.

    Args:
        size: values.
        signed: whether there are negative ones.
        device: where.
    """

    def __init__(self, size: int, *, signed: bool, device: torch.device) -> None:
        blocks = -(-size // BLOCK)
        self.size, self.signed = size, signed
        self.codes = torch.full((blocks, BLOCK), _tables(signed, device)[2], dtype=torch.uint8, device=device)
        self.scale = torch.zeros(blocks, 1, device=device)

    def read(self, start: int, length: int) -> Tensor:
        """(length,) float32: a part of it."""
        first, last = start // BLOCK, -(-(start + length) // BLOCK)
        whole = dequantize(self.codes[first:last], self.scale[first:last], signed=self.signed)
        return whole.flatten().narrow(0, start - first * BLOCK, length)

    def write(self, first: int, values: Tensor) -> None:
        """Puts values, filled up with zeros, into whole blocks from the first-th on."""
        blocks = torch.nn.functional.pad(values, (0, -len(values) % BLOCK)).view(-1, BLOCK)
        rows = slice(first, first + len(blocks))
        self.codes[rows], self.scale[rows] = quantize(blocks, signed=self.signed)

    def fill(self, values: Tensor) -> None:
        """Puts (size,) float32 values, on any device, into all of it."""
        for first in range(0, len(self.codes), CHUNK):
            part = values[first * BLOCK : (first + CHUNK) * BLOCK]
            self.write(first, part.to(self.codes.device))
