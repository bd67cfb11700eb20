"""Cases for n ranks: `torchrun --nproc-per-node n -m tests.parallel.sequence_cases REPORT`; see test_sequence.py."""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny import tiny_dit
from videodit.models.checkpointing import POLICIES
from videodit.models.dit import VideoDiT
from videodit.models.local import LocalBlock
from videodit.models.token_layout import WHOLE, TokenLayout
from videodit.parallel.mesh import gather_objects, init_process, leave, shutdown
from videodit.parallel.sequence import SplitTokens, exchange, split_layout
from videodit.training.dit_model import compile_blocks

# What does not divide by 2 or 4: frames, positions, heads.
CASES: dict[str, dict[str, Any]] = {
    "pairs": {},
    "even": {"size": (4, 4, 8)},
    "one frame": {"size": (1, 6, 6)},
    "fewer positions than ranks": {"size": (5, 2, 2)},
    "full": {"pattern": "f", "size": (3, 6, 6)},
    "all kinds": {"pattern": "tfs", "depth": 3, "cross_attention": "stf"},
    "three heads": {"pattern": "ft", "num_heads": 3, "qk_norm": "all", "size": (3, 6, 6)},
    "patches over time": {"patch_size": (3, 2, 2), "size": (9, 6, 6)},
    "micro-conditions": {"micro_conditioning": True},
    "local layers": {"local_width": 8, "absolute_position": True, "final_modulation": "bias"},
    "local layers, full": {"local_width": 8, "pattern": "tfs", "depth": 3, "size": (8, 4, 4)},
    "local layers, more ranks than frames": {"local_width": 8, "size": (3, 6, 6)},
    "local layers, one frame": {"local_width": 8, "size": (1, 6, 6)},
    "local layers, patches over time": {"local_width": 8, "patch_size": (3, 2, 2), "size": (9, 6, 6)},
    **{f"checkpointing {policy}": {"policy": policy, "pattern": "stf", "depth": 3} for policy in POLICIES[1:]},
}


def inputs(size: tuple[int, int, int], b: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    latents, sigma = torch.randn(b, 4, *size, generator=generator), torch.rand(b, size[0], generator=generator)
    return latents, sigma, torch.randn(b, 5, 12, generator=generator), torch.arange(5) < torch.tensor([[3], [5]])


def equals_one_process(policy: str = "none", size: tuple[int, int, int] = (5, 6, 10), **changes: Any) -> None:
    """Loss, output and gradients are those of one process with all tokens."""
    model = tiny_dit(**changes).train()
    latents, sigma, text, mask = inputs(size)
    conditions = torch.tensor([[48.0, 64.0, 0.0, 3.0, 8.0], [90.0, 50.0, 4.0, 0.0, 24.0]])
    whole = model(latents, sigma, text, mask, micro_conditions=conditions)
    whole_loss = (whole - latents).square().mean()
    whole_loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.checkpointing = policy
    group = dist.group.WORLD
    pt, ph, pw = model.config.patch_size
    layout = split_layout(group, size[0] // pt, size[1] // ph * (size[2] // pw))
    assert isinstance(layout, SplitTokens)
    out = model(latents, sigma, text, mask, micro_conditions=conditions, layout=layout)
    torch.testing.assert_close(out, whole, rtol=1e-5, atol=1e-5)
    loss = (out - latents).square().mean() / dist.get_world_size()
    loss.backward()
    dist.all_reduce(loss := loss.detach())
    torch.testing.assert_close(loss, whole_loss.detach(), rtol=1e-5, atol=0)
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        dist.all_reduce(grad)
        scale = expected[name].abs().max().clamp(min=1e-6)  # of this weight: small gradients are held to it too
        torch.testing.assert_close(grad / scale, expected[name] / scale, rtol=1e-5, atol=1e-5, msg=name)


@contextmanager
def all_to_alls() -> Iterator[list[int]]:
    """Bytes that leave this rank, of every all-to-all inside."""
    sent: list[int] = []
    original = dist.all_to_all_single

    def count(received: Tensor, given: Tensor, *args: Any, **kwargs: Any) -> Any:
        leaves = given.numel() * given.element_size()
        if not args:  # equal parts, one of which stays
            leaves = leaves * (dist.get_world_size() - 1) // dist.get_world_size()
        sent.append(leaves)
        return original(received, given, *args, **kwargs)

    dist.all_to_all_single = count
    try:
        yield sent
    finally:
        dist.all_to_all_single = original


def two_switches_a_pair() -> None:
    """d channels of every padded token, once to temporal and once back for each pair; the last pair stays."""
    n = dist.get_world_size()
    model = tiny_dit(depth=6)
    latents, sigma, text, mask = inputs((5, 6, 10))
    t, s, d = -(-5 // n) * n, -(-15 // n) * n, 24
    with all_to_alls() as sent, torch.no_grad():
        model(latents, sigma, text, mask, layout=split_layout(dist.group.WORLD, 5, 15))
    assert sent == [2 * (t // n) * s * d * 4 * (n - 1) // n] * 5, sent  # s t s t s t: five switches
    with all_to_alls() as sent:
        model(latents, sigma, text, mask, layout=split_layout(dist.group.WORLD, 5, 15)).sum().backward()
    assert len(sent) == 10  # each again, backwards


def full_attention_moves_heads() -> None:
    """Queries, keys, values and the result, each once a block: a rank keeps one n-th of its tokens' channels."""
    n = dist.get_world_size()
    model = tiny_dit(pattern="f")
    latents, sigma, text, mask = inputs((4, 4, 8))
    with all_to_alls() as sent, torch.no_grad():
        model(latents, sigma, text, mask, layout=split_layout(dist.group.WORLD, 4, 8))
    t, s, heads = 4, 8, -(-2 // n) * n  # of two heads of 12 channels; padded heads are sent as well
    assert sent == [2 * (t // n) * s * heads * 12 * 4 * (n - 1) // n] * 4 * 2, sent


def local_layers_work_on_their_own_frames() -> None:
    """1/n of the local blocks' FLOPs, for each one frame of features to either neighbour, and a switch before the last.

    Halos are sent, not computed again: no FLOPs for them.
    """
    n, rank = dist.get_world_size(), dist.get_rank()
    b, t, h, w, width, depth = 2, 8, 4, 6, 8, 2
    model = tiny_dit(local_width=width, local_depth=depth, depth=6)
    given = inputs((t, h, w), b)
    layout = split_layout(dist.group.WORLD, t, h // 2 * (w // 2))
    whole, part = (local_flops(model, *given, layout=each) for each in (WHOLE, layout))
    assert part * n == whole > 0, (part, whole)
    with all_to_alls() as sent, torch.no_grad():
        model(*given, layout=layout)
    halo = b * h * w * width * 4 * ((rank > 0) + (rank < n - 1))
    switch = b * (t // n) * (-(-6 // n) * n) * 24 * 4 * (n - 1) // n
    positions = b * t * -(-6 // n) * 24 * 4 * (n - 1) // n
    switches = [switch, positions] * 3  # the last one back to whole frames, for the layers after the patches
    assert sent == [halo] * depth + switches + [halo] * depth, (sent, halo, switches)
    with all_to_alls() as sent:
        model(*given, layout=layout).sum().backward()
    assert sent.count(halo) == 4 * depth  # each again, backwards


def local_flops(model: VideoDiT, *given: Tensor, layout: TokenLayout) -> int:
    """Of all local blocks in a forward pass, those over time and in each frame."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*given, layout=layout)
    blocks = [name for name, module in model.named_modules() if isinstance(module, LocalBlock)]
    counts = counter.get_flop_counts()
    return sum(sum(counts[f"VideoDiT.{name}"].values()) for name in blocks)


def exchange_is_its_own_inverse() -> None:
    x = torch.randn(2, 3, 4 * dist.get_world_size(), 5)
    there = exchange(x, dist.group.WORLD, split=2, join=1)
    assert there.shape == (2, 3 * dist.get_world_size(), 4, 5)
    assert torch.equal(exchange(there, dist.group.WORLD, split=1, join=2), x)


def layouts_are_values() -> None:
    """A switch leaves the old layout as it was: a block that is computed again finds it."""
    layout = SplitTokens(dist.group.WORLD, 4, 8)
    other, _ = layout.switch("t", torch.zeros(1, 4 // dist.get_world_size(), 8, 2))
    assert layout.axis != other.axis and layout.switch("s", torch.zeros(1, 1, 8, 2))[0] is layout


def compiled_blocks_are_whole_graphs() -> None:
    """With the switches between them, blocks are one graph a kind, and one more for captions of any length."""
    torch._dynamo.reset()
    counters.clear()
    plain, model = tiny_dit().train(), tiny_dit().train()
    counter = CompileCounterWithBackend("aot_eager")
    compile_blocks(model, exchanging=True, backend=counter)
    latents, sigma, text, mask = inputs((5, 6, 10))
    layout = split_layout(dist.group.WORLD, 5, 15)
    for words in (5, 4, 3):
        outs = []
        for each in (plain, model):
            each.zero_grad()
            outs.append(each(latents, sigma, text[:, :words], mask[:, :words], layout=layout))
            (outs[-1] - latents).square().mean().backward()
        torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-5)
        for one, other in zip(model.parameters(), plain.parameters()):
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    assert not counters["graph_break"], counters["graph_break"]
    assert counter.frame_count == 3, counter.frame_count


def run(function: Any, **options: Any) -> str:
    try:
        function(**options)
    except Exception:
        mine = traceback.format_exc()
    else:
        mine = ""
    return next((text for text in gather_objects(mine) if text), "")


if __name__ == "__main__":
    world = init_process("cpu")
    torch.manual_seed(0)
    report = {}
    extras = [
        two_switches_a_pair,
        full_attention_moves_heads,
        local_layers_work_on_their_own_frames,
        exchange_is_its_own_inverse,
        layouts_are_values,
    ]
    if sys.argv[2:] == ["compiled"]:  # takes each rank many seconds
        extras = [compiled_blocks_are_whole_graphs]
    else:
        report = {name: run(equals_one_process, **options) for name, options in CASES.items()}
    report |= {extra.__name__: run(extra) for extra in extras}
    if world.is_main:
        Path(sys.argv[1]).write_text(json.dumps(report))
    shutdown()
    leave(0)
