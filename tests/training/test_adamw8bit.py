"""8-bit moments: the map of the paper, what rounding loses, and that what was rounded once is not rounded again."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from videodit.planning.memory import EIGHT_BIT
from videodit.training import adamw8bit, blockwise
from videodit.training.adamw8bit import AdamW8bit
from videodit.training.blockwise import BLOCK, BlockwiseMoment, dequantize, dynamic_map, quantize
from videodit.training.optim import OptimConfig, param_groups


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_papers(signed: bool) -> None:
    """Each number of leading zeros has twice the codes of the next, evenly from 0.1 to 1 of its power of ten."""
    values = dynamic_map(signed=signed).double()
    assert len(values.unique()) == 256 and values.max() == 1 and (values == 0).sum() == 1
    positive = values[(values > 0) & (values < 1)]
    for exponent in range(7):
        decade = 10.0 ** (exponent - 6)
        here = positive[(positive > 0.1 * decade) & (positive < decade)]
        parts = 2 ** (exponent + (not signed))
        assert len(here) == parts
        expected = decade * (0.1 + 0.9 * (torch.arange(parts, dtype=torch.float64) + 0.5) / parts)
        torch.testing.assert_close(here, expected, rtol=1e-6, atol=0)
    negative = values[values < 0].abs().sort().values
    assert torch.equal(negative, positive if signed else negative[:0])


@st.composite
def blocks(draw: st.DrawFn, signed: bool) -> torch.Tensor:
    """(n, BLOCK) of magnitudes from denormal to huge, zeros among them, and blocks of nothing else."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows = draw(st.integers(1, 4))
    powers = torch.empty(rows, BLOCK).uniform_(-draw(st.sampled_from([1.0, 8.0, 20.0])), 0, generator=generator)
    x = 10**powers * 10.0 ** draw(st.integers(-42, 18)) * (torch.rand(rows, BLOCK, generator=generator) > 0.2)
    x[0] *= draw(st.sampled_from([0.0, 1.0]))
    if not signed:
        return x
    return x * torch.where(torch.rand(rows, BLOCK, generator=generator) < 0.5, -1.0, 1.0)


@pytest.mark.parametrize("signed", [True, False])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_rounded_once_is_rounded_for_good(signed: bool, data: st.DataObject) -> None:
    """What a checkpoint keeps, the values, gives back the very codes: so a run resumes bit for bit."""
    x = data.draw(blocks(signed))
    codes, scale = quantize(x, signed=signed)
    kept = dequantize(codes, scale, signed=signed)
    again, scale_again = quantize(kept, signed=signed)
    assert torch.equal(codes, again) and torch.equal(scale, scale_again)
    # The value that lies furthest from 0 is exact, the others are off by half a gap of the map at most.
    largest = x.abs().amax(1, keepdim=True)
    counts = (largest >= 1e-30).expand_as(x)
    assert torch.equal(kept.abs().amax(1), torch.where(largest < 1e-30, 0.0, largest)[:, 0])
    gap = 0.9 / (64 if signed else 128)
    off = (kept - x).abs()
    assert (off <= largest * gap / 2 * (1 + 1e-5) + 1e-30).all()
    # Relative to the value itself: half a gap of its decade, down to the last one, which has one code (or two).
    parts = (x.abs() / largest.clamp(min=1e-30))[counts]
    for decade in range(5):
        inside = (parts > 10.0 ** -(decade + 1)) & (parts < 10.0**-decade)
        bound = 0.9 / 2 ** (6 - decade + (not signed)) / 2 * 10.0**-decade
        # At the edge of a decade the next code is that of the coarser one beside it.
        assert (off[counts] / largest.expand_as(x)[counts])[inside].le(bound * (1 + 1e-4)).all()
    if not signed:
        assert ((kept > 0) == ((x > 0) & counts)).all()  # a denominator never vanishes


def test_parts_of_a_moment_are_parts_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "CHUNK", 3)
    torch.manual_seed(0)
    size = 3 * BLOCK + 300
    moment = BlockwiseMoment(size, signed=True, device=torch.device("cpu"))
    assert not moment.read(0, size).any()
    moment.fill(torch.randn(size))
    whole = moment.read(0, size)
    assert whole.shape == (size,) and whole.std() > 0.9
    for start, length in ((0, 1), (255, 2), (256, 256), (3 * BLOCK - 7, 300), (size - 1, 1)):
        assert torch.equal(moment.read(start, length), whole[start : start + length])
    assert moment.codes.nbytes + moment.scale.nbytes <= size * EIGHT_BIT / 2 + BLOCK + 4


class Regression(nn.Module):
    """A network, and a fixed target of it that noise keeps it from reaching: gradients stay of all sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.GELU(), nn.Linear(128, 32))

    def forward(self, token: torch.Tensor) -> torch.Tensor:
        return self.net(self.embed(token))


def losses_of(name: str, steps: int) -> tuple[torch.Tensor, torch.optim.Optimizer]:
    torch.manual_seed(0)
    target, model = Regression(), Regression()
    groups = param_groups(model, OptimConfig(name=name, lr=3e-3, weight_decay=0.01, betas=(0.9, 0.99)))
    optimizer = AdamW8bit(groups) if name == "adamw8bit" else torch.optim.AdamW(groups, fused=True)
    losses = []
    for step in range(steps):
        g = torch.Generator().manual_seed(step)
        token = torch.randint(0, 16, (32,), generator=g)
        wanted = target(token).detach() + 0.1 * torch.randn(32, 32, generator=g)
        loss = (model(token) - wanted).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses), optimizer


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    found = 0
    for state in optimizer.state.values():
        for moment in (state["exp_avg"], state["exp_avg_sq"]):
            whole = isinstance(moment, torch.Tensor)
            found += moment.nbytes if whole else moment.codes.nbytes + moment.scale.nbytes
    return found


def test_it_trains_as_adamw_does_on_a_quarter_of_the_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw8bit, "CHUNK", 20)  # matrices of 32 and 16 blocks
    (plain, adamw), (coded, eight_bit) = losses_of("adamw", 300), losses_of("adamw8bit", 300)
    torch.testing.assert_close(coded[:1], plain[:1], rtol=0, atol=0)
    assert not torch.equal(coded, plain)
    assert plain[-100:].mean() < 0.05 * plain[0]
    assert abs(coded[-100:].mean() / plain[-100:].mean() - 1) < 0.02
    # The two matrices, 12,288 parameters, take 2.03 bytes each; the other 1,440 keep 8.
    assert state_bytes(eight_bit) == 12288 * EIGHT_BIT + 1440 * 8 and state_bytes(adamw) == 8 * 13728
    assert 12288 * EIGHT_BIT <= 0.30 * 8 * 12288


def test_in_fp32_it_is_torchs() -> None:
    """Biases, norms and embeddings: the same formula."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.linspace(-1, 1, 300)) for _ in range(2))
    group = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    optimizers = [AdamW8bit([{"params": [ours], "quantized": False, **group}]), torch.optim.AdamW([theirs], **group)]
    for _ in range(20):
        ours.grad = torch.randn(300)
        theirs.grad = ours.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
