"""What ingest keeps of itself in its output folder: what it was made of, what became of it."""

import hashlib
import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from videodit.data.channel_statistics import ChannelStatistics
from videodit.data.shards import INDEX, PART, json_bytes
from videodit.data.sources import Source
from videodit.errors import UserError

RECORD = "ingest.json"
REJECTS = "rejects.jsonl"


def fingerprint(sources: list[Source]) -> str:
    """Changes when a file, a caption or anything else that goes into the shards does."""
    digest = hashlib.sha256()
    for s in sources:
        said = [s.captions.texts, s.captions.weights, s.extra]
        digest.update(json_bytes([s.name, said, s.problem, source_bytes(s), source_version(s), s.span]) + b"\n")
    return digest.hexdigest()


def source_bytes(source: Source) -> int:
    """How large it is; 0 if it is not there."""
    if source.span:
        return source.span[1]
    if source.state:
        return source.state.size
    return os.stat(source.path).st_size if os.path.exists(source.path) else 0


def source_version(source: Source) -> int | str:
    """What changes when its bytes do."""
    if source.state:
        return source.state.version
    return os.stat(source.path).st_mtime_ns if os.path.exists(source.path) else 0


def earlier_run(out: Path, record: dict[str, Any], sources: list[Source]) -> dict[str, Any] | None:
    """The record of an earlier run that cut the same clips and scored them alike; None if there is none.

    Args:
        out: the folder.
        record: what this run would be made of; filters may differ.
        sources: what this run would cut.
    Raises:
        UserError: if the folder holds something else, or clips of other sources only, which would be lost.
    """
    try:
        earlier = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if any(out.glob("*.tar")):
            raise UserError(f"{out} holds tars that ingest did not write: choose another --out") from None
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{out / RECORD} cannot be read ({error}): remove {out} or choose another --out") from error
    if not earlier.get("complete") or not (out / INDEX).is_file():
        return None
    changed = [
        f"{k} {earlier['config'].get(k)}, now {v}" for k, v in record["config"].items() if earlier["config"].get(k) != v
    ]
    if changed:
        raise UserError(
            f"{out} holds shards made with other settings ({'; '.join(changed)}): choose another --out or remove it"
        )
    same = all(earlier.get(name) == record[name] for name in ("sources_sha256", "scores"))
    if earlier.get("sources_sha256") != record["sources_sha256"]:
        _refuse_other_sources(out, {source.name for source in sources})
    return earlier if same and not earlier.get("not_fetched") else None


def _refuse_other_sources(out: Path, names: set[str]) -> None:
    """Raises UserError if none of a set's clips is of a source of these names: they would all be replaced."""
    first = ""
    with open(out / INDEX, encoding="utf-8") as lines:
        for line in lines:  # of a set that has grown, the first one mostly
            try:
                source = json.loads(line)["meta"].get("source", "")
            except (ValueError, KeyError, TypeError, AttributeError):
                return  # a damaged index is written anew
            if source in names:
                return
            first = first or source
    if first:
        raise UserError(
            f"{out} holds clips of other videos only, such as {first}, which would be replaced: choose another --out, "
            "for training reads several (--data.shards '[A,B]'), or remove it"
        )


def read_record(out: Path) -> dict[str, Any] | None:
    """What ingest wrote about a folder; None for shards from elsewhere."""
    try:
        record: dict[str, Any] = json.loads((out / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return record


def read_statistics(out: Path) -> ChannelStatistics | None:
    """Statistics of the channels of a folder's fields; None if it has no fields, or ingest did not make it."""
    channels = (read_record(out) or {}).get("channels")
    return ChannelStatistics(tuple(channels["mean"]), tuple(channels["std"])) if channels else None


def read_rejects(out: Path) -> list[dict[str, Any]]:
    """What did not make it: a source, a scene of one (with start_s) or a clip that filters left out (with key)."""
    path = out / REJECTS
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def reject_reasons(out: Path) -> dict[str, int]:
    """How often each reason is given for what no filter left out, the most frequent first.

    Reasons that differ in numbers, names of captions or what comes after a colon are one, called as the first of them.
    """
    given = [reject["reason"].partition(":")[0] for reject in read_rejects(out) if "key" not in reject]
    alike = [re.sub(r"\d+", "0", re.sub(r"^caption file .*", "caption file", reason)) for reason in given]
    first = dict(zip(reversed(alike), reversed(given)))
    return {first[kind]: count for kind, count in Counter(alike).most_common()}


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a file that appears only when it is complete."""
    part = path.with_name(path.name + PART)
    part.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(part, path)
