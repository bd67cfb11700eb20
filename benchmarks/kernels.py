"""Triton's kernels beside torch.compile of what they replace, on a CUDA GPU: right first, then time and bandwidth.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

Each kernel is compared with its reference in float64, forward and backward, then both are timed in turn, forward alone
and forward with backward; medians of the GPU's own time. The ideal time is the bytes that the operation must read and
write over --bandwidth. A kernel becomes a default only with a committed result in which it beats torch.compile of its
reference. The last rows are whole training steps of the DiT at two widths, eager and with compiled blocks, with and
without the kernels. Figures are written as they come. Exits 1 if a kernel is wrong or does not compile.
"""

import argparse
import json
import statistics
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from videodit.evaluation.machine import machine_facts
from videodit.kernels import norm_modulate, norm_rope, temporal_attention
from videodit.kernels.choice import choose_kernels
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.rope import rope_table
from videodit.training.dit_model import compile_blocks

HEAD_START = 10_000_000
"""Cycles of the GPU's clock: some 5 ms."""


@dataclass(frozen=True)
class Case:
    """An operation: Triton's, its reference, inputs that need a gradient, and the buffers it moves at least."""

    name: str
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    given: list[Tensor]
    forward_bytes: int
    backward_bytes: int


def cases(b: int, t: int, s: int, h: int, e: int, dtype: torch.dtype) -> list[Case]:
    """The kernels at one shape: b clips, t frames of s tokens, h heads of e channels."""
    d = h * e
    table = rope_table(t, s, 1, e).cuda()
    buffer = b * t * s * d * dtype.itemsize

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype, requires_grad=True)

    tokens, heads = (b, t, s, d), (b, t, s, h, e)
    modulation = [make(b, 1, 1, d) for _ in range(3)]
    return [
        Case(
            "norm + RoPE",
            lambda x, w: norm_rope.norm_rope(x, w, table),
            lambda x, w: norm_rope.norm_rope_reference(x, w, table),
            [make(*heads), make(e)],
            2 * buffer,
            3 * buffer,
        ),
        Case(
            "norm + modulate",
            norm_modulate.norm_modulate,
            norm_modulate.norm_modulate_reference,
            [make(*tokens), *modulation[:2]],
            2 * buffer,
            3 * buffer,
        ),
        Case(
            "residual + gate + norm + modulate",
            norm_modulate.residual_norm_modulate,
            norm_modulate.residual_norm_modulate_reference,
            [make(*tokens), make(*tokens), *modulation],
            4 * buffer,
            6 * buffer,
        ),
        Case(
            "temporal attention",
            lambda *x: temporal_attention.temporal_attention(*x, table),
            lambda *x: temporal_sdpa(*x, table),
            [make(*heads), make(*heads), make(*heads), make(e), make(e)],
            4 * buffer,
            7 * buffer,
        ),
    ]


def temporal_sdpa(query: Tensor, key: Tensor, value: Tensor, wq: Tensor, wk: Tensor, table: Tensor) -> Tensor:
    """What the DiT does without the kernel."""
    from videodit.models.attention import attend

    query, key = norm_rope.norm_rope_reference(query, wq, table), norm_rope.norm_rope_reference(key, wk, table)
    return attend("t", query, key, value).unflatten(-1, query.shape[-2:])


def milliseconds(run: Callable[[], Any], repeats: int = 20, *, head_start: bool = True) -> float:
    """Median over repeats, after 5 that are not counted.

    Args:
        run: what is timed.
        repeats: that count.
        head_start: the GPU waits first, so that the time is the kernels' and not Python's, which for a kernel of a
            tenth of a millisecond takes as long to start it.
    """
    times = []
    for index in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        if head_start:
            torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if index >= 5:
            times.append(start.elapsed_time(end))
    return statistics.median(times)


def as_tuple(outs: Any) -> tuple[Tensor, ...]:
    return outs if isinstance(outs, tuple) else (outs,)


def error_of(function: Callable[..., Any], case: Case) -> float:
    """Largest error of outputs and gradients against the reference in float64, over the largest value of each."""
    exact = [tensor.detach().double().requires_grad_() for tensor in case.given]
    expected, outs = as_tuple(case.reference(*exact)), as_tuple(function(*case.given))
    grads = [torch.randn_like(out) for out in outs]
    wanted = torch.autograd.grad(expected, exact, [grad.double() for grad in grads])
    found = torch.autograd.grad(outs, case.given, grads)
    pairs = zip((*outs, *found), (*expected, *wanted))
    return max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)


def forward_backward(function: Callable[..., Any], given: list[Tensor], grads: list[Tensor]) -> None:
    torch.autograd.grad(as_tuple(function(*given)), given, grads)


def measure(case: Case, bandwidth: float) -> dict[str, float]:
    compiled = torch.compile(case.reference)
    figures = {"error": error_of(case.ours, case), "compiled_error": error_of(compiled, case)}
    with torch.no_grad():
        grads = [torch.randn_like(out) for out in as_tuple(case.ours(*case.given))]
    for name, function in (("triton", case.ours), ("compiled", compiled), ("eager", case.reference)):
        with torch.no_grad():
            figures[f"{name}_forward_ms"] = milliseconds(partial(function, *case.given))
        figures[f"{name}_train_ms"] = milliseconds(partial(forward_backward, function, case.given, grads))
    figures["ideal_forward_ms"] = case.forward_bytes / bandwidth * 1e3
    figures["ideal_train_ms"] = (case.forward_bytes + case.backward_bytes) / bandwidth * 1e3
    return figures


def step_ms(width: int, heads: int, depth: int, t: int, side: int, batch: int, kernels: str, compiled: bool) -> float:
    """Forward and backward of a DiT on t x side x side tokens, bf16."""
    torch._dynamo.reset()
    choose_kernels(kernels)
    config = DiTConfig(in_channels=16, hidden_size=width, depth=depth, num_heads=heads, text_dim=512)
    model = VideoDiT(config).cuda().to(torch.bfloat16)
    if compiled:
        compile_blocks(model)
    make: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    latents, text = torch.randn(batch, 16, t, 2 * side, 2 * side, **make), torch.randn(batch, 64, 512, **make)
    sigma, mask = torch.rand(batch, **make), torch.ones(batch, 64, dtype=torch.bool, device="cuda")

    def step() -> None:
        model.zero_grad()
        model(latents, sigma, text, mask).float().square().mean().backward()

    return milliseconds(step, repeats=8, head_start=False)  # a step has to be launched too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out")
    parser.add_argument("--bandwidth", type=float, default=4.8e12, help="bytes/s of the GPU's memory (H200: 4.8e12)")
    parser.add_argument("--tolerance", type=float, default=3e-2, help="of bf16 against float64")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--skip_steps", action="store_true", help="only the kernels, no whole training steps")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA GPU here; the kernels' values are tested on a CPU by tests/kernels/test_gpu.py")
    shapes = {"width 1152, t 16, s 1024": (16, 1024, 16, 72), "width 2048, t 16, s 1024": (16, 1024, 16, 128)}
    results: dict[str, Any] = {"machine": machine_facts(), "batch": options.batch, "kernels": {}, "steps": {}}
    table = Table("kernel", "shape", "error", "fwd (ms)", "compiled", "ideal", "train (ms)", "compiled", "ideal")
    wrong = []

    def keep() -> None:
        """After each figure: a machine that is lent may be taken back."""
        if options.out:
            Path(options.out).write_text(json.dumps(results, indent=2) + "\n")

    for shape_name, shape in shapes.items():
        choose_kernels("triton")
        for case in cases(options.batch, *shape, torch.bfloat16):
            torch._dynamo.reset()
            try:
                figures = measure(case, options.bandwidth)
            except Exception as error:  # what a compiler raises has no common class; the other kernels are still told
                traceback.print_exc()
                results["kernels"][f"{case.name}, {shape_name}"] = {"raised": f"{type(error).__name__}: {error}"}
                wrong.append(case.name)
                keep()
                continue
            results["kernels"][f"{case.name}, {shape_name}"] = figures
            keep()
            print(f"{case.name}, {shape_name}: {json.dumps(figures)}", flush=True)
            if not figures["error"] < options.tolerance:
                wrong.append(case.name)
            columns = [f"{way}_{part}_ms" for part in ("forward", "train") for way in ("triton", "compiled", "ideal")]
            table.add_row(case.name, shape_name, f"{figures['error']:.1e}", *(f"{figures[c]:.3f}" for c in columns))
            torch.cuda.empty_cache()
    Console(width=160).print(table)
    if not options.skip_steps:
        for width, heads in ((1152, 16), (2048, 16)):
            for compiled in (False, True):
                for kernels in ("torch", "triton"):
                    key = f"width {width}, {'compiled' if compiled else 'eager'}, {kernels}"
                    try:
                        ms = step_ms(width, heads, 8, 16, 32, options.batch, kernels, compiled)
                    except Exception as error:  # as above
                        traceback.print_exc()
                        results["steps"][key] = f"{type(error).__name__}: {error}"
                        wrong.append(f"a step of {key}")
                    else:
                        results["steps"][key] = ms
                        print(f"{key}: {ms:.1f} ms", flush=True)
                    keep()
    if wrong:
        sys.exit(f"error: wrong: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
