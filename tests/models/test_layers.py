"""Closed forms of the DiT's small parts."""

import math

import torch

from videodit.models.layers import MLP, Modulation, RMSNorm, modulate, sinusoidal_embedding


def test_sinusoidal_embedding_closed_form() -> None:
    out = sinusoidal_embedding(torch.tensor([0.0, 1.0, 37.5]), 6)
    for row, value in zip(out, (0.0, 1.0, 37.5)):
        angles = [value * 10000.0 ** (-i / 3) for i in range(3)]
        expected = [math.cos(a) for a in angles] + [math.sin(a) for a in angles]
        torch.testing.assert_close(row, torch.tensor(expected))


def test_sinusoidal_embedding_tells_near_levels_apart_and_stays_float32() -> None:
    levels = torch.linspace(0, 1, 1001)
    out = sinusoidal_embedding((1000 * levels).bfloat16().float(), 64)
    assert out.dtype == torch.float32 and sinusoidal_embedding(levels.double(), 64).dtype == torch.float32
    exact = sinusoidal_embedding(1000 * levels, 64)
    assert ((exact[1:] - exact[:-1]).norm(dim=-1) > 0.5).all()


def test_sinusoidal_embedding_keeps_leading_axes() -> None:
    value = torch.rand(2, 3)
    out = sinusoidal_embedding(value, 8)
    assert out.shape == (2, 3, 8) and torch.equal(out[1, 2], sinusoidal_embedding(value[1, 2], 8))


def test_rms_norm() -> None:
    x = torch.randn(3, 5) * 7
    norm = RMSNorm(5)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt())
    torch.testing.assert_close(norm(x).square().mean(-1), torch.ones(3))
    norm.weight.data.mul_(2)
    torch.testing.assert_close(norm(x).square().mean(-1), torch.full((3,), 4.0))


def test_modulate() -> None:
    x = torch.randn(2, 3, 4, 8) * 5 + 1
    shift, scale = torch.randn(2, 3, 1, 8), torch.randn(2, 3, 1, 8)
    mean, var = x.mean(-1, keepdim=True), x.var(-1, keepdim=True, correction=0)
    expected = (1 + scale) * (x - mean) / (var + 1e-6).sqrt() + shift
    torch.testing.assert_close(modulate(x, Modulation(shift, scale, shift)), expected)


def test_mlp() -> None:
    mlp = MLP(4, 6, 3)
    x = torch.randn(2, 4)
    hidden = mlp.fc1(x)
    gelu = 0.5 * hidden * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(mlp(x), mlp.fc2(gelu))
    exact = MLP(4, 6, 3, activation="gelu")
    exact.load_state_dict(mlp.state_dict())
    torch.testing.assert_close(exact(x), mlp.fc2(0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))))
    assert not torch.equal(exact(x), mlp(x))
    assert mlp(x).shape == (2, 3) and MLP(4, 6)(x).shape == (2, 4)
