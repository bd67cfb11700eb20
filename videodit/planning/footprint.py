"""What one training step costs, found by running the model itself on tensors without data.

The model runs forward and backward on fake and meta tensors, so nothing here repeats its formulas: FLOPs are those that
torch's counter sees, activations are the storages that are alive at once. A model of 5B parameters takes seconds.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

SMALL = 100_000
"""Elements up to which DeepSpeed keeps a tensor whole at ZeRO-3 (its stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters.

    Attributes:
        total: all trainable ones.
        small: those of them in tensors of `SMALL` elements at most.
        frozen: the others.
        plain: those of the trainable ones in biases, norms and embeddings.
    """

    total: int
    small: int
    frozen: int = 0
    plain: int = 0


def count_parameters(model: nn.Module) -> ParameterCount:
    """Of a model on any device, meta too."""
    trained = [p for p in model.parameters() if p.requires_grad]
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return ParameterCount(
        total=sum(p.numel() for p in trained),
        small=sum(p.numel() for p in trained if p.numel() <= SMALL),
        frozen=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        plain=sum(p.numel() for p in trained if p.ndim < 2 or id(p) in embeddings),
    )


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, from when they are made until they are freed.

    Args:
        meta: whether those on the meta device count, which hold nothing.

    Attributes:
        peak: most that was alive at once.
        now: alive now.
    """

    def __init__(self, *, meta: bool = True) -> None:
        super().__init__()
        self._meta = meta
        self.now = self.peak = 0
        self._known: set[int] = set()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves these out: their views would else count as made here."""
        self._known |= {tensor.untyped_storage()._cdata for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (self._meta or tensor.device.type != "meta"):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def step_flops(build: Callable[[], nn.Module], run: Callable[[nn.Module], None]) -> int:
    """Floating-point operations of a forward and backward pass; a multiply-add is two.

    Attention counts as plain matrix products. The fused kernels' own counts differ from that: flash attention's
    backward pass computes the scores again.

    Args:
        build: makes the model.
        run: the pass, with tensors on the device and of the dtype of the model's weights.
    """
    with FakeTensorMode():
        return count_flops(build(), run)


def count_flops(model: nn.Module, run: Callable[[nn.Module], None]) -> int:
    """What `FlopCounterMode` sees of a pass with attention as plain matrix products, on the model's device."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run(model)
    return int(counter.get_total_flops())


def activation_bytes(
    build: Callable[[], nn.Module], run: Callable[[nn.Module], None], dtype: torch.dtype, *, on_cpu: bool = False
) -> int:
    """Most that is alive at once in a forward and backward pass, beside weights and their gradients.

    Args:
        build: makes the model.
        run: the pass, with tensors on the device and of the dtype of the model's weights.
        dtype: of weights and activations.
        on_cpu: where some operations keep other tensors than on a GPU.
    """
    if on_cpu:
        default = torch.get_default_dtype()
        with FakeTensorMode():
            torch.set_default_dtype(dtype)  # a fake model cannot be cast
            try:
                model = build()
            finally:
                torch.set_default_dtype(default)
            return live_bytes(model, run)
    with torch.device("meta"):
        model = build().to(dtype)
    return live_bytes(model, run)


def live_bytes(model: nn.Module, run: Callable[[nn.Module], None]) -> int:
    """Most bytes that a pass holds at once, beside the weights and their gradients, on the model's device."""
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.grad = torch.zeros_like(parameter)  # counted apart
    with LiveBytes() as live:
        live.ignore(tensor for p in model.parameters() for tensor in (p, p.grad) if tensor is not None)
        live.ignore(model.buffers())
        run(model)
    return live.peak
