"""Reads the files that wandb writes offline, which is what `wandb sync` sends."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

BLOCK, FILE_HEADER, HEADER = 32768, 7, 7  # LevelDB's log format, with a header of its own


def records(file: Path) -> Iterator[Any]:
    data, part, at = file.read_bytes(), b"", FILE_HEADER
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:
            at += BLOCK - at % BLOCK  # padding
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        part += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # the whole record, or its last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            yield record
            part = b""


def files(run_dir: Path) -> list[Path]:
    """In the order in which they were begun."""
    return sorted((run_dir / "wandb").glob("offline-run-*/run-*.wandb"))


def history(run_dir: Path) -> list[dict[str, Any]]:
    """What was logged, in order; wandb's own step is `_step`."""
    rows = []
    for file in files(run_dir):
        for record in records(file):
            if record.WhichOneof("record_type") == "history":
                row = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append({key: json.loads(value) for key, value in row.items()})
    return rows


def config(run_dir: Path) -> dict[str, Any]:
    """The run's config as wandb has it."""
    for record in records(files(run_dir)[0]):
        if record.WhichOneof("record_type") == "run":
            return {update.key: json.loads(update.value_json) for update in record.run.config.update}
    raise AssertionError("no run in the file")
