"""What ptxas makes of Triton's kernels for an H200: they compile, and spill next to no registers; needs no GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
H200 = 90  # compute capability 9.0
ROOT = Path(__file__).parents[2]


def bytes_on_the_stack(fn: str, types: dict[str, str], constants: dict[str, object], cubin: Path) -> int:
    """Of each thread, where nothing but spilled registers lies; compiles in this process, without the interpreter."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from videodit.kernels.gpu import temporal_programs

    warps = constants.pop("num_warps")
    kernel = getattr(temporal_programs, fn)
    types |= {name: "*bf16" for name in kernel.arg_names if name.endswith("_ptr") and name not in types}
    signature = {name: "constexpr" if name in constants else types.get(name, "fp32") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name.endswith("_ptr")}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", H200, 32), options={"num_warps": warps})
    cubin.write_bytes(made.asm["cubin"])
    usage = subprocess.run([BIN / "cuobjdump", "--dump-resource-usage", cubin], capture_output=True, text=True)
    found = re.search(r"STACK:(\d+)", usage.stdout)
    assert found is not None, usage.stderr
    return int(found[1])


@pytest.mark.slow
@pytest.mark.skipif(not (BIN / "cuobjdump").exists(), reason="this triton has no tools for CUDA")
@pytest.mark.parametrize("head_dim", [72, 128])
@pytest.mark.parametrize("fn", ["forward", "backward"])
def test_temporal_attention_stays_in_registers(fn: str, head_dim: int, tmp_path: Path) -> None:
    from videodit.kernels.gpu.temporal_attention import _sizes

    constants = _sizes(torch.empty(1, 16, 1024, 16, head_dim, device="meta"), True, True)[1]
    given = [fn, {"table_ptr": "*fp32", "parts_ptr": "*fp32"}, {**constants, "UPCAST": False}]
    outside = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    outside |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-W", "ignore", __file__, json.dumps(given), str(tmp_path / "kernel.cubin")]
    done = subprocess.run(command, env=outside, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 64  # 16 registers of 255; a tile of twice the size takes 1 to 2 kB


if __name__ == "__main__":
    name, types, constants = json.loads(sys.argv[1])
    print(bytes_on_the_stack(name, types, constants, Path(sys.argv[2])))
