"""How initialisation reaches weights that are not all here: at ZeRO-3 a rank may hold only a part of each.

Models write their initial values inside `with whole(weight, …):`. By default that does nothing. The engine's
`sharded_construction` puts there what brings a weight together, and lets go of it again.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

from torch import Tensor, nn

Gather = Callable[[list[Tensor]], AbstractContextManager[None]]

_gather: Gather | None = None


def whole(*weights: Tensor) -> AbstractContextManager[None]:
    """While inside, these weights are whole and may be written; every rank writes the same."""
    return nullcontext() if _gather is None else _gather(list(weights))


@contextmanager
def gathering(gather: Gather) -> Iterator[None]:
    """While inside, `whole` is done by this."""
    global _gather
    before, _gather = _gather, gather
    try:
        yield
    finally:
        _gather = before


def init_norm(norm: nn.Module) -> None:
    """Sets the norm's weight to one, and its bias, if it has one, to zero."""
    with whole(*norm.parameters(recurse=False)):
        for name, parameter in norm.named_parameters(recurse=False):
            nn.init.constant_(parameter, 0.0 if name == "bias" else 1.0)
