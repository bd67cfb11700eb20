"""On a rank that is alone, flat buffers give what DeepSpeed's loops over parameters give."""

from collections.abc import Iterator

import pytest
import torch
from deepspeed.runtime.zero.muon import original_muon

from tests.training import toy
from videodit.parallel.mesh import World, init_process, shutdown
from videodit.training.batched_muon import BatchedMuon
from videodit.training.engine import Engine


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    yield init_process("cpu")
    shutdown()


def with_deepspeeds_loops(world: World, name: str) -> Engine:
    engine = toy.make_engine(world, 1, "bf16", name)
    optimizer = engine._deepspeed.optimizer
    del optimizer.update_hp_grads, optimizer.get_grads_for_norm
    if name == "muon":
        muon = optimizer._prepare_muon_updates.__self__
        del optimizer._prepare_muon_updates
        BatchedMuon(optimizer, muon._dtype, original_muon)
    return engine


@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("unused", [False, True])
def test_weights_and_norms_are_those_of_deepspeeds_loops(world: World, name: str, unused: bool) -> None:
    engines = toy.make_engine(world, 1, "bf16", name), with_deepspeeds_loops(world, name)
    results = []
    for engine in engines:
        if unused:  # no gradient: DeepSpeed leaves its part of the buffer alone
            engine.module.token.forward = lambda _: torch.zeros(5, dtype=torch.bfloat16)
        first = toy.train(engine, world, 1, 3, micro=2)
        clip, token, *_ = toy.batch(4)
        engine.backward(engine(clip.to(engine.dtype), token).square().sum())
        dropped = engine.step(4, lambda _: False)
        results.append([*first, dropped, *toy.train(engine, world, 5, 6)])
    assert [result.applied for result in results[0]] == [True, True, True, False, True, True]
    norms = torch.tensor([[result.grad_norm for result in run] for run in results])
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-6, atol=0)
    states = [toy.full_state(engine) for engine in engines]
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():  # Muon does not clip: no rounding of the norm reaches the weights
        torch.testing.assert_close(value, states[1][key], rtol=0, atol=0 if name == "muon" else 1e-6)
