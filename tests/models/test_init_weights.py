"""All initialisation of a model is in its `init_weights`: nothing is left of what was there before."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests import tiny
from videodit.models.causal_conv import CausalDownsample, CausalUpsample, ChannelNorm
from videodit.models.dit import VideoDiT
from videodit.models.layers import MLP, RMSNorm
from videodit.models.text import ByteTextConfig, ByteTextEncoder
from videodit.models.vae import VAEConfig, VideoVAE
from videodit.models.vae_layers import ConvBlock, PointwiseBlock

ALL_PARTS = {"pattern": "stf", "depth": 3, "micro_conditioning": True, "final_modulation": "bias"}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "dit": lambda: VideoDiT(tiny.DIT),
    "dit of all parts": lambda: VideoDiT(dataclasses.replace(tiny.DIT, **ALL_PARTS)),
    "dit without local layers": lambda: VideoDiT(dataclasses.replace(tiny.DIT, local_width=0, qk_norm="all")),
    "vae": lambda: VideoVAE(VAEConfig(latent_channels=4, channels=(8, 16, 16), encoder_blocks=("cp", "c", "p"))),
    "text encoder": lambda: ByteTextEncoder(tiny.TEXT),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_it_sets_every_parameter(name: str) -> None:
    fresh, overwritten = MODELS[name](), MODELS[name]()
    with torch.no_grad():
        for parameter in overwritten.parameters():
            parameter.fill_(float("nan"))
    for model in (fresh, overwritten):
        torch.manual_seed(3)
        model.init_weights()
    expected = dict(fresh.named_parameters())
    for key, value in overwritten.named_parameters():
        assert value.isfinite().all(), key
        assert torch.equal(value, expected[key]), key
    norms = [module for module in overwritten.modules() if isinstance(module, (nn.LayerNorm, RMSNorm, ChannelNorm))]
    assert norms and all((norm.weight == 1).all() for norm in norms)


def check_std(layer: nn.Module, expected: float) -> None:
    assert float(layer.weight.std()) == pytest.approx(expected, rel=0.1), layer


def test_weights_have_the_documented_sizes() -> None:
    torch.manual_seed(0)
    dit = VideoDiT(dataclasses.replace(tiny.DIT, hidden_size=96, frequency_dim=64, local_width=32))
    for layer in dit.sigma_embedding[::2]:
        check_std(layer, 0.02)
    for module in dit.modules():
        if isinstance(module, MLP):
            check_std(module.fc1, (2 / sum(module.fc1.weight.shape)) ** 0.5)
    check_std(dit.local.before[0].spatial, (9 * 32) ** -0.5)
    vae = VideoVAE(VAEConfig(latent_channels=8, channels=(32, 64, 64)))
    for module in vae.modules():
        if isinstance(module, ConvBlock):
            check_std(module.expand, module.expand.weight.shape[1] ** -0.5)
        elif isinstance(module, (CausalDownsample, CausalUpsample)):
            check_std(module.conv, 0.1 * module.conv.weight.shape[1] ** -0.5)
    text = ByteTextEncoder(ByteTextConfig(dim=64, buckets=512, depth=3))
    check_std(text.gram_embedding, 1.0)
    for layer in text.layers:
        check_std(layer.query, 64**-0.5)
        check_std(layer.proj, 64**-0.5 * 6**-0.5)
        check_std(layer.fc2, (2 / (5 * 64)) ** 0.5 * 6**-0.5)


def test_the_blocks_of_a_fresh_vae_do_nothing() -> None:
    vae, same = MODELS["vae"](), []
    blocks = [module for module in vae.modules() if isinstance(module, (ConvBlock, PointwiseBlock))]
    for block in blocks:
        block.register_forward_hook(lambda _, given, out: same.append(torch.equal(given[0], out)))
    vae.decode(vae.encode(torch.rand(1, 3, 5, 16, 16)))
    assert same == [True] * len(blocks) and {type(block) for block in blocks} == {ConvBlock, PointwiseBlock}
