"""Attention over short sequences on a CPU: plain products, ours, and torch's fused kernel, forward and with gradients.

Method: each form in turn, again and again, in one thread; medians of the process' CPU time, so that other work on the
machine counts little. Token buffers are (b, t, s, h, e), seen as `attend` sees them, and the result is put back into
one. What is compared is in videodit/kernels/short_attention.py.

    OMP_NUM_THREADS=1 python benchmarks/short_attention.py --dtype float32
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from videodit.kernels.short_attention import short_attention, short_attention_reference

SHAPES = [  # kind (x: to the text), b, t, s, h, e, text tokens
    ("s", 16, 5, 16, 4, 32, 0),
    ("s", 64, 5, 4, 4, 32, 0),
    ("s", 4, 8, 64, 6, 64, 0),
    ("s", 2, 5, 120, 16, 72, 0),
    ("t", 16, 5, 16, 4, 32, 0),
    ("t", 1, 8, 256, 6, 64, 0),
    ("t", 2, 16, 64, 6, 64, 0),
    ("t", 1, 16, 256, 6, 64, 0),
    ("t", 1, 32, 64, 16, 72, 0),
    ("f", 16, 5, 16, 4, 32, 0),
    ("f", 4, 2, 64, 6, 64, 0),
    ("x", 16, 5, 16, 4, 32, 12),
    ("x", 1, 8, 256, 6, 64, 64),
]
AXES = {"s": (0, 1), "t": (2, 3), "f": (1, 2), "x": (1, 2)}
FORMS: dict[str, Callable[..., Tensor]] = {
    "plain": short_attention_reference,
    "ours": short_attention,
    "fused": lambda query, key, value, mask: F.scaled_dot_product_attention(query, key, value, attn_mask=mask),
}


def times_ms(shape: tuple, dtype: torch.dtype, repeats: int) -> dict[str, tuple[float, float]]:
    """Milliseconds of a forward pass without gradients, and of forward and backward, for each form."""
    kind, b, t, s, h, e, text = shape
    query = torch.randn(b, t, s, h, e, dtype=dtype, requires_grad=True)
    others = [torch.randn(*((b, text, 1) if text else (b, t, s)), h, e, dtype=dtype) for _ in range(2)]
    inputs = (query, *(x.requires_grad_() for x in others))
    mask = (torch.arange(text) < text // 2 + 1).expand(b, 1, 1, text) if text else None
    grad = torch.randn(query.shape, dtype=dtype)

    def run(form: Callable[..., Tensor]) -> Tensor:
        views = [x.flatten(*AXES[kind]).transpose(1, 2) for x in inputs]
        return form(*views, mask).transpose(1, 2).reshape(query.shape)

    taken: dict[tuple[str, bool], list[float]] = {(name, back): [] for name in FORMS for back in (False, True)}
    for _ in range(repeats):
        for (name, back), times in taken.items():
            start = time.process_time()
            with torch.set_grad_enabled(back):
                out = run(FORMS[name])
            if back:
                torch.autograd.grad(out, inputs, grad)
            times.append(1e3 * (time.process_time() - start))
    return {name: (statistics.median(taken[name, False]), statistics.median(taken[name, True])) for name in FORMS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| kind, b t s h e, text | " + " | ".join(FORMS) + " |")
    print("|---" * (1 + len(FORMS)) + "|")
    for shape in SHAPES:
        found = times_ms(shape, getattr(torch, options.dtype), options.repeats)
        cells = [f"{forward:.2f}, {both:.2f}" for forward, both in found.values()]
        print(f"| {' '.join(map(str, shape))} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
