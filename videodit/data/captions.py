"""The captions of a clip and how often each is to be chosen.

{"captions": ["a dog", {"text": "a brown dog", "weight": 3}]} or {"captions": [...], "caption_weights": [1, 3]}; without
weights all count alike.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

WEIGHTS = "caption_weights"
CAPTION_NAMES = ("captions", "caption", "text", "prompt")
WEIGHT_NAMES = (WEIGHTS, "caption_weight")


@dataclass(frozen=True)
class Captions:
    """What is said of a clip."""

    texts: list[str]
    """One or several."""
    weights: list[float] = field(default_factory=list)
    """How often each is chosen, relative to the others; empty if all count alike."""

    def __add__(self, other: "Captions") -> "Captions":
        if not self.weights and not other.weights:
            return Captions(self.texts + other.texts)
        return _of([*zip(self.texts, _each(self)), *zip(other.texts, _each(other))])

    def record(self) -> dict[str, Any]:
        """For the clip's json."""
        if len(self.texts) == 1:
            return {"caption": self.texts[0]}
        return {"captions": self.texts} | self.weights_record()

    def weights_record(self) -> dict[str, Any]:
        """The weights for the clip's json, nothing where all captions count alike."""
        return {WEIGHTS: self.weights} if self.weights else {}


def parse_captions(record: Mapping[str, Any]) -> Captions:
    """The captions of a sidecar file or a row of a table, under any of the names that are used for them.

    `caption_weights` go with the first of those names that is there. Captions that are empty or come twice are
    left out.

    Raises:
        ValueError: if a caption is no text, or weights are no positive numbers or not as many as captions.
    """
    found: dict[str, float] = {}
    names = [name for name in CAPTION_NAMES if record.get(name) is not None]
    weights = next((record[name] for name in WEIGHT_NAMES if record.get(name) is not None), None)
    if weights is not None and not names:
        raise ValueError(f"{WEIGHTS} without captions")
    for name in names:
        for text, weight in _pairs(name, record[name], weights if name == names[0] else None):
            if text.strip():
                found.setdefault(text.strip(), weight)
    return _of(list(found.items()))


def stored_captions(record: Mapping[str, Any]) -> Captions:
    """The captions of a sample in a shard, as ingest or other tools wrote it; no texts if it has none.

    Raises:
        ValueError: if it is no object, or weights are no positive numbers or not as many as captions.
    """
    if not isinstance(record, Mapping):  # JSON of other tools may be anything
        raise ValueError(f"no object, but {json.dumps(record)[:80]}")
    name = next((name for name in CAPTION_NAMES[:2] if record.get(name)), None)
    if name is None:
        return Captions([])
    value = record[name]
    listed = [item if isinstance(item, dict) else str(item) for item in (value if isinstance(value, list) else [value])]
    return _of(_pairs(name, listed, record.get(WEIGHTS)))


def _pairs(name: str, value: Any, weights: Any) -> list[tuple[str, float]]:
    """Each caption with its weight."""
    items = value if isinstance(value, list) else [value]
    given = [None] * len(items) if weights is None else weights if isinstance(weights, list) else [weights]
    if len(given) != len(items):
        raise ValueError(f"{len(given)} {WEIGHTS} for {len(items)} {name}: one for each is needed")
    pairs = []
    for item, weight in zip(items, given):
        if isinstance(item, dict):
            weight = item.get("weight", weight)
            item = item.get("text")
        if not isinstance(item, str):
            raise ValueError(f"{name} is no text: {json.dumps(value, default=str)[:80]}")
        pairs.append((item, 1.0 if weight is None else _weight(weight)))
    return pairs


def _weight(value: Any) -> float:
    try:
        weight = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except ValueError:
        weight = math.nan
    if not 0 < weight < math.inf:
        raise ValueError(f"caption weight {value!r}: a number above 0 is needed")
    return weight


def _of(pairs: list[tuple[str, float]]) -> Captions:
    texts, weights = [text for text, _ in pairs], [weight for _, weight in pairs]
    return Captions(texts, [] if all(weight == 1 for weight in weights) else weights)


def _each(captions: Captions) -> list[float]:
    return captions.weights or [1.0] * len(captions.texts)
