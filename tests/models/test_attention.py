"""Attention against a naive reference, and the promise that it moves no token."""

import pytest
import torch
from einops import rearrange
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.tiny import randomize
from videodit.models import attention
from videodit.models.attention import (
    SHORT_SEQUENCE,
    CrossAttention,
    QKNorm,
    SelfAttention,
    attend,
    text_attention_mask,
)
from videodit.models.rope import apply_rope, rope_table

B, T, S, H, E = 2, 3, 4, 2, 6
GROUP = {"s": "b t s h e -> (b t) s h e", "t": "b t s h e -> (b s) t h e", "f": "b t s h e -> b (t s) h e"}
UNGROUP = {"s": "(b t) s h e -> b t s (h e)", "t": "(b s) t h e -> b t s (h e)", "f": "b (t s) h e -> b t s (h e)"}


def naive(kind: str, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key, value = (rearrange(x, GROUP[kind]) for x in (query, key, value))
    weights = (torch.einsum("bihe,bjhe->bhij", query, key) / query.shape[-1] ** 0.5).softmax(dim=-1)
    return rearrange(torch.einsum("bhij,bjhe->bihe", weights, value), UNGROUP[kind], b=B, t=T, s=S)


def random_qkv() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, T, S, H, E, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("kind", "stf")
def test_equals_the_naive_form(kind: str) -> None:
    qkv = random_qkv()
    torch.testing.assert_close(attend(kind, *qkv), naive(kind, *qkv))


@pytest.mark.parametrize("kind", "stf")
def test_gradients_equal_the_naive_forms(kind: str) -> None:
    qkv = [x.requires_grad_() for x in random_qkv()]
    weight = torch.randn(B, T, S, H * E)
    ours, theirs = (torch.autograd.grad((f(kind, *qkv) * weight).sum(), qkv) for f in (attend, naive))
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(one, other)


def test_temporal_attention_is_spatial_attention_of_the_transposed_clip() -> None:
    qkv = random_qkv()
    swapped = attend("s", *(x.transpose(1, 2).contiguous() for x in qkv)).transpose(1, 2)
    torch.testing.assert_close(attend("t", *qkv), swapped)


class FusedShapes(TorchDispatchMode):
    """Shapes that torch's fused attention is called with, and whether its inputs are views of these storages."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []
        self.own = {x.untyped_storage()._cdata for x in given}
        self.all_views = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "scaled_dot_product" in str(func):
            self.shapes.append(args[0].shape)
            self.all_views &= all(x.untyped_storage()._cdata in self.own for x in args[:3])
        return func(*args, **(kwargs or {}))


def test_more_sequences_than_cuda_takes_at_once_are_attended_to_in_parts() -> None:
    """5B on 81x720x1280: 3,600 positions of 24 heads, an axis of the kernels' grid that ends at 65,535."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 3600, 24, 2, generator=generator) for _ in range(3))
    with torch.no_grad(), FusedShapes(query, key, value) as fused:
        out = attend("t", query, key, value)
    assert [shape[1] for shape in fused.shapes] == [43_200, 43_200] and fused.all_views
    weights = (torch.einsum("btshe,bushe->bshtu", query, key) / 2**0.5).softmax(dim=-1)
    torch.testing.assert_close(out.unflatten(-1, (24, 2)), torch.einsum("bshtu,bushe->btshe", weights, value))
    with torch.no_grad(), FusedShapes(query, key, value) as fused:
        attend("t", *(x[:, :, :2700] for x in (query, key, value)))  # 64,800 go at once
    assert [shape[1] for shape in fused.shapes] == [64_800]


@pytest.mark.parametrize("kind", "stf")
def test_attention_gets_views_of_the_buffer_not_copies(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = random_qkv()
    seen: list[Tensor] = []
    real = attention.attention

    def spy(*tensors: Tensor) -> Tensor:
        seen.extend(tensors)
        return real(*tensors)

    monkeypatch.setattr(attention, "attention", spy)
    attend(kind, *qkv)
    assert [x.data_ptr() for x in seen] == [x.data_ptr() for x in qkv]
    sequence, heads = {"s": (S, H), "t": (T, S * H), "f": (T * S, H)}[kind]
    assert seen[0].shape == (B * T * S * H // (sequence * heads), heads, sequence, E)
    token = H * E
    assert seen[0].stride()[1:] == (E, S * token if kind == "t" else token, 1)


def test_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="'x' is not one of s, t, f"):
        attend("x", *random_qkv())


def rms(x: Tensor) -> Tensor:
    return x / (x.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt()


def test_qk_norm_per_head_over_all_heads_and_none() -> None:
    x = torch.randn(B, T, S, H, E)
    per_head, over_all = QKNorm("head", H, E), QKNorm("all", H, E)
    torch.testing.assert_close(per_head.norm_query(x), rms(x))
    torch.testing.assert_close(over_all.norm_key(x), rms(x.flatten(-2)).view(x.shape))
    assert QKNorm("none", H, E).norm_query(x) is x and not list(QKNorm("none", H, E).parameters())
    assert per_head.query.weight.shape == (E,) and over_all.query.weight.shape == (H * E,)


@pytest.mark.parametrize("qk_norm", ["head", "all", "none"])
@pytest.mark.parametrize("kind", "stf")
def test_self_attention_is_project_norm_rotate_attend_project(kind: str, qk_norm: str) -> None:
    layer = randomize(SelfAttention(H * E, H, qk_norm))
    x, rope = torch.randn(B, T, S, H * E), rope_table(T, 2, S // 2, E)
    heads = "b t s (h e) -> b t s h e"
    query, key, value = (rearrange(f(x), heads, h=H) for f in (layer.query, layer.key, layer.value))
    query, key = apply_rope(layer.norm.norm_query(query), rope), apply_rope(layer.norm.norm_key(key), rope)
    torch.testing.assert_close(layer(x, kind, rope), layer.proj(naive(kind, query, key, value)))


def test_scores_do_not_grow_with_the_tokens_under_qk_norm() -> None:
    layer = SelfAttention(H * E, H, "head")
    for linear in (layer.query, layer.key, layer.value, layer.proj):
        torch.nn.init.zeros_(linear.bias)
    x, rope = torch.randn(B, T, S, H * E), rope_table(T, 2, S // 2, E)
    torch.testing.assert_close(layer(100 * x, "f", rope), 100 * layer(x, "f", rope), rtol=1e-3, atol=1e-3)


def cross(text: Tensor, mask: Tensor | None) -> Tensor:
    torch.manual_seed(1)
    layer = randomize(CrossAttention(H * E, H, "head"), 0.5)
    x = torch.randn(B, T, S, H * E)
    return layer(x, layer.keys_values(text), mask)


@pytest.mark.parametrize("length", [5, SHORT_SEQUENCE + 1])  # by our products, and by torch's kernel as on a GPU
@pytest.mark.parametrize("training", [True, False])
def test_the_mask_hides_text(length: int, training: bool) -> None:
    text = torch.randn(B, length, H * E)
    mask = torch.arange(length) < torch.tensor([[2], [length]])
    hidden = text.clone()
    hidden[0, 2:] = 1e3
    with torch.set_grad_enabled(training):
        masked = cross(text, text_attention_mask(mask))
        torch.testing.assert_close(masked, cross(hidden, text_attention_mask(mask)))
        torch.testing.assert_close(masked[:1], cross(text[:, :2], None)[:1])
        torch.testing.assert_close(masked[1:], cross(text, None)[1:])
        assert not torch.allclose(masked[0], cross(text, None)[0])


def test_one_text_token_is_what_every_token_gets() -> None:
    out = cross(torch.randn(B, 1, H * E), None)
    torch.testing.assert_close(out, out[:, :1, :1].expand_as(out))


def test_the_order_of_text_tokens_does_not_matter_to_cross_attention() -> None:
    text = torch.randn(B, 5, H * E)
    torch.testing.assert_close(cross(text, None), cross(text.flip(1), None))
