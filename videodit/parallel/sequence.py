"""Sequence parallelism: the tokens of a clip spread over ranks, switched between frames and positions by all-to-all.

Spatial attention needs whole frames, temporal attention all frames of a position. So a rank holds whole frames before
one and all frames of some positions before the other, and one all-to-all of the tokens themselves leads from each to
the other: two for a pair of blocks, however many heads there are. Full attention needs all tokens, and gets them for a
part of the heads, by four all-to-alls (queries, keys, values, result).
Local layers work on whole frames; their convolution over time gets the frame on each side from the neighbouring ranks.
What does not divide is padded: a padded frame or position is attended to only by itself, and is cut off where the axis
is whole again.
Source: Zhao et al. (2024), DSP, arXiv:2403.10266 (the switch); Jacobs et al. (2023), DeepSpeed-Ulysses,
arXiv:2309.14509 (by heads).

Legend: b batch, t latent frames, s tokens of a frame, d hidden size, h heads, e channels of a head, n ranks.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from videodit.models.token_layout import WHOLE, TokenLayout

FRAMES, POSITIONS = 1, 2
"""Axes of the tokens that can be split."""


@dataclass(frozen=True)
class SplitTokens:
    """Tokens of a clip that are split over the ranks of a group, along frames at first.

    Every rank calls the model with the same latents and gets the same result. Losses count once: the sum over the ranks
    of each rank's loss is what is differentiated, so give each rank 1/n of it, and sum the gradients over the ranks.

    Args:
        group: of n ranks.
        num_frames: t of the whole clip.
        num_positions: s of the whole clip.
        axis: along which the tokens are split, FRAMES or POSITIONS.
    """

    group: dist.ProcessGroup
    num_frames: int
    num_positions: int
    axis: int = FRAMES

    @property
    def ranks(self) -> int:
        """n."""
        return self.group.size()

    def take(self, tokens: Tensor) -> Tensor:
        return self._part(tokens, tokens.dim() - 4 + self.axis)

    def switch(self, kind: str, tokens: Tensor) -> tuple[TokenLayout, Tensor]:
        wanted = {"s": FRAMES, "t": POSITIONS}.get(kind, self.axis)
        if wanted == self.axis:
            return self, tokens
        other = replace(self, axis=wanted)
        return other, self._cut(exchange(tokens, self.group, split=wanted, join=self.axis))

    def frames(self, per_frame: Tensor) -> Tensor:
        if self.axis == POSITIONS or per_frame.shape[1] == 1:
            return per_frame
        return self._part(per_frame, FRAMES)

    def neighbours(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        size, rank = frames.shape[1], self.group.rank()
        total = size // self._share * self.num_frames
        real = frames[:, : max(total - rank * size, 0)]  # the rest is padding
        edges = torch.stack([frames[:, 0], frames[:, -1]])
        has = (rank > 0 and rank * size < total, (rank + 1) * size < total)
        halo: Tensor = _Halo.apply(edges, self.group, *has)
        before = torch.cat([halo[0][:, None], frames[:, :-1]], dim=1)
        after = torch.cat([real[:, 1:], halo[1][:, None]], dim=1)
        return before, pad_axis(after, 1, size)

    def table(self, rope: Tensor) -> Tensor:
        return self._part(rope, self.axis)

    def spread_heads(self, tokens: Tensor) -> Tensor:
        whole = self._cut(exchange(tokens, self.group, split=3, join=self.axis))
        return whole.contiguous()  # attention reads frames and positions as one axis

    def collect_heads(self, tokens: Tensor) -> Tensor:
        return exchange(tokens, self.group, split=self.axis, join=3)

    def join(self, tokens: Tensor) -> Tensor:
        return self._cut(_Gather.apply(tokens, self.group, self.axis))

    @property
    def _count(self) -> int:
        """Frames or positions of the whole clip, whichever are split."""
        return self.num_frames if self.axis == FRAMES else self.num_positions

    @property
    def _share(self) -> int:
        """How many of them each rank has, padding included."""
        return -(-self._count // self.ranks)

    def _part(self, tokens: Tensor, axis: int) -> Tensor:
        """This rank's slice of the split axis, padded so that all ranks have as much."""
        size = self._share * (tokens.shape[axis] // self._count)
        return pad_axis(tokens, axis, size * self.ranks).narrow(axis, self.group.rank() * size, size)

    def _cut(self, whole: Tensor) -> Tensor:
        """Without the padding of the axis that was split and is whole now."""
        return whole.narrow(self.axis, 0, whole.shape[self.axis] // (self._share * self.ranks) * self._count)


def split_layout(group: dist.ProcessGroup | None, num_frames: int, num_positions: int) -> TokenLayout:
    """The layout for a clip of t frames of s tokens; all of them here where there is nobody to share them with."""
    return WHOLE if group is None or group.size() == 1 else SplitTokens(group, num_frames, num_positions)


def pad_axis(x: Tensor, axis: int, size: int) -> Tensor:
    """x with zeros appended to an axis up to a size."""
    missing = size - x.shape[axis]
    return x if missing <= 0 else F.pad(x, (0, 0) * (x.dim() - 1 - axis) + (0, missing))


def exchange(x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
    """Splits one axis over the ranks and joins another that was: the all-to-all of a switch, differentiable.

    Args:
        x: this rank's part, as long on every rank along `join`; padded here along `split`.
        group: of n ranks.
        split: axis that each rank gets its n-th part of.
        join: axis that is whole afterwards, with padding if it had some.
    """
    ranks = group.size()
    x = pad_axis(x, split, -(-x.shape[split] // ranks) * ranks)
    out: Tensor = _Exchange.apply(x, group, split, join)
    return out


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
        ctx.group, ctx.axes = group, (split, join)
        return _all_to_all(x, group, split, join)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        split, join = ctx.axes
        return _all_to_all(grads[0], ctx.group, join, split), None, None, None


def _all_to_all(x: Tensor, group: dist.ProcessGroup, split: int, join: int) -> Tensor:
    sent = torch.stack(x.chunk(group.size(), dim=split))  # n parts, one for each rank
    received = torch.empty_like(sent)
    dist.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), dim=join)


class _Gather(torch.autograd.Function):
    """Joins an axis on every rank; its gradient is the sum of the ranks' gradients of this rank's part."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, axis: int) -> Tensor:
        ctx.group, ctx.axis = group, axis
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(parts, x.contiguous(), group=group)
        return torch.cat(parts, dim=axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        total = grads[0].contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total.chunk(ctx.group.size(), dim=ctx.axis)[ctx.group.rank()].contiguous(), None, None


class _Halo(torch.autograd.Function):
    """Of each rank's first and last frame, stacked: the frame before and the one after, zeros where there is none.

    What comes from a neighbour is what it sent this way, for gradients as for frames: the backward pass is the same.
    """

    @staticmethod
    def forward(ctx: Any, edges: Tensor, group: dist.ProcessGroup, has_before: bool, has_after: bool) -> Tensor:
        ctx.neighbours = (group, has_before, has_after)
        return _swap_edges(edges, *ctx.neighbours)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _swap_edges(grads[0].contiguous(), *ctx.neighbours), None, None, None


def _swap_edges(edges: Tensor, group: dist.ProcessGroup, has_before: bool, has_after: bool) -> Tensor:
    """(2, …): the first part goes to the rank before, the second to the one after; theirs come back in these places."""
    received, sides = torch.zeros_like(edges), slice(0 if has_before else 1, 2 if has_after else 1)
    counts = [0] * group.size()
    for here, rank in ((has_before, group.rank() - 1), (has_after, group.rank() + 1)):
        if here:
            counts[rank] = 1
    dist.all_to_all_single(received[sides], edges[sides], counts, counts, group=group)
    return received
