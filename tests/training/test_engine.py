"""Where the engine computes on a machine that has other devices too."""

from collections.abc import Iterator

import pytest
from deepspeed.accelerator import get_accelerator, set_accelerator
from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator

from tests.training import toy
from videodit.parallel.mesh import World, init_process, shutdown


@pytest.fixture
def world() -> Iterator[World]:
    yield init_process("cpu")
    shutdown()


@pytest.mark.parametrize("stage", [1, 3])
def test_a_run_on_the_cpu_stays_there_where_deepspeed_has_found_a_gpu(world: World, stage: int) -> None:
    before = get_accelerator()
    set_accelerator(CUDA_Accelerator())  # what it takes at import where torch sees a GPU
    try:
        engine = toy.make_engine(world, stage, "fp32")
        results = toy.train(engine, world, 1, 2)
    finally:
        set_accelerator(before)
    assert [result.applied for result in results] == [True, True]
    assert {piece.weight.device.type for piece in engine.slices()} == {"cpu"}
