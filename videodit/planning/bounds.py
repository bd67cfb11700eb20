"""Sizes that no plan takes on: they would run for hours, or allocate what no machine has, before a figure is there."""

import math

from videodit.errors import UserError
from videodit.planning.machines import GIB
from videodit.planning.plan_config import DiTPlanConfig, PlanConfig
from videodit.planning.workload import Workload

MOST_TOKENS = {"DiT": 2_000_000, "VAE": 1_000_000_000}
"""Of a clip that is planned: the DiT's tables of positions are computed."""


def refuse_the_absurd(config: PlanConfig, workload: Workload, machine: str, room: float, gpus: int) -> None:
    """Before the model is run: clips that are too long, and widths of which no number of GPUs holds a part.

    Args:
        config: what is planned.
        workload: its buckets.
        machine: name of the GPU.
        room: bytes that a plan may fill on one of them.
        gpus: most of them that a plan looks at.
    Raises:
        UserError: names the bucket, or the width and about the largest that could fit.
    """
    most = MOST_TOKENS["DiT" if isinstance(config, DiTPlanConfig) else "VAE"]
    for bucket in workload.buckets:
        if workload.tokens(bucket) > most:
            raise UserError(
                f"buckets {bucket.name} is {workload.tokens(bucket):,} tokens a clip, more than a plan takes on: "
                f"use clips of {most:,} or less"
            )
    if not isinstance(config, DiTPlanConfig):
        return
    model = config.model
    # Of a block's matrices these four at least; two bytes of each weight are the least that is on a device.
    least = 2 * 4 * model.hidden_size**2 * model.depth
    if least <= room * gpus:
        return
    width = math.isqrt(int(room * gpus) // (8 * model.depth))
    step = 2 * model.num_heads
    raise UserError(
        f"model.hidden_size {model.hidden_size} at model.depth {model.depth} has weights of more than "
        f"{float(min(least // GIB, 10**30)):.2g} GiB, which {gpus:,} {machine} do not hold: "
        f"use at most {max(width // step, 1) * step}"
    )
