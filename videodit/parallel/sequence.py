"""Sequence parallelism: the tokens of a clip spread over ranks, switched between frames and positions by all-to-all.

Spatial attention needs whole frames, temporal attention all frames of a position. So a rank holds whole frames before
one and all frames of some positions before the other, and one all-to-all of the tokens themselves leads from each to
the other: two for a pair of blocks, however many heads there are. Full attention needs all tokens, and gets them for a
part of the heads, by four all-to-alls (queries, keys, values, result).
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
        return other, exchange(tokens, self.group, split=wanted, join=self.axis)[self._whole(self.axis)]

    def frames(self, per_frame: Tensor) -> Tensor:
        if self.axis == POSITIONS or per_frame.shape[1] == 1:
            return per_frame
        return self._part(per_frame, 1)

    def table(self, rope: Tensor) -> Tensor:
        return self._part(rope, self.axis)

    def spread_heads(self, tokens: Tensor) -> Tensor:
        whole: Tensor = exchange(tokens, self.group, split=3, join=self.axis)[self._whole(self.axis)]
        return whole.contiguous()  # attention reads frames and positions as one axis

    def collect_heads(self, tokens: Tensor) -> Tensor:
        return exchange(tokens, self.group, split=self.axis, join=3)

    def join(self, tokens: Tensor) -> Tensor:
        whole: Tensor = _Gather.apply(tokens, self.group, self.axis)[self._whole(self.axis)]
        return whole

    def _part(self, tokens: Tensor, axis: int) -> Tensor:
        """This rank's slice of an axis, padded so that all ranks have as much."""
        size = -(-tokens.shape[axis] // self.ranks)
        return pad_axis(tokens, axis, size * self.ranks).narrow(axis, self.group.rank() * size, size)

    def _whole(self, axis: int) -> tuple[slice, ...]:
        """Cuts the padding off."""
        size = self.num_frames if axis == FRAMES else self.num_positions
        return (slice(None),) * axis + (slice(size),)


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
