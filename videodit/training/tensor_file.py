"""Writes a safetensors file piece by piece, each on the disk before the next: a slow disk is then seen to work.

safetensors' own `save_file` returns when all is handed over, and one fsync after it may take longer than any limit for
a rank that does not move.
"""

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from videodit.parallel.watch import tick

CHUNK_BYTES = 1 << 26


def save_file(tensors: Mapping[str, torch.Tensor], path: str | Path) -> None:
    """Writes tensors; the file is on the disk when this returns. `tick`s after each piece.

    Args:
        tensors: by name; flat (n,) fp32 on the CPU.
        path: the file.
    Raises:
        OSError: if it cannot be written.
    Source: the format's description, https://github.com/huggingface/safetensors#format.
    """
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 4 * tensor.numel()
        header[name] = {"dtype": "F32", "shape": [tensor.numel()], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        unsynced = 0
        for tensor in tensors.values():
            for piece in torch.split(tensor, CHUNK_BYTES // 4):
                file.write(piece.numpy().data)
                unsynced += 4 * len(piece)
                if unsynced >= CHUNK_BYTES:
                    _sync(file)
                    unsynced = 0
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
    tick()
