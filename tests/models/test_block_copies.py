"""Which copies of whole token buffers a block's forward pass makes on a CPU: the profiler sees each `aten::copy_`."""

import math
from collections import Counter

import pytest
import torch
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile

from tests.models.tiny import randomize
from videodit.models.attention import SHORT_SEQUENCE
from videodit.models.dit_block import DiTBlock
from videodit.models.rope import rope_table

B, D, HEADS = 2, 32, 2
SHORT, LONG = {"s": (3, 4, 4), "t": (5, 2, 4), "f": (3, 4, 4)}, {"s": (2, 12, 12), "t": (130, 1, 2), "f": (3, 8, 8)}


def copies(kind: str, size: tuple[int, int, int], dtype: torch.dtype, grad: bool) -> Counter[str]:
    """How many there are by the outermost operation that makes them; linear layers apart, which write their bias."""
    t, h, w = size
    block = randomize(DiTBlock(kind, D, HEADS, 4 * D, qk_norm="head", activation="gelu", reads_text=True)).to(dtype)
    assert block.cross_attention is not None
    x, shared = torch.randn(B, t, h * w, D, dtype=dtype), torch.randn(B, 1, 1, 6, D, dtype=dtype)
    keys_values = block.cross_attention.keys_values(torch.randn(B, 5, D, dtype=dtype))
    mask = torch.arange(5) < torch.tensor([3, 5])[:, None, None, None]
    inputs = (x.requires_grad_(grad), shared, rope_table(t, h, w, D // HEADS), keys_values, mask)
    with torch.set_grad_enabled(grad), profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        block(*inputs)
    found: Counter[str] = Counter()
    for event in profiler.events():
        if event.name == "aten::copy_" and math.prod(event.input_shapes[0]) >= x.numel():
            found[outermost(event)] += 1
    assert found.pop("linear") == 8  # addmm copies the bias under its result: no token is read
    return found


def outermost(event: FunctionEvent) -> str:
    name = event.name
    while event is not None:
        name = event.name if event.name.startswith("aten::") else name
        event = event.cpu_parent
    return name.removeprefix("aten::")


@pytest.mark.parametrize("size", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("kind", "stf")
def test_float32_copies_no_tokens(kind: str, size: dict) -> None:
    """With a gradient the heads' results of short attention are put beside one another, which writes them once more."""
    t, h, w = size[kind]
    length = {"s": h * w, "t": t, "f": t * h * w}[kind]
    assert (length > SHORT_SEQUENCE) == (size is LONG)
    assert copies(kind, size[kind], torch.float32, grad=False) == {}
    assert copies(kind, size[kind], torch.float32, grad=True) == {}


@pytest.mark.parametrize("kind", "stf")
def test_bfloat16_converts_for_its_norms_and_copies_for_short_attention(kind: str) -> None:
    """There its products are faster with copies than the fused kernel without: docs/performance.md."""
    converted = {"to": 2 * 2, "linalg_vector_norm": 1}  # to float32 and back for queries and keys; queries of the text
    for grad in (False, True):
        short, long = (copies(kind, size[kind], torch.bfloat16, grad) for size in (SHORT, LONG))
        assert long == {**converted, "matmul": 1, "reshape": 1}  # of the attention to the text
        assert short == {**converted, "matmul": 1 + 3, "reshape": 1 + 1}
