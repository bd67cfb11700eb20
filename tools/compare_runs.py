"""Do two training runs do the same? Compares two run folders step by step, and their weights.

    python tools/compare_runs.py runs/a runs/b [--rtol 1e-4]

Compared are loss, mean squared error, gradient norm and the sample ids' digest of every step up to the last one that
both have, and every weight of the newest checkpoint that both have. Settings that differ are listed, and don't count.
Figures a and b are alike if |a - b| <= rtol max(|a|, |b|); weights, all of them as one vector, if the norm of a - b is
at most rtol times that of a. (A single parameter says little: the bias of keys has a gradient of rounding errors only,
which Adam makes as large as any.) Exit code: 0 identical or within rtol, 1 not, 2 for folders that cannot be compared.
"""

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from videodit.errors import UserError
from videodit.training.checkpoint import FOLDER, Checkpoint, steps_in
from videodit.training.run_folder import KINDS, differences, read_metrics

FIGURES = ("train/loss", "train/mse", "train/grad_norm", "data/digest")
LISTED = 5  # parameters that differ most

Steps = dict[int, dict[str, Any]]


@dataclass
class Finding:
    """How far two runs agree in one figure, in one parameter, or in all of them.

    Attributes:
        name: of the figure or parameter.
        compared: steps, or elements.
        differ: how many of them differ at all.
        largest: relative difference; inf for what is not a number, or on one side only. Of a parameter: of an element,
            relative to the largest; of all weights: in the Euclidean norm.
        first_step: that is further apart than rtol allows; None if none is.
    """

    name: str
    compared: int
    differ: int
    largest: float
    first_step: int | None = None


def read_steps(run_dir: Path) -> Steps:
    """Figures of the run by step, several lines of a step as one.

    Raises:
        UserError: if there is no such folder, or it has no steps.
    """
    if not run_dir.is_dir():
        raise UserError(f"{run_dir} is not a folder: give a run folder of train vae or train dit")
    steps: Steps = {}
    try:
        lines = read_metrics(run_dir)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{run_dir}/metrics.jsonl cannot be read ({type(error).__name__}): give a whole run folder"
        ) from None
    for line in lines:
        steps.setdefault(line["step"], {}).update(line)
    steps = {step: line for step, line in steps.items() if "train/loss" in line}
    if not steps:
        raise UserError(f"{run_dir} has no steps in metrics.jsonl: give a run folder that was trained in")
    return steps


def read_config(run_dir: Path) -> dict[str, Any]:
    """Settings of the run, but for its folder.

    Raises:
        UserError: if config.yaml cannot be read.
    """
    file = run_dir / "config.yaml"
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{file} cannot be read ({type(error).__name__}): give a whole run folder") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} has no settings: give a whole run folder")
    return {key: value for key, value in config.items() if key != "run_dir"}


def relative_difference(a: Any, b: Any) -> float:
    """|a - b| / max(|a|, |b|); inf if they differ and are not both numbers (digests; null, which was not finite)."""
    if a == b:
        return 0.0
    if not (isinstance(a, (int, float)) and isinstance(b, (int, float))):
        return math.inf
    return abs(a - b) / max(abs(a), abs(b))


def compare_steps(a: Steps, b: Steps, rtol: float) -> list[Finding]:
    """One finding for each figure that a run has, over the steps up to the last that both have.

    Raises:
        UserError: if they have no step in common.
    """
    last = min(max(a), max(b))
    steps = sorted(step for step in a.keys() | b.keys() if step <= last)
    if not a.keys() & b.keys():
        raise UserError(f"no step is in both: one has {min(a)} to {max(a)}, the other {min(b)} to {max(b)}")
    findings = []
    for name in FIGURES:
        if not any(name in line for run in (a, b) for line in run.values()):
            continue
        # A step that only one of them has differs in every figure.
        gaps = {
            step: relative_difference(a[step].get(name), b[step].get(name)) if step in a and step in b else math.inf
            for step in steps
        }
        first = next((step for step, gap in gaps.items() if gap > rtol), None)
        differ = sum(gap > 0 for gap in gaps.values())
        findings.append(Finding(name, len(steps), differ, max(gaps.values()), first))
    return findings


def common_checkpoint(a: Path, b: Path) -> int | None:
    """Step of the newest checkpoint that both runs have."""
    return max(set(steps_in(a)) & set(steps_in(b)), default=None)


def compare_weights(a: Path, b: Path, step: int, rtol: float) -> tuple[Finding, list[Finding]]:
    """Compares the checkpoints of a step, one parameter in memory at a time.

    Returns:
        A finding for all weights, and one for each parameter.
    Raises:
        UserError: if a checkpoint is incomplete or damaged.
    """
    one, two = (Checkpoint.open(run / FOLDER / f"step-{step:08d}") for run in (a, b))
    shapes = [checkpoint.state["shapes"] for checkpoint in (one, two)]
    parameters = []
    square_gap = square_size = 0.0
    for name in sorted(shapes[0].keys() | shapes[1].keys()):
        if shapes[0].get(name) != shapes[1].get(name):
            parameters.append(Finding(name, 0, 0, math.inf))
            square_gap = math.inf
            continue
        count = torch.Size(shapes[0][name]).numel()
        x, y = (checkpoint.read("weight", name, 0, count).double() for checkpoint in (one, two))
        gap = (x - y).abs()
        square_gap += float(gap.square().sum())
        square_size += float(x.square().sum())
        differ = int((x != y).sum())
        largest = float(gap.max() / torch.maximum(x.abs(), y.abs()).max()) if differ else 0.0
        parameters.append(Finding(name, count, differ, _number(largest)))
    apart = _number(math.sqrt(square_gap / square_size) if square_size else math.inf) if square_gap else 0.0
    compared, differ = (sum(getattr(found, name) for found in parameters) for name in ("compared", "differ"))
    return Finding("weights", compared, differ, apart, step if apart > rtol else None), parameters


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value


def print_table(unit: str, findings: list[Finding]) -> None:
    """What was compared, one line each."""
    table = Table("", unit, "differ", "largest difference", *(["first step too far"] if unit == "steps" else []))
    for found in findings:
        row = [found.name, f"{found.compared:,}", f"{found.differ:,}", f"{found.largest:.3g}"]
        if unit == "steps":
            row.append("" if found.first_step is None else str(found.first_step))
        table.add_row(*row)
    Console(width=120, highlight=False).print(table)


def verdict(findings: list[Finding], rtol: float) -> tuple[str, int]:
    """What the findings say in a line, and the exit code."""
    too_far = [found for found in findings if found.first_step is not None]
    if too_far:
        step = min(found.first_step for found in too_far if found.first_step is not None)
        names = [found.name for found in too_far if found.first_step == step]
        return f"they differ: first at step {step}, in {', '.join(names)}", 1
    largest = max(found.largest for found in findings)
    if largest == 0:
        return "identical", 0
    return f"alike within rtol {rtol:g}: the largest difference is {largest:.3g}", 0


def compare(a: Path, b: Path, rtol: float) -> int:
    """Prints how two runs differ; returns the exit code.

    Raises:
        UserError: for folders that cannot be compared.
    """
    runs = [read_steps(run) for run in (a, b)]
    configs = [read_config(run) for run in (a, b)]
    kinds = [KINDS["prompts" in config] for config in configs]
    if kinds[0] != kinds[1]:
        raise UserError(f"{a} is a run of {kinds[0]}, {b} of {kinds[1]}: give two of one kind")
    settings = differences("", *configs)
    findings = compare_steps(*runs, rtol)
    print(f"A {a}\nB {b}")
    print_table("steps", findings)
    if max(runs[0]) != max(runs[1]):
        print(f"A ends at step {max(runs[0])}, B at step {max(runs[1])}")
    for name, before, after in settings:
        print(f"setting {name.lstrip('.')}: A {before}, B {after}")
    step = common_checkpoint(a, b)
    if step is None:
        print("no step has a checkpoint in both: weights are not compared")
    else:
        weights, parameters = compare_weights(a, b, step, rtol)
        changed = sorted((found for found in parameters if found.largest > 0), key=lambda found: -found.largest)
        print(f"weights of step {step}: {len(parameters) - len(changed)} of {len(parameters)} parameters are bit-equal")
        if changed:
            print(f"all of them as one vector differ by {weights.largest:.3g}; those that differ most:")
            print_table("elements", changed[:LISTED])
        findings.append(weights)
    line, code = verdict(findings, rtol)
    print(line)
    return code


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", type=Path, metavar="A", help="run folder")
    parser.add_argument("b", type=Path, metavar="B", help="run folder")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative difference that is allowed (default: none)")
    args = parser.parse_args(argv)
    if not args.rtol >= 0:
        parser.error(f"--rtol {args.rtol} is no tolerance: use 0 or more")
    try:
        return compare(args.a, args.b, args.rtol)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
