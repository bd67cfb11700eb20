"""Which device and number format a command uses."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from videodit.errors import UserError

DType = Literal["fp32", "bf16"]


def choose_device(name: str) -> torch.device:
    """'auto' is the GPU if there is one.

    Raises:
        UserError: if the device is unknown, or a GPU is asked for where there is none.
    """
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(f"device {name!r} is not one of auto, cpu, cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device 'cuda' asked for, but torch sees no GPU: use --device cpu, or run videodit doctor")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def has_bf16(device: torch.device) -> bool:
    """Whether the device has bf16 matrix products of its own: GPUs since Ampere, and CPUs with AVX512-bf16.

    Without them a CPU emulates bf16 a hundred times slower; with them it beats fp32 3.5 times (docs/decisions.md).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return torch.cpu._is_avx512_bf16_supported()


def choose_dtype(name: str, device: torch.device) -> DType:
    """'auto' is bf16 where the hardware multiplies it (`has_bf16`), else fp32.

    Raises:
        UserError: if the name is unknown.
    """
    if name not in ("auto", "fp32", "bf16"):
        raise UserError(f"dtype {name!r} is not one of auto, fp32, bf16")
    if name == "auto":
        return "bf16" if has_bf16(device) else "fp32"
    return "bf16" if name == "bf16" else "fp32"


def torch_dtype(name: DType) -> torch.dtype:
    """fp32 or bf16 as torch names it."""
    return torch.bfloat16 if name == "bf16" else torch.float32


@contextmanager
def deterministic_algorithms() -> Iterator[None]:
    """Inside, every operation gives the same bits each time on one machine, or raises RuntimeError.

    On a CPU that is so anyway. Begin before the GPU is first used: cuBLAS reads its workspace setting then.
    """
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def keep_freed_memory() -> None:
    """Tells glibc to keep what is freed for the next allocation instead of giving it back to the system.

    A training step on a CPU allocates the same activations again and again; given back, each page costs a fault when
    it is first written again: 11,400 faults a step of the demo's, 7% of its time (docs/decisions.md). Other C libraries
    are left alone. Effects last as long as the process.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    # From malloc.h: M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD (its largest allowed value), M_ARENA_MAX (one heap
    # for all threads).
    for option, value in ((-1, 2**31 - 1), (-2, 256 << 20), (-3, 32 << 20), (-8, 1)):
        mallopt(option, value)
