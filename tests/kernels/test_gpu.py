"""Triton's kernels, in its interpreter on a CPU: values, gradients, bytes moved, the whole DiT with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import make_boxed_func
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import tiny_dit
from videodit.kernels import choice
from videodit.kernels.gpu import norm_modulate as gpu_norm_modulate
from videodit.kernels.gpu import norm_rope as gpu_norm_rope
from videodit.kernels.gpu import temporal_attention as gpu_temporal
from videodit.kernels.norm_modulate import norm_modulate_reference, residual_norm_modulate_reference
from videodit.kernels.norm_rope import norm_rope_reference
from videodit.kernels.temporal_attention import temporal_attention_reference
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.layers import add_and_norm
from videodit.models.rope import rope_table
from videodit.training.dit_model import compile_blocks

TOLERANCE = [(torch.float32, 2e-5), (torch.bfloat16, 3e-2)]


@pytest.fixture
def triton_kernels() -> Iterator[None]:
    choice.choose_kernels("triton")
    yield
    choice.choose_kernels("torch")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_equals_reference(
    ours: Any, reference: Any, given: list[Tensor], dtype: torch.dtype, tolerance: float
) -> None:
    """Outputs and all gradients against the reference in float64."""
    given = [tensor.to(dtype).requires_grad_() for tensor in given]
    exact = [tensor.detach().double().requires_grad_() for tensor in given]
    outs, expected = ours(*given), reference(*exact)
    outs, expected = ((x,) if isinstance(x, Tensor) else x for x in (outs, expected))
    grads = [random(*out.shape, seed=7 + index, dtype=dtype) for index, out in enumerate(outs)]
    for out, exact_out in zip(outs, expected):
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact_out, rtol=tolerance, atol=tolerance)
    found = torch.autograd.grad(outs, given, grads)
    wanted = torch.autograd.grad(expected, exact, [grad.double() for grad in grads])
    for one, other in zip(found, wanted):
        assert one.dtype == dtype
        torch.testing.assert_close(
            one.double(), other, rtol=tolerance, atol=tolerance * max(1.0, float(other.abs().max()))
        )


@pytest.mark.parametrize("all_heads", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 3, 5, 3, 6), (1, 2, 2, 4, 16)])
def test_norm_rope(shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, all_heads: bool) -> None:
    b, t, s, h, e = shape
    table = rope_table(t, s, 1, e)
    given = [random(*shape), random(h * e if all_heads else e)]
    assert_equals_reference(
        lambda x, weight: gpu_norm_rope.norm_rope(x, weight, table, 1e-6),
        lambda x, weight: norm_rope_reference(x, weight, table),
        given,
        dtype,
        tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("frames", [False, True])
def test_norm_modulate(dtype: torch.dtype, tolerance: float, frames: bool) -> None:
    modulations = [random(2, 3 if frames else 1, 1, 20, seed=index) for index in (1, 2)]
    assert_equals_reference(
        lambda *given: gpu_norm_modulate.norm_modulate(*given, 1e-6),
        norm_modulate_reference,
        [random(2, 3, 11, 20), *modulations],
        dtype,
        tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("gate", [(2, 3, 1, 20), (2, 1, 1, 20), (20,)])
@pytest.mark.parametrize("norm", [(2, 3, 1, 20), (20,)])
def test_residual_norm_modulate(
    dtype: torch.dtype, tolerance: float, gate: tuple[int, ...], norm: tuple[int, ...]
) -> None:
    x, branch = random(2, 3, 11, 20), random(2, 3, 11, 20, seed=1)
    assert_equals_reference(
        lambda *given: gpu_norm_modulate.residual_norm_modulate(*given, 1e-6),
        residual_norm_modulate_reference,
        [x, branch, random(*gate, seed=2), random(*norm, seed=3), random(*norm, seed=4)],
        dtype,
        tolerance,
    )


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
@pytest.mark.parametrize("parts", ["norm and rotation", "rotation", "neither"])
@pytest.mark.parametrize("shape", [(2, 5, 9, 2, 6), (1, 3, 9, 1, 72), (1, 33, 2, 2, 4), (2, 1, 3, 1, 8)])
def test_temporal_attention(shape: tuple[int, ...], parts: str, dtype: torch.dtype, tolerance: float) -> None:
    b, t, s, h, e = shape
    table = None if parts == "neither" else rope_table(t, s, 1, e)
    given = [random(*shape, seed=index) for index in range(3)]
    if parts == "norm and rotation":
        given += [random(e, seed=index) for index in (3, 4)]

    def run(function: Any, *given: Tensor) -> Tensor:
        weights = given[3:] or (None, None)
        return function(*given[:3], *weights, table, 1e-6)

    assert_equals_reference(
        lambda *given: run(gpu_temporal.temporal_attention, *given),
        lambda *given: run(temporal_attention_reference, *given),
        given,
        dtype,
        tolerance,
    )


def test_shapes_and_gradients_are_registered_as_torch_wants_them() -> None:
    x, table = random(1, 2, 3, 2, 4).requires_grad_(), rope_table(2, 3, 1, 4)
    weight = random(4).requires_grad_()
    tokens, modulation = random(1, 2, 3, 8).requires_grad_(), random(1, 2, 1, 8).requires_grad_()
    torch.library.opcheck(gpu_norm_rope.norm_rope, (x, weight, table, 1e-6))
    torch.library.opcheck(gpu_norm_modulate.norm_modulate, (tokens, modulation, modulation, 1e-6))
    residual = (tokens, tokens, modulation, modulation, modulation, 1e-6)
    torch.library.opcheck(gpu_norm_modulate.residual_norm_modulate, residual)
    torch.library.opcheck(gpu_temporal.temporal_attention, (x, x, x, weight, weight, table, 1e-6))
    torch.library.opcheck(gpu_temporal.temporal_attention, (x, x, x, None, None, None, 1e-6))


def test_small_weights_of_a_norm_keep_their_digits_in_bf16(triton_kernels: None) -> None:
    """The kernel takes one less than the weight, which bf16 would round to a multiple of 1/256."""
    norm = nn.LayerNorm(20).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(0.01 * random(20))
    x, branch = (random(2, 3, 4, 20, seed=index, dtype=torch.bfloat16) for index in range(2))
    total, normed = add_and_norm(x, branch, None, norm)
    expected = nn.functional.layer_norm(total.double(), (20,), norm.weight.double(), eps=norm.eps)
    torch.testing.assert_close(normed.double(), expected, rtol=0.01, atol=1e-5)
    normed.square().sum().backward()
    assert norm.weight.grad is not None and norm.weight.grad.dtype == torch.bfloat16


class CountedOps(TorchDispatchMode):
    """How often an operation runs."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.count = name, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += str(func) == self.name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("qk_norm", ["head", "all", "none"])
def test_the_whole_model_is_the_same_with_them(triton_kernels: None, qk_norm: str) -> None:
    config = DiTConfig(
        in_channels=4, hidden_size=24, depth=2, num_heads=2, text_dim=12, qk_norm=qk_norm, cross_attention="s"
    )
    model = VideoDiT(config)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):  # the gates open, norms with weights of their own
            parameter.add_(0.2 * random(*parameter.shape, seed=index))
    latents, sigma, text = random(2, 4, 3, 4, 6), torch.rand(2, 3), random(2, 5, 12)
    mask = torch.arange(5) < torch.tensor([[3], [5]])

    def run() -> list[Tensor]:
        model.zero_grad()
        out = model(latents, sigma, text, mask)
        (out * random(*out.shape, seed=9)).sum().backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    model.checkpointing = "attention"
    with CountedOps("videodit.temporal_attention.default") as attention:
        found = run()
    assert attention.count == 1  # of the one temporal block, not again in the backward pass
    model.checkpointing = "none"
    choice.choose_kernels("torch")
    for one, other in zip(found, run()):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * max(1.0, float(other.abs().max())))


class Traffic:
    """Bytes that kernels load and store in the interpreter, masked elements left out, by the buffers they lie in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from triton.runtime.interpreter import InterpreterBuilder

        self.loads: list[np.ndarray] = []
        self.stores: list[np.ndarray] = []
        load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

        def counted_load(builder: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self.loads.append(ptrs.data[mask.data.astype(bool)].ravel())
            return load(builder, ptrs, mask, *rest)

        def counted_store(builder: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self.stores.append(ptrs.data[mask.data.astype(bool)].ravel())
            return store(builder, ptrs, value, mask, *rest)

        monkeypatch.setattr(InterpreterBuilder, "create_masked_load", counted_load)
        monkeypatch.setattr(InterpreterBuilder, "create_masked_store", counted_store)

    def elements(self) -> tuple[int, int]:
        """Loaded and stored elements since the last call."""
        counts = tuple(sum(len(part) for part in parts) for parts in (self.loads, self.stores))
        self.loads.clear()
        self.stores.clear()
        return counts


def test_compiled_blocks_keep_them_as_single_operations(triton_kernels: None) -> None:
    """A block is one graph, forward and backward, in which each kernel is a node: nothing traces into it."""
    torch._dynamo.reset()
    plain, model = tiny_dit(), tiny_dit()
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    compile_blocks(model, backend=aot_autograd(fw_compiler=keep, bw_compiler=keep))  # with fullgraph
    given = (random(1, 4, 3, 4, 4), random(1, 3), random(1, 5, 12), torch.ones(1, 5, dtype=torch.bool))
    outs = [each(*given) for each in (plain, model)]
    torch.testing.assert_close(*outs, rtol=1e-4, atol=1e-4)
    for out in outs:
        out.square().mean().backward()
    for one, other in zip(model.parameters(), plain.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-4)
    found = [
        {name.removesuffix(".default"): names.count(name) for name in names if name.startswith("videodit.")}
        for names in graphs
    ]
    spatial = {"videodit.norm_modulate": 1, "videodit.norm_rope": 2, "videodit.residual_norm_modulate": 2}
    temporal = {
        "videodit.norm_modulate": 1, "videodit.temporal_attention": 1, "videodit.residual_norm_modulate": 1,
    }  # fmt: skip
    back = [{f"{name}_backward": count for name, count in kind.items()} for kind in (temporal, spatial)]
    assert found == [spatial, temporal, *back]


def test_elements_moved_are_those_of_the_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each token buffer once, and beside it only rows of weights, angles, modulations and partial sums."""
    traffic = Traffic(monkeypatch)
    b, t, s, h, e = 2, 4, 16, 2, 8
    n, d, tokens = b * t * s * h * e, h * e, b * t * s
    table, weight = rope_table(t, s, 1, e), random(e)
    x, y, z, g = (random(b, t, s, h, e, seed=index) for index in range(4))

    gpu_norm_rope.norm_rope(x, weight, table, 1e-6)
    assert traffic.elements() == (n + tokens * (e + e), n)  # the weight, and cos and sin of half as many angles
    gpu_norm_rope.norm_rope_backward(g, x, weight, table, 1e-6)
    programs = tokens // gpu_norm_rope.ROWS
    assert traffic.elements() == (2 * n + tokens * e + programs * e, n + programs * d)

    weights = (weight, weight, table, 1e-6)
    programs = b * s * h // (gpu_temporal.ROWS // t)
    rows = gpu_temporal.ROWS
    gpu_temporal.temporal_attention(x, y, z, *weights)
    assert traffic.elements() == (3 * n + programs * (2 * e + rows * e), n)
    gpu_temporal.temporal_attention_backward(g, x, y, z, *weights)
    assert traffic.elements() == (4 * n + programs * (2 * e + rows * e), 3 * n + programs * 2 * e)

    x, y, g, dsum = (random(b, t, s, d, seed=index) for index in range(4))
    modulation = random(b, t, 1, d)
    gpu_norm_modulate.norm_modulate(x, modulation, modulation, 1e-6)
    assert traffic.elements() == (n + 2 * n, n)  # shift and scale are read for each token: from a cache
    gpu_norm_modulate.residual_norm_modulate(x, y, modulation, modulation, modulation, 1e-6)
    assert traffic.elements() == (2 * n + 3 * n, 2 * n)
    programs = b * t * (s // gpu_norm_modulate.ROWS)
    gpu_norm_modulate.residual_norm_modulate_backward(dsum, g, x, y, modulation, modulation, modulation, 1e-6)
    assert traffic.elements() == (4 * n + n + programs * d, 2 * n + programs * 3 * d)


def test_every_program_is_on_the_grid_axis_that_has_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA allows 65,535 programs on a grid's second and third axis, and some two thousand million on the first.

    Triton launches on the current device, which has to be that of the tensors.
    """
    grids: list[tuple[int, ...]] = []
    devices, current = [0], []

    class Recorded:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            grids.append(grid)
            return lambda *args, **kwargs: current.append(devices[-1])

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        devices.append(tensor.shape[0])
        yield
        devices.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in (gpu_norm_rope, gpu_norm_modulate, gpu_temporal):
        monkeypatch.setattr(module, "_forward", Recorded())
        monkeypatch.setattr(module, "_backward", Recorded())
    x = torch.empty(70_000, 1, 4, 1, 2)
    table = rope_table(1, 4, 1, 2)
    gpu_temporal.temporal_attention(x, x, x, None, None, table, 1e-6)
    gpu_temporal.temporal_attention_backward(x, x, x, x, None, None, table, 1e-6)
    gpu_norm_rope.norm_rope(x, torch.ones(2), table, 1e-6)
    tokens = x.view(70_000, 1, 4, 2)
    gpu_norm_modulate.norm_modulate(tokens, torch.zeros(2), torch.zeros(2), 1e-6)
    assert len(grids) == 4 and all(len(grid) == 1 for grid in grids)
    assert max(grid[0] for grid in grids) > 65_535
    assert current == 4 * [70_000]


def test_gradients_of_more_than_two_thousand_million_channels_are_written() -> None:
    """The first program of a launch over so many tokens: what is beyond the last one is not counted in 32 bits."""
    tokens, d, rows = 2**31 // 16 + 1, 16, gpu_norm_rope.ROWS
    x, grad = random(1, 1, rows, 2, d // 2), random(1, 1, rows, 2, d // 2, seed=1)
    weight, table = random(d // 2), rope_table(1, rows, 1, d // 2)
    found, part = torch.full_like(x, torch.nan), torch.full((2, d // 2), torch.nan)
    sizes = {"ROWS": rows, **gpu_norm_rope._sizes(x, weight)}
    gpu_norm_rope._backward[(1,)](x, weight, table, grad, found, part, tokens, rows, 1e-6, **sizes)
    wanted, dweight = gpu_norm_rope.norm_rope_backward(grad, x, weight, table, 1e-6)
    torch.testing.assert_close((found, part.sum(dim=0)), (wanted, dweight))

    x, grad, scale = x.view(1, 1, rows, d), grad.view(1, 1, rows, d), random(d)
    found, part = torch.full_like(x, torch.nan), torch.full((3, d), torch.nan)
    sizes = {"ROWS": rows, "BRANCH": False, **gpu_norm_modulate._sizes(d)}
    gpu_norm_modulate._backward[(1,)](
        x, x, x, scale, x, grad, found, found, part, tokens, tokens, tokens, tokens // rows + 1, 1e-6, **sizes
    )
    wanted, dshift, dscale = gpu_norm_modulate.norm_modulate_backward(grad, x, scale, scale, 1e-6)
    torch.testing.assert_close((found, part[0], part[1]), (wanted, dshift, dscale))
