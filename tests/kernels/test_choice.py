"""Which kernels run where, and what is refused in one line."""

import importlib.util
from collections.abc import Iterator

import pytest
import torch

from videodit.errors import UserError
from videodit.kernels import choice


@pytest.fixture(autouse=True)
def torch_afterwards() -> Iterator[None]:
    yield
    choice.choose_kernels("torch")


def test_an_unknown_name() -> None:
    with pytest.raises(UserError, match="kernels 'cuda' is not one of torch, triton"):
        choice.choose_kernels("cuda")


def test_triton_on_a_cpu_only_in_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    choice.choose_kernels("triton", torch.device("cpu"))  # tests run with TRITON_INTERPRET=1
    assert choice.triton_runs(torch.zeros(1))
    choice.choose_kernels("torch")
    assert not choice.triton_runs(torch.zeros(1))
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UserError, match="needs a CUDA GPU, and this run is on cpu: use --kernels torch"):
        choice.choose_kernels("triton", torch.device("cpu"))
    assert not choice.triton_runs(torch.zeros(1))


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="the package triton, which is not installed: pip install triton"):
        choice.choose_kernels("triton", torch.device("cuda"))
