"""How many clips of each bucket make a batch: the same number for all, or the same number of tokens."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

BatchBy = Literal["clips", "tokens"]


class BatchSize(NamedTuple):
    """Of one bucket, in clips."""

    total: int
    """Of one optimizer step, over all ranks."""
    micro: int
    """Of one forward pass on one rank."""


def batch_sizes(
    tokens: Mapping[str, int], global_batch_size: int | Mapping[str, int], micro_batch_size: int, by: BatchBy
) -> dict[str, BatchSize]:
    """The batch of each bucket.

    By tokens, the sizes that are given are those of the bucket with the most tokens, and buckets of fewer get more
    clips: a step has about as many tokens whatever its bucket, and no forward pass has more than the largest bucket's.

    Args:
        tokens: of one clip, by bucket name: anything proportional will do.
        global_batch_size: clips of one optimizer step; with "clips" it may differ by bucket.
        micro_batch_size: clips of one forward pass.
        by: what is alike in all buckets.
    Raises:
        ValueError: if a size is below 1.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size {micro_batch_size} must be at least 1")
    totals = global_batch_size if isinstance(global_batch_size, Mapping) else dict.fromkeys(tokens, global_batch_size)
    for name in tokens:
        if totals[name] < 1:
            raise ValueError(f"global_batch_size {totals[name]} of bucket {name} must be at least 1")
    if by == "clips":
        return {name: BatchSize(totals[name], micro_batch_size) for name in tokens}
    most = max(tokens.values())
    return {
        name: BatchSize(max(1, round(totals[name] * most / count)), max(1, micro_batch_size * most // count))
        for name, count in tokens.items()
    }
