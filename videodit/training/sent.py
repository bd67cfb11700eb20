"""RUN/wandb/sent.json: how much of metrics.jsonl was handed to wandb."""

import json
import os
from collections.abc import Mapping
from pathlib import Path


def read_sent(run_dir: Path) -> dict[str, int]:
    """What sent.json says: lines of metrics.jsonl that wandb has, and how many it has that were cut off again."""
    try:
        sent: dict[str, int] = json.loads((run_dir / "wandb/sent.json").read_text())
        return {"lines": int(sent["lines"]), "rewritten": int(sent["rewritten"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"lines": 0, "rewritten": 0}


def write_sent(run_dir: Path, sent: Mapping[str, int]) -> None:
    """Writes sent.json, whole or not at all."""
    temp = run_dir / "wandb/sent.tmp"
    temp.write_text(json.dumps(sent))
    os.replace(temp, run_dir / "wandb/sent.json")


def cut_sent(run_dir: Path) -> None:
    """Takes note that metrics.jsonl was cut: lines that come in the place of others have to be sent."""
    sent = read_sent(run_dir)
    file = run_dir / "metrics.jsonl"
    lines = file.read_bytes().count(b"\n") if file.exists() else 0
    if sent["lines"] > lines:
        write_sent(run_dir, {"lines": lines, "rewritten": sent["rewritten"] + sent["lines"] - lines})
