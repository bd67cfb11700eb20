"""Where DeepSpeed keeps fp32 weights and moments, told as flat pieces of named parameters: one form for every stage.

This is the only place that knows the private attributes of DeepSpeed 0.19's ZeRO optimizers; it imports none of them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from videodit.training.adamw8bit import new_moments
from videodit.training.blockwise import BlockwiseMoment

# (kind, parameter name, start, length) -> flat fp32 tensor; kind is weight, exp_avg, exp_avg_sq or momentum_buffer
SliceReader = Callable[[str, str, int, int], torch.Tensor]


@dataclass
class ParamSlice:
    """A contiguous piece of one flattened parameter, owned by exactly one rank.

    Attributes:
        name: the parameter's name in the module.
        shape: shape of the whole parameter.
        start: offset of the piece in the flattened parameter.
        weight: (n,) view into the live fp32 master weights.
        state: what gives each of the optimizer's moments (exp_avg and exp_avg_sq, or momentum_buffer) as (n,) float32:
            a view, or a copy of one that is kept in 8 bits; empty before the first update.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    weight: torch.Tensor
    state: dict[str, Callable[[], torch.Tensor]] = field(default_factory=dict)


@dataclass
class _Piece:
    """A slice and where its moments are: `optimizer.state[key]`, at `offset`."""

    slice: ParamSlice
    key: torch.Tensor  # what the optimizer steps: a parameter (stage 0) or a flat buffer
    offset: int
    use_muon: bool
    quantized: bool
    whole_offset: int | None = None  # ZeRO 1-2 Muon keeps the momentum of each matrix it touches whole, starting here

    def view(self, kind: str, moment: torch.Tensor | BlockwiseMoment) -> torch.Tensor:
        """This piece's part of a moment; of an 8-bit one a copy."""
        if isinstance(moment, BlockwiseMoment):
            return moment.read(self.offset, self.slice.weight.numel())
        whole = kind == "momentum_buffer" and self.whole_offset is not None
        offset = (self.whole_offset or 0) + self.slice.start if whole else self.offset
        return moment.detach().view(-1).narrow(0, offset, self.slice.weight.numel())


class ShardedState:
    """This rank's share of weights and moments, at whatever ZeRO stage.

    Args:
        zero: DeepSpeed's optimizer (at stage 0 the optimizer itself).
        optimizer: the optimizer that it drives.
        zero_stage: 0 … 3.
        rank: of this process.
        names: parameter names by id(parameter).
    """

    def __init__(
        self, zero: Any, optimizer: torch.optim.Optimizer, zero_stage: int, rank: int, names: dict[int, str]
    ) -> None:
        self._zero, self._optimizer, self._stage, self._names = zero, optimizer, zero_stage, names
        if zero_stage == 0:
            self._pieces = list(self._whole_parameters())
        elif zero_stage == 3:
            self._pieces = list(self._parameter_partitions(rank))
        else:
            self._pieces = list(self._flat_buffer_fragments())

    def slices(self) -> list[ParamSlice]:
        """The slices with their moments as they are now."""
        for piece in self._pieces:
            moments = self._optimizer.state.get(piece.key, {})
            piece.slice.state = {
                kind: partial(piece.view, kind, moment)
                for kind, moment in moments.items()
                if kind != "step" and isinstance(moment, (torch.Tensor, BlockwiseMoment))
            }
        return [piece.slice for piece in self._pieces]

    @torch.no_grad()
    def load(self, read: SliceReader, optimizer_step: int) -> None:
        """Fills master weights, moments and the optimizer's step, or takes the moments away that a step 0 has not had.

        The module's own weights come with refresh_module.
        """
        for piece in self._pieces:
            part, length = piece.slice, piece.slice.weight.numel()
            part.weight.copy_(read("weight", part.name, part.start, length))
            if not optimizer_step:
                continue
            state = self._optimizer.state[piece.key]
            if piece.quantized:
                continue
            if piece.whole_offset is not None:
                whole = torch.Size(part.shape).numel()
                size = sum(torch.Size(p.slice.shape).numel() for p in self._pieces if p.key is piece.key)
                buffer = state.setdefault("momentum_buffer", torch.zeros(size, device=piece.key.device))
                buffer.narrow(0, piece.whole_offset, whole).copy_(read("momentum_buffer", part.name, 0, whole))
                continue
            for kind in ("momentum_buffer",) if piece.use_muon else ("exp_avg", "exp_avg_sq"):
                moment = state.setdefault(kind, torch.zeros_like(piece.key, requires_grad=False))
                piece.view(kind, moment).copy_(read(kind, part.name, part.start, length))
            if not piece.use_muon:
                state["step"] = torch.tensor(float(optimizer_step), device=piece.key.device)

        if optimizer_step:
            self._load_quantized(read, optimizer_step)
        else:
            self._forget_moments()

    def _forget_moments(self) -> None:
        for state in self._optimizer.state.values():
            for kind in list(state):
                if kind == "momentum_buffer":  # at stage 3 it is there before the first step
                    state[kind].zero_()
                else:
                    del state[kind]

    def _load_quantized(self, read: SliceReader, optimizer_step: int) -> None:
        """Moments in 8 bits, each put together first: its blocks do not end where slices do."""
        keys = {piece.key: None for piece in self._pieces if piece.quantized}
        for key in keys:
            state = self._optimizer.state[key]
            state |= {"step": torch.tensor(float(optimizer_step))} | new_moments(key, quantized=True)
            for kind in ("exp_avg", "exp_avg_sq"):
                whole = torch.zeros(key.numel())
                for piece in self._pieces:
                    if piece.key is key:
                        part, length = piece.slice, piece.slice.weight.numel()
                        whole[piece.offset : piece.offset + length] = read(kind, part.name, part.start, length)
                state[kind].fill(whole)

    @torch.no_grad()
    def refresh_module(self) -> None:
        """Brings the module's own weights up to the master weights. Call on every rank."""
        if self._stage in (1, 2):
            self._zero.update_lp_params()
        elif self._stage == 3:
            small = self._zero.persistent_parameters  # kept whole on every rank between steps
            if small:
                small[0].partition(small)
            for group in range(len(self._zero.fp16_groups)):
                self._zero._reassign_or_swap_out_partitioned_parameters(group)
            if small:
                small[0].all_gather(small)

    def _whole_parameters(self) -> Iterator[_Piece]:
        for group in self._optimizer.param_groups:
            for p in group["params"]:
                part = ParamSlice(self._names[id(p)], tuple(p.shape), 0, p.detach().view(-1))
                yield _Piece(part, p, 0, False, group["quantized"])

    def _flat_buffer_fragments(self) -> Iterator[_Piece]:
        """Stages 1 and 2: the groups are flattened and cut into equal parts, wherever that cuts a parameter."""
        bf16_optimizer = hasattr(self._zero, "bf16_groups")  # what DeepSpeed takes for bf16 at stage 1
        groups = self._zero.bf16_groups if bf16_optimizer else self._zero.bit16_groups
        for group, params in zip(self._optimizer.param_groups, groups, strict=True):
            whole = 0
            for p in params:
                place = p._hp_mapping
                if place is None:  # all of it is on other ranks
                    continue
                start, weight = place.lp_fragment_address.start, place.hp_fragment.detach()
                part = ParamSlice(self._names[id(p)], tuple(p.shape), start, weight)
                whole_offset = whole if group["use_muon"] and not bf16_optimizer else None
                offset = place.hp_fragment_address.start
                yield _Piece(part, group["params"][0], offset, group["use_muon"], group["quantized"], whole_offset)
                whole += p.numel()

    def _parameter_partitions(self, rank: int) -> Iterator[_Piece]:
        """Stage 3: every parameter is flattened and cut into equal parts by itself."""
        for i, params in enumerate(self._zero.fp16_groups):
            flat = self._zero.fp32_partitioned_groups_flat[i]
            for p in params:
                _, offset, length = self._zero.grad_position[self._zero.get_param_id(p)]
                start = rank * length
                length = min(length, p.ds_numel - start)  # the last partitions may be padding in part or whole
                if length > 0:
                    weight = flat.detach().narrow(0, offset, length)
                    part = ParamSlice(self._names[id(p)], tuple(p.ds_shape), start, weight)
                    yield _Piece(part, flat, offset, p.use_muon, p.quantized)
