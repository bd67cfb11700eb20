"""Which rank computes which row of a global batch."""

import math
from collections.abc import Sequence

import numpy as np

from videodit.data.order import PADDING


def num_micro_batches(rows: int, world: int, micro_batch_size: int) -> int:
    """Micro batches that every rank computes in a step of `rows` rows."""
    return -(-rows // (world * micro_batch_size))


def deal(streams: Sequence[int], num_streams: int, world: int, micro_batch_size: int) -> np.ndarray:
    """Every rank's rows of a global batch: as far as there is room, a stream's rows go to the same rank.

    Where `world` divides num_streams, rank r owns the streams s with s % world = r. Otherwise ranks that are alike by
    the greatest common divisor of the two share the streams that are: with none in common, all of them. What is too
    much for a rank at an epoch's ragged end goes to others, so that every rank has the same number of full micro
    batches: 32 clips on 3 ranks work.

    Args:
        streams: of each row; -1 is padding.
        num_streams: how many there are.
        world: number of data-parallel ranks.
        micro_batch_size: rows of one forward pass.
    Returns:
        (world, micro batches, micro_batch_size) row numbers, -1 for none.
    Raises:
        ValueError: if world or micro_batch_size is below 1.
    """
    if world < 1:
        raise ValueError(f"world {world} must be at least 1")
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size {micro_batch_size} must be at least 1")
    count = num_micro_batches(len(streams), world, micro_batch_size)
    room = count * micro_batch_size
    of_row = np.asarray(streams)
    rows = np.flatnonzero(of_row != PADDING)
    dealt = np.full((world, room), PADDING, dtype=np.int64)
    if world == 1:
        dealt[0, : len(rows)] = rows
        return dealt.reshape(world, count, micro_batch_size)
    classes = math.gcd(world, num_streams)
    group = of_row[rows] % classes
    order = np.argsort(group, kind="stable")
    rows, group = rows[order], group[order]
    turn = np.arange(len(rows)) - np.searchsorted(group, group)  # among the rows of its class
    sharing = world // classes
    rank, slot = group + classes * (turn % sharing), turn // sharing
    fits = slot < room
    dealt[rank[fits], slot[fits]] = rows[fits]
    slots, ranks = np.nonzero(dealt.T == PADDING)  # those of ranks with the fewest rows come first
    surplus = np.sort(rows[~fits])
    dealt[ranks[: len(surplus)], slots[: len(surplus)]] = surplus
    return dealt.reshape(world, count, micro_batch_size)
