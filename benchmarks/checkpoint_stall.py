"""How long a save holds training up: written beside it, against waited for.

    python benchmarks/checkpoint_stall.py [--out result.json]
    torchrun --standalone --nproc-per-node 2 benchmarks/checkpoint_stall.py

A stack of linear layers with AdamW and two averages, 20 bytes a parameter, is trained at ZeRO-1. Every few steps it is
saved, in turns beside training and waited for. Of each save: the stall, all that training waits for; for how long the
disk was written to; and the median step meanwhile, beside that of steps without a save.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import nn

from videodit.evaluation.machine import machine_facts
from videodit.parallel.mesh import broadcast_object, init_process, shutdown
from videodit.training.checkpoint_writer import CheckpointWriter, Written
from videodit.training.ema import PowerEMA
from videodit.training.engine import Engine
from videodit.training.optim import OptimConfig

STEPS_BETWEEN = 12


def spread(values: list[float]) -> dict[str, float]:
    """Smallest, median and largest, in milliseconds."""
    numbers = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(1000 * value, 1) for name, value in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200, help="of the checkpoint (default: %(default)s)")
    parser.add_argument("--saves", type=int, default=8, help="of each kind (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--folder", help="disk to write to (default: the system's temporary folder)")
    parser.add_argument("--out", type=Path, help="file for the result, JSON")
    options = parser.parse_args()

    world = init_process(options.device)
    width, count = 1000, round(options.megabytes / 20)
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(count)))
    engine = Engine(module, OptimConfig(), zero_stage=1, dtype="fp32", world=world, max_steps=100_000)
    ema = PowerEMA(engine.slices())
    folder = Path(broadcast_object(tempfile.mkdtemp(dir=options.folder)))
    writer = CheckpointWriter(folder, engine, ema)
    step = 0

    def train() -> float:
        nonlocal step
        start = time.perf_counter()
        step += 1
        engine.backward(engine(torch.randn(8, width, device=world.device)).square().mean() / world.size)
        engine.step(step)
        ema.update(step)
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def check(written: Written | None) -> float:
        assert written is not None and not written.problem, written
        return written.seconds

    for _ in range(3):
        train()
    writer.save(step)  # takes the host memory, once in a run
    check(writer.wait())
    stall: dict[str, list[float]] = {"beside": [], "waited for": []}
    write, during, alone = [], [], []
    for _ in range(options.saves):
        start = time.perf_counter()
        writer.save(step)
        stall["beside"].append(time.perf_counter() - start)
        ended = None
        for _ in range(STEPS_BETWEEN):
            seconds = train()
            if ended is None:
                during.append(seconds)
                ended = writer.poll()
        write.append(check(ended or writer.wait()))
        alone += [train() for _ in range(STEPS_BETWEEN)]
        start = time.perf_counter()
        writer.save(step)
        check(writer.wait())
        stall["waited for"].append(time.perf_counter() - start)
        train()
    size = sum(file.stat().st_size for file in next((folder / "checkpoints").glob("step-*")).iterdir())
    result = {
        "machine": machine_facts(),
        "load_average": round(os.getloadavg()[0], 1),  # processes that wanted a core in the last minute, these too
        "command": f"python benchmarks/checkpoint_stall.py --megabytes {options.megabytes} --device {options.device}",
        "ranks": world.size,
        "checkpoint_mb": round(size / 1e6, 1),
        "saves": options.saves,
        "stall_ms": {name: spread(values) for name, values in stall.items()},
        "write_ms": spread(write),
        "step_ms": {"while writing": spread(during), "else": spread(alone)},
    }
    if world.is_main:
        shutil.rmtree(folder)
        print(json.dumps(result, indent=1))
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    shutdown()


if __name__ == "__main__":
    main()
