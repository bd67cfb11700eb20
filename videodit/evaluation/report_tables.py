"""The report's tables as HTML: measured shares with their intervals, confusion as heat, time by stage, facts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from videodit.evaluation.prompt_following import UNCLEAR, WORDS, Confusion, chance, wilson_interval

NAMES = {"color": "colour", "shape": "shape", "motion": "motion", "all": "all three", "size": "size"}
STAGES = {"vae": "train VAE", "dit": "train DiT"}


def percent(share: float, *, digits: int = 1, unit: str = "%") -> str:
    """0.9731 as 97.3%; all and nothing go without decimals, and what falls short of all is never rounded up to it."""
    if share in (0.0, 1.0):
        return f"{100 * share:.0f}{unit}"
    return f"{min(100 * share, 100 - 10.0**-digits):.{digits}f}{unit}"


def chance_text(attribute: str) -> str:
    """Chance of an attribute as whole percents, with one decimal where that would be 0."""
    share = chance()[attribute]
    return percent(share, digits=0 if share >= 0.01 else 1)


def duration(seconds: float) -> str:
    """0.4 s, 42 s, 13 min 20 s, 1 h 02 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def measured_table(rows: Iterable[tuple[str, str, Mapping | None]]) -> str:
    """Shares with their 95% intervals, each drawn on a scale from 0 to 1 beside chance.

    Args:
        rows: (name, what it is, {attribute: share, "n": clips}); a row without figures is left out.
    Returns:
        The table; "" without rows.
    """
    filled = [(name, about, dict(accuracy)) for name, about, accuracy in rows if accuracy]
    columns = [name for name in NAMES if any(name in accuracy for _, _, accuracy in filled)]
    if not columns:
        return ""
    luck = chance()
    head = "".join(
        f'<th scope="col">{NAMES[c].capitalize()}<small>chance {chance_text(c)}</small></th>' for c in columns
    )
    body = ""
    for name, about, accuracy in filled:
        n = accuracy.get("n")
        size = f"{about}, n = {n}" if n else about
        cells = "".join(_share_cell(accuracy.get(c), n, luck[c]) for c in columns)
        body += f'<tr><th scope="row">{escape(name)}<small>{escape(size)}</small></th>{cells}</tr>'
    note = "Dot: measured share. Band: 95% Wilson interval. Tick: chance. Scale: 0 to 100%."
    table = f'<table class="measured"><thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<div class="card"><div class="scroll" tabindex="0">{table}</div><p class="note">{note}</p></div>'


def _share_cell(share: float | None, n: int | None, luck: float) -> str:
    if share is None:
        return "<td>–</td>"
    place = f"--p:{100 * share:.2f}%;--chance:{100 * luck:.2f}%;"
    interval = ""
    if n:
        low, high = wilson_interval(share, n)
        place += f"--lo:{100 * low:.2f}%;--hi:{100 * high:.2f}%"
        interval = f"<small>{100 * low:.1f}–{100 * high:.1f}</small>"
    return f'<td><b>{percent(share)}</b>{interval}<span class="meter" style="{place}"><i></i></span></td>'


def confusion_table(attribute: str, table: Confusion) -> str:
    """What was asked (rows) against what was read (columns), shaded by share of the row; right answers are framed."""
    seen = set(table) | {read for row in table.values() for read in row}
    words = [word for word in WORDS.get(attribute, ()) if word in seen]
    words += sorted(seen - set(words) - {UNCLEAR})
    columns = words + ([UNCLEAR] if UNCLEAR in seen else [])
    head = "".join(f'<th scope="col">{escape(word)}</th>' for word in columns)
    body = ""
    for asked in words:
        row = table.get(asked)
        if not row:
            continue
        total = sum(row.values())
        cells = ""
        for read in columns:
            share = row.get(read, 0) / total
            css = " ".join(["hot"] * (share > 0.5) + ["self"] * (read == asked))
            title = f"{row.get(read, 0)} of {total} asked {asked} read {read}"
            cells += f'<td class="{css}" style="--v:{share:.3f}" title="{escape(title)}">{row.get(read) or ""}</td>'
        body += f'<tr><th scope="row">{escape(asked)}</th>{cells}</tr>'
    head = f"<thead><tr><td></td>{head}</tr></thead>"
    return f'<div class="scroll" tabindex="0"><table class="heat">{head}<tbody>{body}</tbody></table></div>'


def stage_table(stages: Mapping[str, float], total: float | None = None) -> str:
    """How long each stage took, with a bar on a common scale.

    Args:
        stages: {stage: seconds}, in order; "total" is passed over.
        total: seconds of the whole run; the stages' sum when None.
    """
    rows = {name: seconds for name, seconds in stages.items() if name != "total"}
    whole = sum(rows.values()) if total is None else total
    longest = max(rows.values(), default=0.0) or 1.0
    body = "".join(
        f'<tr><th scope="row">{escape(STAGES.get(name, name))}</th>'
        f'<td><span class="bar" style="--w:{100 * seconds / longest:.1f}%"></span></td>'
        f"<td>{duration(seconds)}</td></tr>"
        for name, seconds in rows.items()
    )
    foot = f'<tr><th scope="row">total</th><td></td><td>{duration(whole)}</td></tr>'
    return f'<table class="stages"><tbody>{body}</tbody><tfoot>{foot}</tfoot></table>'


def facts_list(facts: Mapping[str, object], names: Mapping[str, str]) -> str:
    """Names and values; those that are None are left out.

    Args:
        facts: {key: value}.
        names: how a key is written; a key without an entry is written as it is.
    """
    items = "".join(
        f"<dt>{escape(names.get(key, key))}</dt><dd>{escape(str(value))}</dd>"
        for key, value in facts.items()
        if value is not None
    )
    return f"<dl>{items}</dl>"


def listed(words: Sequence[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
