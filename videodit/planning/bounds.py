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
        UserError: names the bucket, or the width and the largest whose own matrices could fit.
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
    for name, value, weights, power in _widths(config):
        # Two bytes of each weight are the least that is on a device.
        least, most = 2 * weights * value**power, int(room * gpus) // (2 * weights)
        if least > room * gpus:
            largest = math.isqrt(most) if power == 2 else most
            step = 2 * config.model.num_heads if name == "model.hidden_size" else 1
            raise UserError(
                f"{name} {value} has weights of more than {float(min(least // GIB, 10**30)):.2g} GiB, "
                f"which {gpus:,} {machine} do not hold: use at most {max(largest // step, 1) * step}"
            )


def _widths(config: DiTPlanConfig) -> list[tuple[str, int, int, int]]:
    """(setting, its value, n, power): at least n * value^power weights are in matrices of this width."""
    model = config.model
    d, patch = model.hidden_size, math.prod(model.patch_size)
    return [
        ("model.hidden_size", d, 4 * model.depth, 2),
        ("model.mlp_ratio", int(model.mlp_ratio), 2 * d * d * model.depth, 1),
        ("model.in_channels", model.in_channels, d * patch, 1),
        ("model.local_width", model.local_width, 2, 2),
        ("text.buckets", config.text.buckets, config.text.dim, 1),
    ]
