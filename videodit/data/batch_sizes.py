"""How many clips of each bucket make a batch: the same number for all, as many tokens, or as much time."""

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

from videodit.data.deal import num_micro_batches

BatchBy = Literal["clips", "tokens", "time"]


class BatchSize(NamedTuple):
    """Of one bucket, in clips."""

    total: int
    """Of one optimizer step, over all ranks."""
    micro: int
    """Of one forward pass on one rank."""


def batch_sizes(
    tokens: Mapping[str, int],
    global_batch_size: int | Mapping[str, int],
    micro_batch_size: int,
    by: BatchBy,
    *,
    seconds: Mapping[str, float] | None = None,
    world: int = 1,
) -> dict[str, BatchSize]:
    """The batch of each bucket.

    By tokens, the sizes that are given are those of the bucket with the most tokens, and buckets of fewer get more
    clips: a step has about as many tokens whatever its bucket, and no forward pass has more than the largest bucket's.
    By time a step takes about as long as one of that bucket. Its clips are then no round multiple of anything, so each
    forward pass has as many as share them evenly, up to what it may have by tokens: rows of padding take time too.

    Args:
        tokens: of one clip, by bucket name: anything proportional will do.
        global_batch_size: clips of one optimizer step; with "clips" it may differ by bucket.
        micro_batch_size: clips of one forward pass.
        by: what is alike in all buckets.
        seconds: of one clip, or anything proportional, for "time"; without them tokens stand for time.
        world: ranks that see different clips; only "time" asks.
    Raises:
        ValueError: if a size is below 1, or a time is missing or not positive.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size {micro_batch_size} must be at least 1")
    totals = global_batch_size if isinstance(global_batch_size, Mapping) else dict.fromkeys(tokens, global_batch_size)
    for name in tokens:
        if totals[name] < 1:
            raise ValueError(f"global_batch_size {totals[name]} of bucket {name} must be at least 1")
    if by == "clips":
        return {name: BatchSize(totals[name], micro_batch_size) for name in tokens}
    costs: Mapping[str, float] = tokens if by == "tokens" or seconds is None else seconds
    for name in tokens:
        if not 0 < costs.get(name, 0) < math.inf:
            raise ValueError(f"seconds {costs.get(name)} of a clip of bucket {name} must be a positive number")
    largest = max(tokens, key=lambda name: (tokens[name], costs[name]))
    sizes = {}
    for name, count in tokens.items():
        total = max(1, round(totals[name] * costs[largest] / costs[name]))
        micro = max(1, micro_batch_size * tokens[largest] // count)
        if by == "time":
            micro = -(-total // (world * num_micro_batches(total, world, micro)))
        sizes[name] = BatchSize(total, micro)
    return sizes
