"""The processes of one run: who I am, on which device, and the collectives that training needs outside the engine."""

import atexit
import datetime
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from videodit.errors import LostRanks, UserError
from videodit.parallel.meeting import choose_interface, fresh_store
from videodit.parallel.quiet import without_stdout

T = TypeVar("T")

TIMEOUT = datetime.timedelta(minutes=30)  # a slow shared disk must not look like a hang

# What torchrun and DeepSpeed's launcher both tell each of their processes.
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")

_joined = False  # whether this process was ever in a group; shutdown() does not undo it


@dataclass(frozen=True)
class World:
    """One process of a run.

    Attributes:
        rank: 0 … size - 1 over all nodes.
        size: number of processes in the run.
        local_rank: index of this process on its node, the number of its GPU.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one process that writes files and logs."""
        return self.rank == 0


def init_process(device: str | None = None) -> World:
    """Joins the process group that torchrun or DeepSpeed's launcher announced; without them, makes a group of one.

    Args:
        device: "cpu" or "cuda"; by default CUDA where there is a GPU.
    Returns:
        This process' place in the run. Gloo carries collectives on CPU, NCCL on GPU (gloo beside it for CPU tensors).
    Raises:
        LostRanks: if the others do not come, or are gone before all have met.
        UserError: if there are more ranks on this machine than GPUs.
    """
    global _joined
    _joined = True
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    launched = all(name in os.environ for name in _LAUNCHER)
    rank = int(os.environ["RANK"]) if launched else 0
    size = int(os.environ["WORLD_SIZE"]) if launched else 1
    local_rank = int(os.environ["LOCAL_RANK"]) if launched else 0
    if kind == "cuda":
        _check_gpus(local_rank)
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        if launched:
            _meet(backend, rank, size)
        else:
            # A store in memory needs no port, no file and no environment.
            store = dist.HashStore()  # type: ignore[attr-defined]
            _join(backend, store, 0, 1)
    return World(rank, size, local_rank, torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu"))


def _check_gpus(local_rank: int) -> None:
    """Refuses more ranks than GPUs, on every rank of the machine: the first of them is the one that speaks."""
    # torchrun's and DeepSpeed's names for the same
    said = (os.environ.get(name, "") for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))
    ranks = max([local_rank + 1, *(int(number) for number in said if number.isdigit())])
    gpus = torch.cuda.device_count()
    if ranks > gpus:
        raise UserError(
            f"{ranks} ranks were started on a machine where torch sees {gpus} GPU{'' if gpus == 1 else 's'}: "
            + (f"use --nproc_per_node {gpus}, or --device cpu" if gpus else "use --device cpu, or run videodit doctor")
        )


def _meet(backend: str, rank: int, size: int) -> None:
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        choose_interface(address, port)
        store, rank, size = next(rendezvous("env://", timeout=TIMEOUT))
        store = fresh_store(store, rank, size, TIMEOUT.total_seconds())
        _join(backend, store, rank, size)
    except RuntimeError as error:
        why = str(error).strip().split("\n")[0]  # what follows is where in C++
        raise LostRanks(
            f"rank {rank} of {size} lost the others, or did not find them, at {address}:{port} before training: {why}; "
            "start the same command again"
        ) from error


def _join(backend: str, store: dist.Store, rank: int, size: int) -> None:
    with without_stdout():
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _new_group(
    ranks: Iterable[int] | None = None, backend: str | None = None, timeout: datetime.timedelta = TIMEOUT
) -> dist.ProcessGroup:
    with without_stdout():
        group: dist.ProcessGroup = dist.new_group(None if ranks is None else list(ranks), timeout, backend)
    return group


@contextmanager
def process_group(device: str) -> Iterator[World]:
    """`init_process`, left at the end even after an error."""
    try:
        yield init_process(device)
    finally:
        shutdown()


@dataclass(frozen=True)
class Mesh:
    """How the ranks of a run share its work: some see different clips, some parts of the same ones.

    Attributes:
        data_rank: which share of the clips this rank sees, 0 … data_size - 1.
        data_size: number of such shares.
        sequence: the ranks that see the same clips as this one, each a part of their tokens; None if there are none.
    """

    data_rank: int
    data_size: int
    sequence: dist.ProcessGroup | None = None


def make_mesh(world: World, sequence_parallel: int) -> Mesh:
    """Lets neighbouring ranks, on one node if they fit there, share each clip's tokens. Call on every rank.

    Args:
        world: this process' place.
        sequence_parallel: ranks that share a clip.
    Raises:
        ValueError: if that does not divide the number of ranks.
    """
    if world.size % sequence_parallel:
        fits = max(n for n in range(1, sequence_parallel) if world.size % n == 0)
        raise ValueError(
            f"sequence_parallel {sequence_parallel} does not divide the {world.size} ranks of the run: "
            f"the nearest that does is {fits}"
        )
    if sequence_parallel == 1:
        return Mesh(world.rank, world.size)
    own = None
    for first in range(0, world.size, sequence_parallel):  # every rank has to make every group
        group = _new_group(range(first, first + sequence_parallel))
        if first <= world.rank < first + sequence_parallel:
            own = group
    return Mesh(world.rank // sequence_parallel, world.size // sequence_parallel, own)


def all_reduce_sum(tensor: torch.Tensor) -> torch.Tensor:
    """Sums a tensor over all ranks, in place; returns it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(flag: bool) -> bool:
    """True on every rank if the flag is set on at least one (a failure, a request to stop)."""
    return bool(all_reduce_sum(torch.tensor([int(flag)])).item())


def barrier() -> None:
    """Waits until every rank is here."""
    all_reduce_sum(torch.zeros(1))


def broadcast_object(value: T, source: int = 0) -> T:
    """Every rank gets the source rank's value (any small picklable object)."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
    return box[0]


def on_main(world: World, action: Callable[[], T]) -> T | None:
    """Does something on rank 0 while the others wait; what is wrong there is so for all. Call on every rank.

    Returns:
        On rank 0 what the action gives, None elsewhere.
    Raises:
        UserError: on every rank, if the action raised one.
    """
    result, problem = None, ""
    if world.is_main:
        try:
            result = action()
        except UserError as error:
            problem = str(error)
    problem = broadcast_object(problem)
    if problem:
        raise UserError(problem)
    return result


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The values of all ranks, in rank order, on every rank.

    Args:
        value: this rank's, any small picklable object but None.
        group: of all ranks on gloo, as `background_group` and `patient_group` are; None for the one that training uses.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    box: list[T | None] = [None] * dist.get_world_size()
    # Sizes and bytes travel as CPU tensors, so that this works beside NCCL too.
    dist.all_gather_object(box, value, group=group or _cpu_group())
    return [item for item in box if item is not None]


_gloo: dist.ProcessGroup | None = None


def _cpu_group() -> dist.ProcessGroup | None:
    """The default group on gloo, else one gloo group made once (all_gather_object follows the default device)."""
    global _gloo
    if dist.get_backend() == "gloo":
        return None
    if _gloo is None:
        _gloo = _new_group(backend="gloo")
    return _gloo


_background: dist.ProcessGroup | None = None


def background_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks for one thread of each beside the main one, whose collectives it must not mix with.

    Call on every rank, from the main thread; it is made once. None if there is one rank.
    """
    global _background
    if _background is None and dist.is_initialized() and dist.get_world_size() > 1:
        _background = _new_group(backend="gloo")
    return _background


_patient: dist.ProcessGroup | None = None


def patient_group() -> dist.ProcessGroup | None:
    """A gloo group of all ranks in which one waits for the others as long as they take.

    Call on every rank; it is made once. None if there is one rank.
    """
    global _patient
    if _patient is None and dist.is_initialized() and dist.get_world_size() > 1:
        _patient = _new_group(backend="gloo", timeout=datetime.timedelta(days=30))
    return _patient


_destroy: Callable[[], object] = dist.destroy_process_group


def destroy_with(destroy: Callable[[], object]) -> None:
    """For a library that keeps groups of its own: shutdown() calls this instead of torch's destroy_process_group."""
    global _destroy
    _destroy = destroy


def shutdown() -> None:
    """Leaves the process group, if there is one; another run may then start in this process."""
    global _gloo, _background, _patient
    _gloo = _background = _patient = None
    if dist.is_initialized():
        _destroy()


def leave(code: int) -> NoReturn:
    """Ends the process as sys.exit does, exit handlers and all, but leaves the interpreter standing.

    Gloo's threads let go of a collective's tensors some time after whoever waited for it went on, and leaving the group
    does not wait for them where somebody still holds it, as DeepSpeed does. A thread that does so while the interpreter
    is being taken down aborts the process (SIGABRT, "terminate called without an active exception"): a finished run
    would end as failed.

    Args:
        code: exit code.
    """
    if not _joined:
        sys.exit(code)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
