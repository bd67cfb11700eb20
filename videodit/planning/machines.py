"""Accelerators a plan can be made for: memory and peak speed, as the vendors' data sheets give them."""

import os
import time
from dataclasses import dataclass

import torch

from videodit.errors import UserError
from videodit.training.meters import peak_flops

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """One rank's device.

    Attributes:
        name: as the user wrote it.
        memory_bytes: that a process can allocate.
        peak_flops: dense, in FLOP/s, of the plan's number format.
    """

    name: str
    memory_bytes: float
    peak_flops: float


# name: (as `peak_flops` knows it, GiB that torch sees of the sheet's GB, FLOP/s in fp32). These are without tensor
# cores: training leaves torch's default on, which is no TF32.
_GPUS = {
    "b200": ("B200", 178.0, 75e12),
    "h200": ("H200", 139.8, 67e12),
    "h100": ("H100", 79.1, 67e12),
    "a100": ("A100", 79.1, 19.5e12),
    "a100-40gb": ("A100", 39.4, 19.5e12),
    "l40s": ("L40S", 44.4, 91.6e12),
    "rtx4090": ("RTX 4090", 23.5, 82.6e12),
    "rtx3090": ("RTX 3090", 23.6, 35.6e12),
    "mi300x": ("MI300X", 191.0, 163.4e12),
}


def find_machine(name: str, dtype: torch.dtype) -> Machine:
    """A GPU by name, or `cpu`: this machine, its speed measured with a matrix product.

    Raises:
        UserError: for a GPU that is not known.
    """
    if name == "cpu":
        return Machine(name, device_memory(torch.device("cpu")), _measure_matmul(dtype))
    if name.lower() not in _GPUS:
        raise UserError(f"--gpu {name!r} is not known: use cpu or one of {', '.join(_GPUS)}")
    sheet, gib, fp32 = _GPUS[name.lower()]
    peak = peak_flops(sheet)
    assert peak is not None  # both tables are ours
    return Machine(name.lower(), gib * GIB, peak if dtype == torch.bfloat16 else fp32)


def device_memory(device: torch.device) -> float:
    """Bytes of a GPU's memory, or of this machine's."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _measure_matmul(dtype: torch.dtype, size: int = 1024) -> float:
    a, b = torch.ones(size, size, dtype=dtype), torch.ones(size, size, dtype=dtype)
    seconds = []
    for _ in range(4):  # the first one warms up
        start = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - start)
    return float(2 * size**3 / min(seconds))
