"""All initialisation of a model is in its `init_weights`: nothing is left of what was there before."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests import tiny
from videodit.models.causal_conv import ChannelNorm
from videodit.models.dit import VideoDiT
from videodit.models.layers import RMSNorm
from videodit.models.text import ByteTextEncoder
from videodit.models.vae import VAEConfig, VideoVAE

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
