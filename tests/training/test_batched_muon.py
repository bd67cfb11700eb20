"""Newton-Schulz over a batch: singular values, and DeepSpeed's own for one matrix; the engine's use is in
tests/training/distributed_cases.py."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.training.batched_muon import BatchedMuon, orthogonalize


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 9))
def test_singular_values_end_near_one(count: int, rows: int, more: int) -> None:
    generator = torch.Generator().manual_seed(count + 10 * rows + 100 * more)
    # Singular values of 1 to 3, so that all of them have come up after five steps.
    left = torch.linalg.qr(torch.randn(count, rows, rows, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(count, rows + more, rows, generator=generator)).Q
    values = 1 + 2 * torch.rand(count, rows, generator=generator)
    matrices = left * values[:, None] @ right.mT
    found = orthogonalize(matrices, torch.float32)
    singular = torch.linalg.svdvals(found)
    assert 0.6 < singular.min() and singular.max() < 1.3
    # Along the same directions: left^T found right is diagonal.
    middle = left.mT @ found @ right
    torch.testing.assert_close(middle, torch.diag_embed(middle.diagonal(dim1=-2, dim2=-1)), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_each_is_deepspeeds(dtype: torch.dtype, tolerance: float) -> None:
    from deepspeed.runtime.zero.muon.original_muon import muon_update

    generator = torch.Generator().manual_seed(0)
    shapes = [(8, 8), (8, 24), (24, 8), (8, 8), (24, 8), (5, 7)]
    gradients = [torch.randn(shape, generator=generator) for shape in shapes]
    muon = BatchedMuon(object(), dtype, None)
    found = muon._orthogonalize([gradient.clone() for gradient in gradients])
    with torch.compiler.set_stance("force_eager"):
        expected = [muon_update(g.clone(), torch.zeros_like(g), beta=0.0, ns_method="gram") for g in gradients]
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def test_zeros_stay_zeros() -> None:
    assert not orthogonalize(torch.zeros(2, 3, 4), torch.bfloat16).any()
