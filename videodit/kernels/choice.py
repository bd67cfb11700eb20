"""Which form the DiT's fused operations take on a GPU: torch operations, which torch.compile may fuse, or Triton's.

Triton's are off until asked for: none has been measured against torch.compile on a GPU yet (benchmarks/kernels.py does
it). With TRITON_INTERPRET=1 in the environment they also run on a CPU, slowly, which is how the tests run them.
"""

import importlib.util
import os

import torch
from torch import Tensor

from videodit.errors import UserError

KERNELS = ("torch", "triton")
_chosen = "torch"


def choose_kernels(name: str, device: torch.device | None = None) -> None:
    """For every model of this process from now on.

    Args:
        name: one of KERNELS.
        device: where the models run, if that is known.
    Raises:
        UserError: for another name, or where Triton is not installed or cannot run on the device.
    """
    global _chosen
    if name not in KERNELS:
        raise UserError(f"kernels {name!r} is not one of {', '.join(KERNELS)}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise UserError("kernels triton needs the package triton, which is not installed: pip install triton")
    if name == "triton" and device is not None and device.type != "cuda" and not interpreted():
        raise UserError(f"kernels triton needs a CUDA GPU, and this run is on {device.type}: use --kernels torch")
    _chosen = name


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_runs(x: Tensor) -> bool:
    """Whether Triton's kernels are chosen and can run where x is."""
    return _chosen == "triton" and (x.device.type == "cuda" or (x.device.type == "cpu" and interpreted()))
