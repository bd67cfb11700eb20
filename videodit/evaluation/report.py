"""A run's report: one HTML file with the clips playing, the curves, the figures and what they were measured on.

The file holds everything it shows (videos as base64, charts as SVG); its content policy forbids loading anything.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import NamedTuple

from videodit.evaluation.charts import Curve, last_values, line_chart, short_number
from videodit.evaluation.prompt_following import UNCLEAR, Confusion
from videodit.evaluation.report_page import page, section, video, write_page
from videodit.evaluation.report_summary import MARKED, tiles, verdict
from videodit.evaluation.report_tables import NAMES, confusion_table, facts_list, measured_table, stage_table

MACHINE = {
    "cpu": "CPU",
    "cores": "Cores",
    "memory_gib": "Memory (GiB)",
    "instruction_set": "Instruction set",
    "gpu": "GPU",
    "gpu_memory_gib": "GPU memory (GiB)",
    "torch": "torch",
    "cuda": "CUDA",
    "python": "Python",
    "platform": "System",
    "git_commit": "Git commit",
}


@dataclass(frozen=True)
class ClipCard:
    """One generated clip.

    Attributes:
        prompt: what was asked, in words.
        mp4: H.264 file.
        read: what the oracle read, {attribute: word}; empty where there is no oracle.
        asked: what the prompt asked, {attribute: word}.
        held_out: whether training never saw this combination.
    """

    prompt: str
    mp4: bytes
    read: Mapping[str, str] = field(default_factory=dict)
    asked: Mapping[str, str] = field(default_factory=dict)
    held_out: bool = False


class Reconstruction(NamedTuple):
    """A clip before and after the VAE, as H.264 files, and its PSNR in dB."""

    original: bytes
    reconstructed: bytes
    psnr_db: float


@dataclass(frozen=True)
class RunReport:
    """All that a report shows; what is empty is left out of the page.

    Attributes:
        title: the page's heading.
        result: result.json's content (`videodit demo` documents it).
        clips: generated clips.
        reconstructions: clips through the VAE; plain tuples will do.
        curves: charts, in order.
        stages: seconds of each stage, in order.
        machine: `machine_facts()`.
        notes: sentences that a reader must know first: they are at the top.
        configs: {file name: text}.
        confusion: {attribute: {asked: {read: count}}} over the generated clips.
        verdict: the line under the title; made from `result` when empty.
    """

    title: str
    result: dict = field(default_factory=dict)
    clips: Sequence[ClipCard] = ()
    reconstructions: Sequence[Reconstruction | tuple[bytes, bytes, float]] = ()
    curves: Sequence[Curve] = ()
    stages: Mapping[str, float] = field(default_factory=dict)
    machine: Mapping[str, object] = field(default_factory=dict)
    notes: Sequence[str] = ()
    configs: Mapping[str, str] = field(default_factory=dict)
    confusion: Mapping[str, Confusion] = field(default_factory=dict)
    verdict: str = ""


def write_report(path: str | Path, report: RunReport) -> None:
    """Writes the report as one HTML file, atomically; its folder is made if need be.

    Args:
        path: the file, usually RUN/report.html.
        report: what to show.
    Raises:
        OSError: if the file cannot be written.
    """
    write_page(path, render_report(report))


def render_report(report: RunReport) -> str:
    """The page as text."""
    sections = (
        _clips(report),
        _measured(report),
        _reconstructions(report),
        _curves(report),
        _costs(report),
        _texts(report),
    )
    line = " ".join([*report.notes, report.verdict or verdict(report.result)])
    return page("videodit run report", report.title, line, tiles(report.result, sum(report.stages.values())), sections)


def _clips(report: RunReport) -> str:
    if not report.clips:
        return ""
    groups = [[card for card in report.clips if card.held_out is held_out] for held_out in (False, True)]
    heads = ("Trained combinations", "Held-out combinations: never in the training data")
    body = ""
    for head, cards in zip(heads, groups, strict=True):
        if cards:
            title = f"<h3>{head}</h3>" if all(groups) else ""
            body += f'{title}<div class="clips">{"".join(map(_clip, cards))}</div>'
    lead = "Each clip plays above its prompt."
    if any(card.asked for card in report.clips):
        lead = (
            "Marks: does the oracle read from the pixels what the prompt asked? A cross is followed by what it reads."
        )
    button = '<button id="pause" type="button" hidden>Pause clips</button>'
    return section("Generated clips", lead, body, button)


def _clip(card: ClipCard) -> str:
    marks = ""
    for name in MARKED:
        if name in card.asked:
            asked, read = card.asked[name], card.read.get(name, UNCLEAR)
            right = asked == read
            text = f"✓ {NAMES[name]}" if right else f"✗ {NAMES[name]}: {read}"
            title = escape(f"asked {asked}, read {read}")
            marks += f'<span class="mark {"ok" if right else "no"}" title="{title}">{escape(text)}</span>'
    if card.held_out:
        marks += '<span class="mark tag">held out</span>'
    caption = f"<span>{escape(card.prompt)}</span>" + (f'<span class="marks">{marks}</span>' if marks else "")
    return f'<figure class="card clip">{video(card.mp4, card.prompt)}<figcaption>{caption}</figcaption></figure>'


def _measured(report: RunReport) -> str:
    result = report.result
    table = measured_table(
        (
            ("Rendered clips", "the oracle's own ceiling", result.get("oracle_on_real")),
            ("Through the VAE", "the ceiling for generated clips", result.get("oracle_on_reconstructed")),
            ("Generated", "combinations trained on", result.get("accuracy")),
            ("Generated, held out", "combinations never trained on", result.get("held_out_accuracy")),
        )
    )
    heat = ""
    for name in ("motion", "color", "shape", "size"):
        if report.confusion.get(name):
            title = f"<h3>{NAMES[name].capitalize()}: asked (rows), read (columns)</h3>"
            heat += f'<div class="card">{title}{confusion_table(name, report.confusion[name])}</div>'
    if not table and not heat:
        return ""
    lead = "The share of clips in which the oracle reads what was asked. An unclear reading counts as wrong."
    heat = f'<div class="two gap">{heat}</div>' if heat else ""
    return section("Measured", lead, table + heat)


def _reconstructions(report: RunReport) -> str:
    if not report.reconstructions:
        return ""
    pairs = "".join(
        f'<figure class="card pair"><div><div>{video(original, "original clip")}<span>original</span></div>'
        f"<div>{video(copy, 'the clip through the VAE')}<span>through the VAE</span></div></div>"
        f"<figcaption><b>{psnr_db:.1f} dB</b> PSNR</figcaption></figure>"
        for original, copy, psnr_db in report.reconstructions
    )
    lead = "Held-out clips, compressed to latents and decoded again: what the DiT's clips can look like at best."
    return section("Reconstructions", lead, f'<div class="pairs">{pairs}</div>')


def _curves(report: RunReport) -> str:
    if not report.curves:
        return ""
    cards = "".join(
        f'<div class="card"><h3>{escape(c.title)}</h3>{_legend(c)}{line_chart(c)}</div>' for c in report.curves
    )
    lead = "Thin line: each value. Bold line: running mean." if any(c.smooth for c in report.curves) else ""
    return section("Training", lead, f'<div class="two">{cards}</div>')


def _legend(curve: Curve) -> str:
    items = "".join(
        f'<span><i class="s{i % 5}"></i>{escape(name) + " " if name else "last "}<b>{_rounded(value)}</b></span>'
        for i, (name, value) in enumerate(last_values(curve).items())
    )
    return f'<div class="legend">{items}</div>'


def _rounded(value: float) -> str:
    return short_number(float(f"{value:.3g}"))


def _costs(report: RunReport) -> str:
    cards = ""
    if report.stages:
        total = (report.result.get("seconds") or {}).get("total")
        cards += f'<div class="card"><h3>Time by stage</h3>{stage_table(report.stages, total)}</div>'
    if report.machine:
        facts = {**report.machine, "gpu": report.machine.get("gpu") or "none"}
        cards += f'<div class="card"><h3>Machine</h3>{facts_list(facts, MACHINE)}</div>'
    return section("What it took", "", f'<div class="two">{cards}</div>') if cards else ""


def _texts(report: RunReport) -> str:
    files = dict(report.configs)
    if report.result:
        files["result.json"] = json.dumps(report.result, indent=2)
    items = "".join(
        f"<details><summary>{escape(name)}</summary><pre>{escape(text)}</pre></details>" for name, text in files.items()
    )
    return section("Settings and raw figures", "", f'<div class="card configs">{items}</div>') if files else ""
