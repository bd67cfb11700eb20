"""How fast and how full: step time, tokens per second, FLOPs, model FLOPs utilisation, memory."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

# Dense bf16 peak in FLOP/s of one GPU, by a part of its name; the vendors' data sheets, without sparsity.
# The first match counts, so longer names come first.
PEAK_FLOPS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "MI300X": 1307e12,
    "V100": 125e12,
}


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU in FLOP/s, None if it is not known (then there is no MFU).

    Args:
        device_name: as torch.cuda.get_device_name() gives it.
    """
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def count_flops(call: Callable[[], object]) -> int:
    """Floating-point operations of one call, forward and whatever backward it runs; a multiply-add is two.

    Give it one forward and backward of a micro batch, once per bucket: counting is slow.
    """
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def memory_gib(device: torch.device) -> float:
    """GiB in use: the peak of allocated memory on a GPU, this process' resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    if not status.exists():
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS
    kib = next(line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmRSS:"))
    return int(kib) / 2**20


_Mark = float | torch.cuda.Event


def _mark(event: bool) -> _Mark:
    if not event:
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def _seconds(start: _Mark, end: _Mark) -> float:
    if isinstance(start, float) or isinstance(end, float):
        assert isinstance(start, float) and isinstance(end, float)  # `phase` takes two of a kind
        return end - start
    return float(start.elapsed_time(end)) / 1e3


class StepMeter:
    """Times one optimizer step and says what it means.

    ```
    meter = StepMeter(world.device)
    for batch in loader:
        meter.data_ready()          # since the last step ended: waiting for data
        with meter.phase("forward"):
            ...
        log(meter.step(tokens=..., flops=...))
    ```

    On a GPU phases are times between events in its stream, read when the step has ended, so that nothing waits for its
    kernels in between: a phase has the kernels' time where they were the last to finish, else that of launching them.

    Args:
        device: where the step runs; on a GPU the step's end waits for its kernels.
        world_size: ranks that share the tokens and FLOPs that `step` is told.
    """

    def __init__(self, device: torch.device, world_size: int = 1) -> None:
        self._device = device
        self._world_size = world_size
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
        self._peak = peak_flops(name)
        self._start = self._ready = time.perf_counter()
        self._spans: list[tuple[str, _Mark, _Mark]] = []

    @contextmanager
    def phase(self, name: str, *, on_cpu: bool = False) -> Iterator[None]:
        """Times a part of the step as perf/NAME_s; parts of a name add up, and none lies in another.

        Args:
            name: of the part.
            on_cpu: it runs on the CPU whatever the device is, and nothing that comes before has to be waited for.
        """
        events = self._device.type == "cuda" and not on_cpu
        start = _mark(events)
        yield
        self._spans.append((name, start, _mark(events)))

    def restart(self) -> None:
        """Forgets the time since the last step (it went into samples, evaluation or a checkpoint)."""
        self._start = self._ready = time.perf_counter()
        self._spans.clear()

    def data_ready(self) -> None:
        """Marks that the batch has arrived."""
        self._ready = time.perf_counter()

    def step(self, *, tokens: int = 0, flops: int = 0) -> dict[str, float]:
        """Ends a step.

        Args:
            tokens: tokens of the global batch, over all ranks.
            flops: operations of the global batch, over all ranks.
        Returns:
            metrics of the step; perf/mfu only on a known GPU. data/wait_s, the phases and perf/other_s add up to
            perf/step_s.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        end = time.perf_counter()
        seconds = max(end - self._start, 1e-9)
        metrics = {
            "perf/step_s": seconds,
            "perf/compute_s": end - self._ready,
            "data/wait_s": self._ready - self._start,
            "perf/memory_gib": memory_gib(self._device),
        }
        for name, begin, finish in self._spans:
            key = f"perf/{name}_s"
            metrics[key] = metrics.get(key, 0.0) + _seconds(begin, finish)
        phases = sum(metrics[f"perf/{name}_s"] for name in {span[0] for span in self._spans})
        metrics["perf/other_s"] = max(metrics["perf/compute_s"] - phases, 0.0)
        self._spans.clear()
        if tokens:
            metrics["perf/tokens_per_s"] = tokens / seconds
        if flops:
            metrics["perf/tflops_per_rank"] = flops / self._world_size / seconds / 1e12
            if self._peak:
                metrics["perf/mfu"] = flops / self._world_size / seconds / self._peak
        self._start = self._ready = end
        return metrics
