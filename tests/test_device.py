"""Device and number format: what 'auto' becomes, and what is refused."""

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from videodit.device import choose_device, choose_dtype, torch_dtype
from videodit.errors import UserError


@pytest.mark.parametrize("gpu", [True, False])
def test_auto_is_the_gpu_if_there_is_one(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    assert choose_device("auto") == torch.device("cuda" if gpu else "cpu")
    assert choose_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="'cuda' asked for, but torch sees no GPU: use --device cpu"):
        choose_device("cuda")


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [
        ("fp32", "cuda", torch.float32),
        ("bf16", "cpu", torch.bfloat16),
    ],
)
def test_dtype(name: str, device: str, dtype: torch.dtype) -> None:
    assert torch_dtype(choose_dtype(name, torch.device(device))) == dtype


@pytest.mark.parametrize("supported", [True, False])
def test_auto_on_a_cpu_is_bf16_where_it_multiplies_bf16(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: supported)
    assert choose_dtype("auto", torch.device("cpu")) == ("bf16" if supported else "fp32")


@pytest.mark.parametrize(("generation", "dtype"), [(7, "fp32"), (8, "bf16"), (9, "bf16")])
def test_auto_on_a_gpu_is_bf16_where_it_multiplies_bf16(
    generation: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(major=generation))
    assert choose_dtype("auto", torch.device("cuda")) == dtype


def test_unknown_names() -> None:
    with pytest.raises(UserError, match="device 'gpu' is not one of auto, cpu, cuda"):
        choose_device("gpu")
    with pytest.raises(UserError, match="dtype 'fp16' is not one of auto, fp32, bf16"):
        choose_dtype("fp16", torch.device("cpu"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these settings")
def test_freed_memory_stays_in_the_process() -> None:
    """Of blocks of 16 MiB none is mapped apart, and all of them are still there, free, after the last is freed."""
    script = """if True:
        import ctypes, sys
        from videodit.device import keep_freed_memory
        libc = ctypes.CDLL(None)
        libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
        libc.free.argtypes = [ctypes.c_void_p]
        class Info(ctypes.Structure):  # malloc.h: struct mallinfo2
            names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
            _fields_ = [(name, ctypes.c_size_t) for name in names.split()]
        libc.mallinfo2.restype = Info
        if sys.argv[1] == "keep":
            keep_freed_memory()
        before = libc.mallinfo2()
        blocks = [libc.malloc(16 << 20) for _ in range(4)]
        mapped = libc.mallinfo2().hblks - before.hblks
        for block in blocks:
            libc.free(block)
        print(mapped, libc.mallinfo2().fordblks >= 64 << 20)
    """
    found = {
        name: subprocess.run([sys.executable, "-c", script, name], capture_output=True, check=True, text=True).stdout
        for name in ("keep", "give back")
    }
    assert found["keep"].split() == ["0", "True"]
    assert found["give back"].split()[1] == "False"
