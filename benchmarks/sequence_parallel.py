"""A forward and backward pass of a DiT whose tokens lie on several ranks: time, and how much of it goes to exchanges.

Method: gloo ranks of one machine, one thread each; medians over steps of wall time, of rank 0. An exchange's time has
the wait for the other ranks in it, so that its share is the most that overlapping it with work could ever save.

    OMP_NUM_THREADS=1 torchrun --standalone --nproc-per-node 2 -m benchmarks.sequence_parallel --local_width 96
"""

import argparse
import statistics
import time
from typing import Any

import torch
import torch.distributed as dist

from videodit.models.dit import DiTConfig, VideoDiT
from videodit.parallel.sequence import split_layout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden_size", type=int, default=128)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--local_width", type=int, default=0)
    parser.add_argument("--latents", type=int, nargs=5, default=[16, 96, 6, 8, 8], metavar=("B", "C", "T", "H", "W"))
    parser.add_argument("--steps", type=int, default=15)
    options = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    b, c, t, h, w = options.latents
    shape = {"hidden_size": options.hidden_size, "depth": options.depth, "num_heads": options.hidden_size // 32}
    local = {"local_width": options.local_width, "local_depth": 1}
    model = VideoDiT(DiTConfig(in_channels=c, activation="gelu", **shape, **local)).train()
    given = torch.randn(b, c, t, h, w), torch.rand(b), torch.randn(b, 16, 512), torch.ones(b, 16, dtype=torch.bool)
    layout = split_layout(dist.group.WORLD, t, h * w // 4)

    exchanged, steps = [0.0], []
    for name in ("all_to_all_single", "all_gather", "all_reduce"):
        original = getattr(dist, name)

        def timed(*args: Any, original: Any = original, **kwargs: Any) -> Any:
            start = time.perf_counter()
            original(*args, **kwargs)
            exchanged[-1] += time.perf_counter() - start

        setattr(dist, name, timed)
    for _ in range(options.steps):
        dist.barrier()
        start = time.perf_counter()
        model(*given, layout=layout).square().mean().backward()
        steps.append(time.perf_counter() - start)
        exchanged.append(0.0)
    if dist.get_rank() == 0:
        step, exchange = statistics.median(steps), statistics.median(exchanged[:-1])
        print(f"{dist.get_world_size()} ranks: step {1e3 * step:.0f} ms, exchanges {1e3 * exchange:.0f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
