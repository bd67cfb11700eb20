"""The DiT: what it must not see, what it must see, and that every way to say the same thing gives the same result."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.models.tiny import randomize, tiny_dit
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.dit_block import DiTBlock
from videodit.models.layers import ACTIVATIONS, MLP, sinusoidal_embedding
from videodit.models.local import FrameConv, LocalBlock, LocalLayers

C, T, HW, L, TEXT = 4, 3, 4, 5, 12


def inputs(b: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """latents, sigma, text, mask with at least one word each."""
    mask = torch.arange(L) < torch.arange(1, b + 1)[:, None] + 1
    return torch.randn(b, C, T, HW, HW), torch.rand(b), torch.randn(b, L, TEXT), mask


@pytest.mark.parametrize("local_width", [0, 8])
def test_a_fresh_model_predicts_zero_and_its_blocks_do_nothing(local_width: int) -> None:
    shape = {"in_channels": 4, "hidden_size": 24, "depth": 4, "num_heads": 2, "text_dim": TEXT}
    model = VideoDiT(DiTConfig(**shape, local_width=local_width))
    latents, sigma, text, mask = inputs()
    assert torch.equal(model(latents, sigma, text, mask), torch.zeros_like(latents))
    seen = []
    for block in [m for m in model.modules() if isinstance(m, (DiTBlock, LocalBlock))]:
        block.register_forward_hook(lambda _, given, out: seen.append(torch.equal(given[0], out)))
    model(latents, sigma, text, mask)
    assert seen == [True] * (8 if local_width else 4)


class FromModulation(TorchDispatchMode):
    """Follows what is made of the shared modulation and weights alone, and keeps its largest storage."""

    def __init__(self, model: VideoDiT) -> None:
        super().__init__()
        self.weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self.kept: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

    def add(self, tensor: Tensor) -> None:
        self.kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        if given & self.kept.keys() and given <= self.kept.keys() | self.weights:
            for x in tree_leaves(out):
                self.add(x)
        return out


def test_tokens_stay_in_one_buffer_and_modulation_is_never_repeated_for_each() -> None:
    model = tiny_dit(pattern="stf", depth=6)
    b, t, s, d = 2, 3, 64, 24
    seen = []
    for block in model.blocks:
        block.register_forward_hook(
            lambda _, given, out: seen.extend(x.is_contiguous() and x.shape == (b, t, s, d) for x in (given[0], out))
        )
    with torch.no_grad(), FromModulation(model) as followed:
        model.modulation.register_forward_hook(lambda _, __, out: followed.add(out))
        model(
            torch.randn(b, C, t, 16, 16), torch.rand(b, t), torch.randn(b, L, TEXT), torch.ones(b, L, dtype=torch.bool)
        )
    assert seen == [True] * 2 * 6
    sizes = [storage.nbytes() for storage in followed.kept.values()]
    assert len(sizes) > 6 and max(sizes) == 4 * b * t * 6 * d < 4 * b * t * s * d  # a frame's six, for all its tokens


@pytest.mark.parametrize("local_width", [0, 8])
def test_a_fresh_model_still_learns(local_width: int) -> None:
    shape = {"in_channels": 4, "hidden_size": 24, "depth": 2, "num_heads": 2, "text_dim": TEXT}
    model = VideoDiT(DiTConfig(**shape, local_width=local_width))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    latents, sigma, text, mask = inputs()
    losses = []
    for _ in range(30):
        loss = (model(latents, sigma, text, mask) - latents).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_a_crop_s_place_is_seen_where_positions_are_absolute() -> None:
    latents, sigma, text, mask = inputs()
    origin = torch.tensor([[0, 0], [2, 4]])
    for absolute in (True, False):
        model = tiny_dit(absolute_position=absolute)
        here, there = model(latents, sigma, text, mask), model(latents, sigma, text, mask, origin=origin)
        torch.testing.assert_close(there[0], here[0])
        assert torch.equal(there[1], here[1]) != absolute


class ComputedOnCPU(TorchDispatchMode):
    """Operations whose result lies on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.found += [str(func) for x in tree_leaves(out) if isinstance(x, Tensor) and x.device.type == "cpu"]
        return out


@pytest.mark.parametrize("local_width", [0, 8])
@pytest.mark.parametrize("crops", [False, True])
def test_a_step_is_computed_on_the_models_device_alone(local_width: int, crops: bool) -> None:
    """What a CPU works out meanwhile, a GPU would wait for at every step; the first makes the table of angles."""
    model = tiny_dit(absolute_position=True, local_width=local_width, micro_conditioning=True, pattern="stf", depth=3)
    model.to("meta")
    given = [x.to("meta") for x in (*inputs(), torch.zeros(2, 5))]
    origin = torch.tensor([[0, 0], [2, 4]]) if crops else None  # on the CPU, as the loader gives it
    options = {"origin": origin, "micro_conditions": given.pop()}
    model(*given, **options)
    with ComputedOnCPU() as computed:
        model(*given, **options)
    assert computed.found == []


@pytest.mark.parametrize("pattern", ["st", "f"])
@pytest.mark.parametrize("patch", [(1, 2, 2), (3, 1, 2), (1, 4, 4)])
@pytest.mark.parametrize("local_width", [0, 8])
def test_keeps_the_latents_shape(pattern: str, patch: tuple[int, int, int], local_width: int) -> None:
    latents, sigma, text, mask = inputs()
    out = tiny_dit(pattern=pattern, patch_size=patch, local_width=local_width)(latents, sigma, text, mask)
    assert out.shape == latents.shape and out.isfinite().all() and out.std() > 0


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.tuples(*[st.integers(1, 3)] * 3),
    patch=st.tuples(*[st.integers(1, 2)] * 3),
    order=st.permutations(range(5)),
)
def test_any_size_and_any_memory_order(tokens: tuple, patch: tuple, order: list[int]) -> None:
    model = tiny_dit(patch_size=patch, local_width=8 if order[0] % 2 else 0)
    shape = (2, C, *(n * p for n, p in zip(tokens, patch)))
    latents = torch.randn([shape[axis] for axis in order]).permute([order.index(axis) for axis in range(5)])
    _, sigma, text, mask = inputs()
    torch.testing.assert_close(model(latents, sigma, text, mask), model(latents.contiguous(), sigma, text, mask))


def test_one_level_for_the_clip_is_the_same_level_for_every_frame() -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit()
    per_frame = model(latents, sigma[:, None].expand(2, T), text, mask)
    torch.testing.assert_close(model(latents, sigma, text, mask), per_frame)


def test_the_embedding_sees_a_thousand_times_the_level() -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit()
    seen: list[Tensor] = []
    model.sigma_embedding.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(latents, sigma, text, mask)
    assert torch.equal(seen[0], sinusoidal_embedding(1000 * sigma[:, None], 16))


def test_the_level_of_a_frame_reaches_that_frame() -> None:
    latents, _, text, mask = inputs()
    model = tiny_dit(pattern="s")  # frames are apart, so the level of one changes only itself
    sigma = torch.full((2, T), 0.5)
    changed = sigma.clone()
    changed[:, 1] = 0.0
    difference = (model(latents, changed, text, mask) - model(latents, sigma, text, mask)).abs().amax(dim=(0, 1, 3, 4))
    assert difference[1] > 1e-3 and difference[[0, 2]].max() < 1e-6


@pytest.mark.parametrize("local_width", [0, 8])
def test_a_patch_over_time_has_the_level_of_its_first_frame(local_width: int) -> None:
    latents, _, text, mask = inputs()
    model = tiny_dit(patch_size=(3, 2, 2), local_width=local_width)
    sigma = torch.tensor([[0.2, 0.9, 0.4], [0.7, 0.1, 0.3]])
    torch.testing.assert_close(model(latents, sigma, text, mask), model(latents, sigma[:, 0], text, mask))


def reach(pattern: str) -> Tensor:
    """(t, token row, token column) how much the prediction at frame 1, token (0, 1) depends on each token."""
    latents, sigma, text, mask = inputs(1)
    latents.requires_grad_()
    out = tiny_dit(pattern=pattern)(latents, sigma, text, mask)
    out[0, :, 1, 0:2, 2:4].square().sum().backward()
    assert latents.grad is not None
    return latents.grad[0].abs().unflatten(-1, (2, 2)).unflatten(-3, (2, 2)).sum(dim=(0, 3, 5))


def test_spatial_blocks_do_not_mix_frames() -> None:
    seen = reach("s") > 0
    assert seen[1].all() and not seen[0].any() and not seen[2].any()


def test_temporal_blocks_do_not_mix_places() -> None:
    latents, sigma, text, mask = inputs(1)
    latents.requires_grad_()
    tiny_dit(pattern="t", cross_attention="t")(latents, sigma, text, mask)[0, :, 1, 0:2, 2:4].square().sum().backward()
    assert latents.grad is not None
    seen = latents.grad[0].abs().sum(dim=0) > 0  # t h w
    own = torch.zeros(HW, HW, dtype=torch.bool)
    own[0:2, 2:4] = True
    assert torch.equal(seen, own.expand(T, HW, HW))


@pytest.mark.parametrize("pattern", ["st", "ts", "f"])
def test_together_they_see_the_whole_clip(pattern: str) -> None:
    assert (reach(pattern) > 0).all()


def test_positions_are_seen() -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit(pattern="f")
    for axis in (2, 3, 4):
        flipped = model(latents.flip(axis), sigma, text, mask).flip(axis)
        assert (flipped - model(latents, sigma, text, mask)).abs().max() > 1e-3


@pytest.mark.parametrize("pattern", ["st", "f"])
def test_a_prepared_text_gives_the_same(pattern: str) -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit(pattern=pattern)
    assert torch.equal(model(latents, sigma, model.text_context(text, mask)), model(latents, sigma, text, mask))


def test_padding_of_the_text_changes_nothing() -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit()
    garbage = torch.where(mask[..., None], text, 1e3)
    longer = torch.cat([garbage, torch.full((2, 4, TEXT), -1e3)], dim=1)
    longer_mask = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], dim=1)
    torch.testing.assert_close(model(latents, sigma, longer, longer_mask), model(latents, sigma, text, mask))


@pytest.mark.parametrize("changes", [{"pooled_text": False}, {"pooled_text": True}])
def test_the_text_reaches_the_prediction_and_only_its_own_row(changes: dict) -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit(**changes)
    other = text.clone()
    other[1, 0] += 1.0
    difference = (model(latents, sigma, other, mask) - model(latents, sigma, text, mask)).abs().amax(dim=(1, 2, 3, 4))
    assert difference[0] == 0 and difference[1] > 1e-3


def test_imported_models_may_attend_to_padding() -> None:
    latents, sigma, text, mask = inputs()
    hidden = torch.where(mask[..., None], text, text + 1.0)
    for mask_text in (True, False):
        model = tiny_dit(mask_text=mask_text)
        difference = (model(latents, sigma, hidden, mask) - model(latents, sigma, text, mask)).abs().max().item()
        assert (difference < 1e-5) == mask_text


def test_padding_is_zero_in_models_trained_so_also_where_the_text_comes_in_full_length() -> None:
    """As an encoder with padding="max_length" gives it: its states behind the prompt are no zeros."""
    latents, sigma, text, mask = inputs()
    model = tiny_dit(text_length=L, mask_text=False, pooled_text=False)
    zeros = torch.where(mask[..., None], text, 0.0)
    torch.testing.assert_close(model(latents, sigma, text, mask), model(latents, sigma, zeros, mask))
    short = slice(0, int(mask.sum(1).max()))
    torch.testing.assert_close(model(latents, sigma, text, mask), model(latents, sigma, text[:, short], mask[:, short]))


def test_rows_of_a_batch_do_not_touch() -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit()
    whole = model(latents, sigma, text, mask)
    for row in range(2):
        one = slice(row, row + 1)
        torch.testing.assert_close(whole[one], model(latents[one], sigma[one], text[one], mask[one]))


def test_sizes_may_alternate() -> None:
    model = tiny_dit()
    _, sigma, text, mask = inputs()
    small, large = torch.randn(2, C, 2, 2, 6), torch.randn(2, C, 4, 4, 2)
    first = model(small, sigma, text, mask)
    model(large, sigma, text, mask)
    assert torch.equal(model(small, sigma, text, mask), first)


def test_inference_mode_leaves_nothing_behind_that_training_cannot_use() -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit()
    with torch.inference_mode():
        seen = model(latents, sigma, text, mask)
    out = model(latents, sigma, text, mask)
    out.square().sum().backward()
    torch.testing.assert_close(out.detach(), seen)


@pytest.mark.parametrize("qk_norm", ["head", "all"])
def test_computes_in_float64_on_a_cpu(qk_norm: str) -> None:
    latents, sigma, text, mask = inputs()
    model = tiny_dit(qk_norm=qk_norm)
    rough = model(latents, sigma, text, mask)
    exact = model.double()(latents.double(), sigma, text.double(), mask)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(rough.double(), exact, rtol=1e-4, atol=1e-4)


def test_computes_in_the_dtype_of_its_weights() -> None:
    latents, sigma, text, mask = inputs()
    exact = tiny_dit()(latents, sigma, text, mask)
    rough = tiny_dit().bfloat16()(latents.bfloat16(), sigma, text.bfloat16(), mask)
    assert rough.dtype == torch.bfloat16
    assert (rough.float() - exact).norm() < 0.05 * exact.norm()


def test_gradients_agree_with_finite_differences() -> None:
    model = tiny_dit(pattern="st")
    latents, sigma, text, mask = inputs()
    weight = torch.randn_like(latents)
    for name in ("blocks.0.attention.query.weight", "blocks.1.mlp.fc1.weight", "modulation.weight", "patch_in.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn_like(parameter)
        (gradient,) = torch.autograd.grad((model(latents, sigma, text, mask) * weight).sum(), parameter)
        with torch.no_grad():
            values = []
            for step in (1e-2, -2e-2):
                parameter.add_(step * direction)
                values.append((model(latents, sigma, text, mask).double() * weight).sum())
            parameter.add_(1e-2 * direction)
        measured = (values[0] - values[1]) / 2e-2
        torch.testing.assert_close((gradient * direction).sum().double(), measured, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("latents", "sigma", "message"),
    [
        ((2, C, 3, 5, 4), (2,), "3x5x4 are not divided by the patch 1x2x2"),
        ((2, C, 3, 4, 7), (2,), "not divided"),
        ((2, C, 3, 4, 4), (1,), r"sigma has shape \(1,\): give \(2,\) or \(2, 3\)"),
        ((2, C, 3, 4, 4), (2, 2), "sigma has shape"),
        ((2, C, 3, 4, 4), (), "sigma has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(latents: tuple, sigma: tuple, message: str) -> None:
    _, _, text, mask = inputs()
    with pytest.raises(ValueError, match=message):
        tiny_dit()(torch.zeros(latents), torch.zeros(sigma), text, mask)


def test_text_needs_its_mask() -> None:
    latents, sigma, text, _ = inputs()
    with pytest.raises(ValueError, match="text without text_mask"):
        tiny_dit()(latents, sigma, text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 25}, "model.hidden_size 25 over model.num_heads 2 .* multiple of 4"),
        ({"hidden_size": 6}, "not an even head size"),
        ({"pattern": "sx"}, "'sx' has letters other than s, t, f"),
        ({"pattern": ""}, "letters other than"),
        ({"depth": 3}, "model.depth 3 is not a multiple of the 2 letters .* choose 2"),
        ({"depth": 1}, "choose 2"),
        ({"cross_attention": "q"}, "model.cross_attention 'q'"),
        ({"cross_attention": "f"}, "the prompt would never reach the tokens; use 's'"),
        ({"cross_attention": ""}, "the prompt would never reach"),
        ({"activation": "swish"}, "model.activation 'swish' is not one of gelu, gelu_tanh"),
        ({"qk_norm": "layer"}, "'layer' is not one of head, all, none"),
        ({"num_heads": 0}, "model.num_heads 0 is not positive"),
        ({"local_width": -8}, "model.local_width -8 is negative: use 0"),
        ({"depth": 0}, "model.depth 0 is not positive"),
        ({"patch_size": (2, 2)}, r"model.patch_size \[2, 2\] is not 3 positive numbers"),
        ({"patch_size": (1, 0, 2)}, "not 3 positive numbers"),
        ({"frequency_dim": 7}, "model.frequency_dim 7 is odd: use 8"),
    ],
)
def test_impossible_shapes_name_value_and_fix(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DiTConfig(**{"hidden_size": 24, "depth": 2, "num_heads": 2, **changes})


def test_one_activation_in_all_mlps() -> None:
    for activation, function in ACTIVATIONS.items():
        config = DiTConfig(hidden_size=24, depth=2, num_heads=2, local_width=8, activation=activation)
        mlps = [module for module in VideoDiT(config).modules() if isinstance(module, MLP)]
        assert len(mlps) == 2 + 4 + 1  # blocks, local blocks on both sides, text
        assert all(mlp.activation is function for mlp in mlps)


def test_the_convolution_of_frames_is_a_convolution() -> None:
    conv = randomize(FrameConv(3))
    reference = torch.nn.Conv3d(3, 3, (1, 3, 3), padding=(0, 1, 1))
    reference.weight.data = conv.weight.data.view(3, 3, 1, 3, 3)
    reference.bias = conv.bias
    x = torch.randn(2, 4, 5, 6, 3)
    torch.testing.assert_close(conv(x), reference(x.permute(0, 4, 1, 2, 3)).permute(0, 2, 3, 4, 1))


def test_a_local_block_reaches_its_neighbours_in_space_and_time() -> None:
    block = randomize(LocalBlock(4, "gelu"))
    x = torch.randn(1, 5, 5, 5, 4, requires_grad=True)
    block(x, torch.randn(1, 1, 1, 1, 3, 4))[0, 2, 2, 2].square().sum().backward()
    assert x.grad is not None
    touched = x.grad[0].abs().sum(dim=-1) > 0
    expected = torch.zeros(5, 5, 5, dtype=torch.bool)
    expected[1:4, 1:4, 1:4] = True
    assert torch.equal(touched, expected)


def test_noisy_latents_pass_the_local_layers_through_their_gate() -> None:
    layers = LocalLayers(4, 8, 1, 24, "gelu")  # the convolution that writes is zero here
    latents, features = torch.randn(2, 3, 5, 5, 4), torch.randn(2, 3, 5, 5, 8)
    gate = torch.tensor([0.0, 0.5, 1.0, -1.0])
    with torch.no_grad():
        layers.conv_out.weight.zero_(), layers.conv_out.bias.zero_()
        layers.latent_gate.weight.zero_(), layers.latent_gate.bias.copy_(gate)
    out = layers.write(features, latents, torch.randn(2, 1, 24))
    torch.testing.assert_close(out, gate * latents)
    torch.nn.init.normal_(layers.latent_gate.weight)  # now what the features say opens it
    condition = torch.randn(2, 1, 24)
    opened = layers.write(features, latents, condition)
    torch.testing.assert_close(layers.write(features, 2 * latents, condition), 2 * opened)
    assert not torch.allclose(layers.write(features.flip(-1), latents, condition), opened)


def test_the_pattern_says_which_blocks_attend_to_text() -> None:
    config = DiTConfig(hidden_size=24, depth=6, num_heads=2, pattern="stf", cross_attention="sf")
    assert config.block_kinds == "stfstf"
    assert [b.cross_attention is not None for b in VideoDiT(config).blocks] == [True, False, True] * 2


def test_names_kept_from_muon_exist() -> None:
    names = [name for name, _ in tiny_dit().named_parameters()]
    for excluded in VideoDiT.muon_exclude:
        assert any(excluded in name.split(".") for name in names), excluded
    names = [name for name, _ in LocalLayers(4, 8, 1, 24, "gelu").named_parameters()]
    for excluded in LocalLayers.muon_exclude:
        assert any(excluded in name.split(".") for name in names), excluded


def test_a_saved_model_is_the_same_model(tmp_path) -> None:
    model = randomize(tiny_dit(patch_size=(1, 2, 1), pattern="tsf", depth=3, qk_norm="all"))
    model.save_pretrained(tmp_path)
    loaded = VideoDiT.from_pretrained(tmp_path)
    assert loaded.config == model.config and not loaded.training
    latents, sigma, text, mask = inputs()
    assert torch.equal(loaded(latents, sigma, text, mask), model(latents, sigma, text, mask))
