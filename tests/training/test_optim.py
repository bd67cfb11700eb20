"""The schedule's corner points, and which parameter goes to which group."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.training.toy import Toy
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.training.optim import OptimConfig, check_combination, learning_rate, lr_factor, param_groups


@pytest.mark.parametrize("schedule", ["constant", "cosine", "linear", "wsd"])
def test_warmup_is_linear_and_reaches_the_peak(schedule: str) -> None:
    config = OptimConfig(lr=2.0, warmup_steps=10, schedule=schedule)
    assert learning_rate(config, 1, 1000) == pytest.approx(0.2)
    assert learning_rate(config, 10, 1000) == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
def test_ends_at_the_final_ratio_and_stays(schedule: str) -> None:
    config = OptimConfig(warmup_steps=10, schedule=schedule, final_lr_ratio=0.1)
    assert lr_factor(config, 100, 100) == pytest.approx(0.1)
    assert lr_factor(config, 500, 100) == pytest.approx(0.1)


def test_middle_of_the_decay() -> None:
    middle = {"constant": 1.0, "cosine": 0.5, "linear": 0.5, "wsd": 1.0}
    for schedule, factor in middle.items():
        assert lr_factor(OptimConfig(warmup_steps=20, schedule=schedule), 60, 100) == pytest.approx(factor)
    assert lr_factor(OptimConfig(schedule="wsd", warmup_steps=0), 90, 100) == pytest.approx(0.5)


@given(
    st.sampled_from(["constant", "cosine", "linear", "wsd"]),
    st.integers(0, 200),
    st.integers(1, 300),
    st.floats(0, 1),
)
def test_factor_stays_in_bounds(schedule: str, warmup: int, max_steps: int, final: float) -> None:
    config = OptimConfig(schedule=schedule, warmup_steps=warmup, final_lr_ratio=final)
    factors = [lr_factor(config, step, max_steps) for step in range(1, 400)]
    assert all(0 <= factor <= 1 + 1e-12 for factor in factors)
    after = factors[warmup:]
    assert all(b <= a + 1e-12 for a, b in zip(after, after[1:], strict=False))


def groups_by_name(module: nn.Module, name: str) -> dict[str, dict]:
    names = {id(p): n for n, p in module.named_parameters()}
    groups = param_groups(module, OptimConfig(name=name, weight_decay=0.1))
    return {names[id(p)]: group for group in groups for p in group["params"]}


def test_groups() -> None:
    toy = Toy()
    adam, muon = groups_by_name(toy, "adamw"), groups_by_name(toy, "muon")
    assert set(adam) == set(muon) == {name for name, _ in toy.named_parameters()}
    assert {name for name, group in adam.items() if group["weight_decay"]} == {
        "conv.weight", "up.weight", "down.weight", "last.weight"
    }  # fmt: skip
    assert not any(group["use_muon"] or group["quantized"] for group in (*adam.values(),))
    eight_bit = groups_by_name(toy, "adamw8bit")
    assert {name for name, group in eight_bit.items() if group["quantized"]} == {
        "conv.weight", "up.weight", "down.weight", "last.weight"
    }  # fmt: skip
    assert {name for name, group in muon.items() if group["use_muon"]} == {"up.weight", "down.weight"}


def test_each_group_has_its_optimizers_settings() -> None:
    settings = {"lr": 2e-3, "muon_lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-5, "muon_momentum": 0.7}
    config = OptimConfig(name="muon", weight_decay=0.1, **settings)
    matrices, *adam = param_groups(Toy(), config)
    assert (matrices["lr"], matrices["peak_lr"], matrices["momentum"]) == (0.03, 0.03, 0.7)
    assert [(g["lr"], g["peak_lr"], g["betas"], g["eps"]) for g in adam] == [(2e-3, 2e-3, (0.8, 0.95), 1e-5)] * 2
    assert [group["weight_decay"] for group in (matrices, *adam)] == [0.1, 0.1, 0.0]


def test_exclusion_works_from_inside_a_submodule_and_frozen_parameters_are_left_out() -> None:
    outer = nn.ModuleDict({"a": Toy(), "b": nn.Linear(3, 3)})
    outer["b"].weight.requires_grad_(False)
    groups = groups_by_name(outer, "muon")
    assert "b.weight" not in groups and not groups["a.last.weight"]["use_muon"] and groups["a.up.weight"]["use_muon"]


@pytest.mark.parametrize(
    "field, value", [("name", "sgd"), ("schedule", "step"), ("lr", 0), ("warmup_steps", -1), ("betas", (1.0, 0.9))]
)
def test_impossible_value_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        OptimConfig(**{field: value})


@pytest.mark.parametrize("stage, dtype, name", [(0, "bf16", "adamw"), (0, "fp32", "muon"), (4, "fp32", "adamw")])
def test_impossible_combination_names_the_fix(stage: int, dtype: str, name: str) -> None:
    with pytest.raises(ValueError, match="zero_stage"):
        check_combination(stage, dtype, OptimConfig(name=name))


@pytest.mark.parametrize("stage, name", [(0, "adamw"), (1, "muon"), (3, "adamw8bit")])
def test_offload_of_what_cannot_be_offloaded_names_the_fix(stage: int, name: str) -> None:
    with pytest.raises(ValueError, match="offload_optimizer .*; set (zero_stage|optim.name) to"):
        check_combination(stage, "fp32", OptimConfig(name=name), offload=True)


def test_modulation_biases_are_no_matrices_to_muon() -> None:
    dit = VideoDiT(DiTConfig(in_channels=4, hidden_size=32, depth=2, num_heads=2, local_width=8, local_depth=1))
    groups = groups_by_name(dit, "muon")
    biases = [name for name in groups if name.endswith("modulation_bias")]
    assert len(biases) == 4 and not any(groups[name]["use_muon"] for name in biases)
    assert groups["blocks.0.mlp.fc1.weight"]["use_muon"]


@pytest.mark.parametrize("local_width", [0, 8])
def test_muon_takes_the_patches_where_they_are_hidden_layers(local_width: int) -> None:
    config = DiTConfig(in_channels=4, hidden_size=32, depth=2, num_heads=2, local_width=local_width)
    groups = groups_by_name(VideoDiT(config), "muon")
    for name in ("patch_in.weight", "patch_out.weight"):
        assert groups[name]["use_muon"] == bool(local_width)
    assert not any(group["use_muon"] for name, group in groups.items() if name.startswith("local.conv_"))
