"""What a measurement ran on: facts that belong beside every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch

from videodit import __version__


def machine_facts() -> dict[str, str | int | float | None]:
    """Facts about this machine, each found without special rights; one that cannot be found is None.

    Returns:
        dict with cpu (model name), cores (those this process may use), memory_gib (the lesser of the machine's and the
        container's), instruction_set (what torch's kernels use), gpu (name, with the count when there are several),
        gpu_memory_gib, torch, cuda (that torch was built for), python, platform, git_commit (with `+changes` when
        tracked files differ).
    """
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    name = torch.cuda.get_device_name(0) if gpus else None
    return {
        "cpu": _cpu_model(),
        "cores": _usable_cores(),
        "memory_gib": _memory_gib(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "gpu": f"{gpus} × {name}" if gpus > 1 else name,
        "gpu_memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if gpus else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "git_commit": _git_commit(Path(__file__).resolve().parents[2]),
    }


def code_version() -> dict[str, str | None]:
    """Which code runs.

    Returns:
        dict with videodit (version), videodit_commit (of the checkout that holds this package, None for an installed
        copy) and git_commit (of the checkout that the process was started in, None outside of one); commits with
        `+changes` when tracked files differ.
    """
    return {
        "videodit": __version__,
        "videodit_commit": _git_commit(Path(__file__).resolve().parents[2]),
        "git_commit": _commit_at(Path.cwd()),
    }


def _cpu_model() -> str | None:
    for line in _read("/proc/cpuinfo").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("model name", "Model", "Hardware") and value.strip():
            return value.strip()
    return platform.processor() or platform.machine() or None  # macOS, Windows, and ARM kernels without a model name


def _usable_cores() -> int:
    """Cores that the scheduler and the container's quota leave to this process."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").strip().partition(" ")
    if quota.isdigit() and period.isdigit():
        cores = min(cores, max(1, round(int(quota) / int(period))))
    return cores


def _memory_gib() -> float | None:
    sizes = []
    try:
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        pass  # not a POSIX system
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():  # "max" where there is no limit
        sizes.append(int(limit))
    return round(min(sizes) / 2**30, 1) if sizes else None


def _git_commit(root: Path) -> str | None:
    """Short commit of the checkout that holds this package; None for an installed copy or without git."""
    if not (root / ".git").exists():  # never report some other repository that happens to lie above site-packages
        return None
    return _commit_at(root)


def _commit_at(folder: Path) -> str | None:
    """Short commit of the checkout that a folder lies in."""
    commit = _run("git", "-C", str(folder), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return None
    return commit + (
        "+changes" if _run("git", "-C", str(folder), "status", "--porcelain", "--untracked-files=no") else ""
    )


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
