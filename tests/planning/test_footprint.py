"""A plan's FLOPs and activations against the real model on real tensors."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from videodit.data.clip_reader import DataConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.kernels.norm_modulate import norm_modulate_reference
from videodit.kernels.norm_rope import norm_rope_reference
from videodit.models import layers
from videodit.models.checkpointing import POLICIES
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.lora import LoRAConfig
from videodit.models.text import ByteTextConfig
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.vae import VAEConfig
from videodit.planning.footprint import LiveBytes, activation_bytes, count_flops, live_bytes, step_flops
from videodit.planning.workload import DiTWorkload, VAEWorkload, dit_pass
from videodit.training.dit_config import DiTRunConfig
from videodit.training.vae_config import VAERunConfig

SHAPE = {"in_channels": 4, "hidden_size": 48, "num_heads": 2, "text_dim": 16, "frequency_dim": 32}


def dit(policy: str = "none", **changes) -> TextToVideoModel:
    """Of frozen text features."""
    model = TextToVideoModel(VideoDiT(DiTConfig(**{**SHAPE, "depth": 2, **changes})), None)
    model.dit.checkpointing = policy
    return model


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"pattern": "f", "qk_norm": "all", "mask_text": False, "text_length": 20},
        {"pattern": "st", "cross_attention": "st", "patch_size": (2, 1, 2)},
        {"local_width": 8, "absolute_position": True, "final_modulation": "bias"},
        {"micro_conditioning": True},
    ],
)
def test_flops_are_those_of_the_real_model(changes: dict) -> None:
    run = partial(dit_pass, shape=(2, 4, 4, 16, 16), text_tokens=7)
    planned = step_flops(lambda: dit(**changes), run)
    assert planned == count_flops(dit(**changes), run) > 0
    assert step_flops(lambda: dit("attention", **changes), run) == planned  # no product is computed again


@pytest.mark.parametrize("lora", [0, 2])
def test_flops_of_the_text_encoder_are_those_of_the_real_model_on_captions(lora: int) -> None:
    """Trained or frozen beside LoRA, and its gradient goes through the DiT's keys and values."""
    text = ByteTextConfig(dim=24, buckets=64, depth=2, num_heads=2, max_words=9)
    shape = DiTConfig(
        **{**SHAPE, "depth": 2}
    )  # its text_dim is not the encoder's: a run's follows it, so does a plan's
    config = DiTRunConfig(run_dir="unused", data=LatentDataConfig(shards="unused"), model=shape, text=text)
    if lora:
        config = replace(config, init="unused", lora=LoRAConfig(rank=lora))
    workload = DiTWorkload(config, ["13x64x64"])
    model = workload._build("none")

    def run(model: nn.Module) -> None:
        captions = ["one two three four five six seven eight", "nine"]  # and the empty word before
        model(torch.zeros(2, 4, 4, 8, 8), torch.zeros(2, 4), captions).square().mean().backward()

    assert 2 * workload.shape_flops((4, 4, 8, 8), "none") == count_flops(model, run)
    alone = TextToVideoModel(model.dit, None)
    dit_only = count_flops(alone, partial(dit_pass, shape=(2, 4, 4, 8, 8), text_tokens=9))
    layers = 2 * 9 * text.depth * (24 * text.dim**2 + 4 * text.dim * 9)  # forward, of two captions of nine words
    into_text = 2 * 9 * 2 * shape.hidden_size * text.dim  # backward from the projection to the features
    assert count_flops(model, run) - dit_only == (layers if lora else 3 * layers + into_text)


def test_flops_follow_the_closed_form_of_a_factorized_pair() -> None:
    """A token of a pair, forward: projections 16 d², MLPs 32 d², cross-attention 4 d², attention 4 d (s + t + l)."""
    b, t, s, d, tokens = 2, 3, 64, 48, 7
    run = partial(dit_pass, shape=(b, 4, t, 16, 16), text_tokens=tokens)
    pair = step_flops(lambda: dit(depth=4), run) - step_flops(lambda: dit(depth=2), run)
    forward = b * t * s * (16 * d**2 + 32 * d**2 + 4 * d**2 + 4 * d * (s + t + tokens))
    forward += b * tokens * 4 * d**2  # keys and values of the text
    assert pair == 3 * forward


def test_full_checkpointing_runs_the_blocks_a_second_time() -> None:
    run = partial(dit_pass, shape=(1, 4, 3, 16, 16), text_tokens=7)
    deep, shallow = (step_flops(lambda: dit("full", depth=n), run) for n in (4, 2))  # noqa: B023
    deep_none, shallow_none = (step_flops(lambda: dit(depth=n), run) for n in (4, 2))  # noqa: B023
    text = 3 * 7 * 4 * 48**2  # its keys and values are made before the blocks
    assert 3 * (deep - shallow - text) == 4 * (deep_none - shallow_none - text)


@pytest.mark.parametrize(
    ("policy", "d", "depth", "hw", "t"),
    [
        *((p, 64, 2, 16, 4) for p in POLICIES),
        ("attention", 96, 4, 24, 3),
        ("none", 96, 4, 24, 3),
        ("none", 192, 2, 32, 2),
    ],
)
def test_activations_are_within_a_tenth_of_what_the_real_model_holds(
    policy: str, d: int, depth: int, hw: int, t: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = partial(dit_pass, shape=(1, 4, t, hw, hw), text_tokens=7)

    def build() -> TextToVideoModel:
        return dit(policy, hidden_size=d, depth=depth)

    planned = activation_bytes(build, run, torch.float32, on_cpu=True)
    assert abs(planned / live_bytes(build(), run) - 1) < 0.01
    with monkeypatch.context() as patch:  # what a GPU keeps, on a CPU
        patch.setattr(layers, "norm_rope", norm_rope_reference)
        patch.setattr(layers, "norm_modulate", norm_modulate_reference)
        assert abs(activation_bytes(build, run, torch.float32) / live_bytes(build(), run) - 1) < 0.1
    if policy == "none":  # autograd's own account
        model = build()
        own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        saved: dict[int, torch.UntypedStorage] = {}  # kept, so that no address is used twice

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                saved[storage._cdata] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            run(model)
        assert abs(planned / sum(storage.nbytes() for storage in saved.values()) - 1) < 0.1


def test_each_policy_holds_less_than_the_one_before() -> None:
    run = partial(dit_pass, shape=(1, 4, 3, 16, 16), text_tokens=7)
    held = [activation_bytes(lambda: dit(p, depth=6), run, torch.bfloat16) for p in POLICIES]  # noqa: B023
    assert held[0] > 1.4 * held[1] > 1.4 * 1.4 * held[2]


def test_scores_of_full_attention_are_not_kept_on_a_gpu() -> None:
    run = partial(dit_pass, shape=(1, 4, 4, 64, 64), text_tokens=7)  # 4,096 tokens: 128 MiB of scores in fp32
    held = activation_bytes(lambda: dit(pattern="f", depth=1, num_heads=2), run, torch.float32)
    assert held < 64 * 2**20


def test_the_vae_is_measured_too() -> None:
    model = VAEConfig(latent_channels=4, channels=(8, 16, 16))
    config = VAERunConfig(run_dir="unused", data=DataConfig(shards="unused"), model=model)
    workload = VAEWorkload(config, ["9x32x32"])
    (bucket,) = workload.buckets
    assert workload.tokens(bucket) == 3 * 4 * 4
    assert workload.flops(bucket, "none") == count_flops(workload._build(), workload._pass(bucket))
    planned = workload.activation_bytes(bucket, "none", torch.float32, on_cpu=True)
    assert abs(planned / live_bytes(workload._build(), workload._pass(bucket)) - 1) < 0.1


def test_live_bytes_rise_and_fall() -> None:
    with LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100)[2:] + 1  # 800 more; the view is none
        assert live.now == 4 * 1800
        del b
        assert live.now == 4 * 1000 and live.peak == 4 * 1800
        a.add_(1)
        assert live.now == 4 * 1000


def test_the_counter_of_torch_agrees_where_attention_is_a_product() -> None:
    """On few tokens the CPU computes attention as products, and torch's counter needs no help."""
    run = partial(dit_pass, shape=(1, 4, 2, 8, 8), text_tokens=5)
    with FlopCounterMode(display=False) as counter:
        run(dit())
    assert step_flops(dit, run) == counter.get_total_flops()
