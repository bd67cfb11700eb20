"""The top of a report: one line that says how the run went, and its key figures."""

from __future__ import annotations

from collections.abc import Mapping

from videodit.evaluation.report_page import tile_row
from videodit.evaluation.report_tables import NAMES, chance_text, duration, listed, percent

MARKED = ("color", "shape", "motion")  # the attributes with a target, shown on each clip and at the top


def verdict(result: Mapping) -> str:
    """One sentence for each thing measured: prompts followed, reconstruction, time."""
    parts = []
    accuracy = result.get("accuracy") or {}
    known = [name for name in MARKED if name in accuracy]
    if known:
        first, *rest = [f"{percent(accuracy[name])}" for name in known]
        shares = [f"{first} show the {NAMES[known[0]]} that their prompt asks for"]
        shares += [f"{share} the {NAMES[name]}" for share, name in zip(rest, known[1:], strict=True)]
        luck = listed([chance_text(name) for name in known])
        parts.append(f"Of {accuracy.get('n', 'the')} generated clips {listed(shares)}; chance gives {luck}.")
    if "vae_psnr_db" in result:
        parts.append(f"The VAE rebuilds held-out clips at {result['vae_psnr_db']:.1f} dB.")
    total = (result.get("seconds") or {}).get("total")
    if total is not None:
        device = f" on {result['device']}" if result.get("device") else ""
        parts.append(f"The whole run took {duration(total)}{device}.")
    return " ".join(parts) or "Nothing was measured in this run."


def tiles(result: Mapping, total: float | None = None) -> str:
    """The run's key figures as a row of tiles; "" without any.

    Args:
        result: result.json's content.
        total: seconds of the whole run, where the result does not say.
    """
    accuracy, held_out = result.get("accuracy") or {}, result.get("held_out_accuracy") or {}
    rows: list[tuple[str, str, str]] = []
    for name in MARKED:
        if name in accuracy:
            below = f"held out {percent(held_out[name])}" if name in held_out else f"of {accuracy.get('n', '?')} clips"
            rows.append(
                (f"{NAMES[name].capitalize()} as asked", percent(accuracy[name], unit="<small>%</small>"), below)
            )
    if "vae_psnr_db" in result:
        boxed = result.get("vae_psnr_boxes_db")
        below = f"{boxed:.1f} dB inside objects" if boxed is not None else "on held-out clips"
        rows.append(("VAE PSNR", f"{result['vae_psnr_db']:.1f}<small>dB</small>", below))
    total = (result.get("seconds") or {}).get("total", total)
    if total:
        steps = f"{result['dit_steps']:,} DiT steps" if "dit_steps" in result else "from start to report"
        words = duration(total).split()
        value = " ".join(f"{number}<small>{unit}</small>" for number, unit in zip(words[::2], words[1::2], strict=True))
        rows.append(("Whole run", value, steps))
    return tile_row(rows)
