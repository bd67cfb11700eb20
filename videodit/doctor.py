"""What this machine can run, and what is missing: the table of `videodit doctor`."""

import importlib.metadata
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Column, Table

from videodit.errors import UserError

GIB = 2**30
Verdict = Literal["ok", "note", "missing"]
COLOURS: dict[Verdict, str] = {"ok": "green", "note": "yellow", "missing": "red"}


@dataclass(frozen=True)
class Finding:
    """One line of the table; `missing` is what keeps videodit from working at all."""

    subject: str
    found: str
    verdict: Verdict = "ok"
    advice: str = ""


def run_doctor(folder: str | Path = ".") -> None:
    """Print what this machine can run.

    Args:
        folder: where runs would be written; its free space is shown.
    Raises:
        UserError: something is missing without which no verb that trains or generates works.
    """
    findings = list(examine(Path(folder)))
    subject = Column("subject", no_wrap=True)  # names of packages that can be typed
    table = Table("", subject, "found", "advice", title="videodit doctor", title_justify="left")
    for finding in findings:
        colour = COLOURS[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/]", finding.subject, finding.found, finding.advice)
    Console().print(table)
    missing = [finding for finding in findings if finding.verdict == "missing"]
    if missing:
        raise UserError("; ".join(f"{f.subject} is missing: {f.advice}" for f in missing))


def examine(folder: Path) -> Iterator[Finding]:
    """Look at the interpreter, the packages, the device, the compiler, memory and disk, one finding each."""
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info < (3, 13):
        yield Finding("python", version)
    else:
        yield Finding("python", version, "note", "tested on 3.10 to 3.12")
    yield from _packages()
    yield from _device()
    yield _compiler()
    yield from _space(folder)


def _packages() -> Iterator[Finding]:
    """The packages that videodit's own metadata names, core ones first, then each extra's."""
    try:
        requirements = importlib.metadata.requires("videodit") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("videodit", "not installed", "missing", "pip install -e . in its folder")
        return
    core: list[str] = []
    extras: dict[str, list[str]] = {}
    for requirement in requirements:
        name = re.split(r"[^\w.-]", requirement, maxsplit=1)[0]
        condition = re.search(r"extra == [\"']([\w-]+)", requirement)
        if condition and name == "videodit":  # an extra that brings other extras
            continue
        if condition:
            extras.setdefault(condition[1], []).append(name)
        else:
            core.append(name)
    for name in core:
        version = _version(name)
        if version:
            yield Finding(name, version)
        else:
            yield Finding(name, "not installed", "missing", f"pip install {name}")
    for extra, names in extras.items():
        lacking = [name for name in names if not _version(name)]
        found = ", ".join(f"{name} {_version(name)}" for name in names if name not in lacking)
        if lacking:
            lacks = f"without {', '.join(lacking)}"
            found = f"{found}; {lacks}" if found else lacks
            yield Finding(f"extra {extra}", found, "note", f"pip install 'videodit\\[{extra}]'")
        else:
            yield Finding(f"extra {extra}", found)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> Iterator[Finding]:
    if not _version("torch"):
        yield Finding("device", "unknown without torch", "note")
        return
    import torch

    from videodit.evaluation.machine import machine_facts

    facts = machine_facts()
    yield Finding("cores", f"{facts['cores']} × {facts['cpu']}")
    if facts["gpu"]:
        yield Finding("device", f"{facts['gpu']}, {facts['gpu_memory_gib']} GiB each, CUDA {facts['cuda']}")
        if torch.cuda.is_bf16_supported(including_emulation=False):
            yield Finding("bf16", "native on the GPU")
        else:
            yield Finding("bf16", "not on this GPU", "note", "train in fp32")
        return
    advice = (
        "" if facts["cuda"] is None else f"torch was built for CUDA {facts['cuda']} but finds no GPU: see nvidia-smi"
    )
    yield Finding("device", f"CPU ({facts['instruction_set']})", "note" if advice else "ok", advice)
    flags = Path("/proc/cpuinfo").read_text(errors="replace") if Path("/proc/cpuinfo").exists() else ""
    native = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in flags]
    if native:
        yield Finding("bf16", f"native on the CPU ({', '.join(native)})")
    else:
        yield Finding("bf16", "emulated on this CPU", "note", "fp32 is faster here")


def _compiler() -> Finding:
    compiler = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    if compiler:
        return Finding("C++ compiler", compiler)
    advice = "install g++ (Debian: apt install g++); DeepSpeed and torch.compile build with it"
    return Finding("C++ compiler", "none on PATH", "missing", advice)


def _space(folder: Path) -> Iterator[Finding]:
    yield _amount("memory", _available_memory(), 4, "less than 4 GiB free: smaller batches and fewer loader workers")
    shared = Path("/dev/shm")
    if shared.is_dir():
        advice = "loader workers pass batches through it: docker run --shm-size=8g"
        yield _amount("shared memory", shutil.disk_usage(shared).free, 1, advice)
    existing = next((p for p in (folder.resolve(), *folder.resolve().parents) if p.exists()), Path("/"))
    yield _amount("disk", shutil.disk_usage(existing).free, 5, f"less than 5 GiB free under {existing}")


def _amount(subject: str, free: int | None, enough_gib: float, advice: str) -> Finding:
    if free is None:
        return Finding(subject, "unknown", "note")
    found = f"{free / GIB:.1f} GiB free"
    return Finding(subject, found) if free >= enough_gib * GIB else Finding(subject, found, "note", advice)


def _available_memory() -> int | None:
    """Bytes that a new process could use, by the kernel's own estimate; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
