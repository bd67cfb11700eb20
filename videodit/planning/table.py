"""A plan as the terminal shows it."""

from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table

from videodit.planning.machines import GIB
from videodit.planning.memory import DEVICE_PARTS
from videodit.planning.plan import Plan
from videodit.planning.plan_config import DiTPlanConfig
from videodit.progress import duration


def print_plans(plans: Sequence[Plan], console: Console | None = None) -> None:
    """The plan of a run, or those of its stages one by one with their sum."""
    console = console or Console()
    for number, plan in enumerate(plans, 1):
        if len(plans) > 1:
            console.print(f"stage {number} of {len(plans)}: {plan.config.data.name}", highlight=False)
        print_plan(plan, console)
    if len(plans) > 1:
        steps, seconds = (sum(values) for values in zip(*((plan.config.max_steps, plan.seconds) for plan in plans)))
        console.print(f"all stages, {steps:,} steps: {_time(seconds, plans[0].config.gpus)}", highlight=False)


def print_plan(plan: Plan, console: Console | None = None) -> None:
    """Parameters, steps and memory, as tables."""
    console = console or Console()
    config, machine = plan.config, plan.machine
    kind = "DiT" if isinstance(config, DiTPlanConfig) else "VAE"
    dtype = "bf16" if plan.dtype == torch.bfloat16 else "fp32"
    count = plan.parameters
    parameters = f"{(count.total + count.frozen) / 1e6:,.1f} M parameters"
    if count.frozen:
        parameters += f", {count.total / 1e6:,.2f} M of them trained,"
    console.print(
        f"{kind} of {parameters} on {config.gpus} x {machine.name} "
        f"({machine.memory_bytes / GIB:.0f} GiB, {machine.peak_flops / 1e12:,.1f} TFLOP/s peak), {dtype}, "
        f"global batch {config.global_batch_size}, micro batch {plan.chosen.micro_batch_size}",
        highlight=False,
    )
    console.print(_steps(plan))
    if config.batch_by == "time" and len(plan.buckets) > 1:
        console.print("batch_by time: clips/step by FLOPs, which stand for the time that a run measures when it begins")
    if plan.caption_flops:
        console.print(
            f"the frozen text encoder takes {plan.caption_flops:.3e} FLOPs a caption, once, in videodit encode: "
            "not in the steps",
            highlight=False,
        )
    console.print(_memory(plan))
    if plan.chosen.memory.host:
        size = plan.chosen.memory.host / GIB
        console.print(
            f"the offloaded optimizer takes {size:,.2f} GiB of host memory on each rank "
            f"({size * config.gpus:,.1f} GiB over all {config.gpus}); checkpoints' copies come on top",
            highlight=False,
        )
    console.print(
        f"{config.max_steps:,} steps: {_time(plan.seconds, config.gpus)} "
        f"at {config.mfu:.0%} MFU (an assumption: --mfu)",
        highlight=False,
    )


def _time(seconds: float, gpus: int) -> str:
    hours = seconds * gpus / 3600
    return (
        f"{duration(seconds)}, {hours:,.1f} GPU-hours" if hours >= 1 else f"{duration(seconds)}, {hours:.2g} GPU-hours"
    )


def _steps(plan: Plan) -> Table:
    headers = ("bucket", "steps", "tokens/clip", "clips/step", "FLOPs/step", "s/step", "tokens/s")
    table = Table(*headers, title="steps", title_justify="left")
    for row in plan.buckets:
        rate = row.tokens * row.clips / row.step_s
        cells = (
            f"{row.steps:,.0f}",
            f"{row.tokens:,}",
            f"{row.clips:,}",
            f"{row.step_flops:.3e}",
            f"{row.step_s:.3g}",
            f"{rate:,.0f}",
        )
        table.add_row(row.name, *cells)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _memory(plan: Plan) -> Table:
    host = ["host"] if any(choice.memory.host for choice in plan.choices) else []
    title = f"GiB on a rank, of {plan.room / GIB:.1f} usable (> the config; red does not fit)"
    short = {"gradients": "grads", "optimizer": "optim", "activations": "activ"}
    headers = [short.get(part, part) for part in DEVICE_PARTS]
    table = Table("", "ZeRO", "recompute", *headers, "total", *host, title=title, title_justify="left")
    for choice in plan.choices:
        memory = choice.memory
        fits = memory.total <= plan.room
        cells = [f"{getattr(memory, part) / GIB:.2f}" for part in (*DEVICE_PARTS, "total", *host)]
        mark = ">" if choice is plan.chosen else ""
        table.add_row(mark, str(choice.zero_stage), choice.checkpointing, *cells, style=None if fits else "red")
    for column in table.columns[3:]:
        column.justify = "right"
    return table
