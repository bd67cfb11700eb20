"""Whether generated clips show what their prompts asked for, as the shapes world's oracle reads it from the pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from videodit.data.shapes import oracle
from videodit.data.shapes.oracle import UNCLEAR
from videodit.data.shapes.world import COLORS, MOTIONS, SHAPES, SIZES, SceneSpec

ATTRIBUTES = ("color", "shape", "motion", "size")
TOGETHER = (
    "color",
    "shape",
    "motion",
)  # "all" is these at once: the triples that are held out, as in oracle.oracle_report
WORDS: dict[str, tuple[str, ...]] = {  # what each attribute can be, in the world's order
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "size": tuple(SIZES),
}


Confusion = dict[str, dict[str, int]]  # asked → read → number of clips


@dataclass(frozen=True)
class PromptFollowing:
    """A set of judged clips.

    Attributes:
        accuracy: color, shape, motion, size: the share of clips in which that attribute was read as asked; all: the
            share in which color, shape and motion were; n: the number of clips.
        confusion: for each attribute, how often what was asked was read as what.
        judgements: `judge`'s dict for each clip, in order.
    """

    accuracy: dict[str, float | int]
    confusion: dict[str, Confusion]
    judgements: list[dict]


def judge(clip: np.ndarray, spec: SceneSpec) -> dict:
    """Holds one clip against the scene that its prompt describes.

    Args:
        clip: (t, h, w, 3) uint8.
        spec: the scene asked for, with one object.
    Returns:
        {"asked": {attribute: word}, "read": {attribute: word or "unclear"}, "correct": {attribute: bool, "all": bool}}.
    Raises:
        ValueError: if the scene does not have exactly one object; the oracle reads no others.
    """
    if len(spec.objects) != 1:
        raise ValueError(f"the oracle reads scenes of one object, this one has {len(spec.objects)}")
    reading = oracle.read(clip)
    asked = {name: str(getattr(spec.objects[0], name)) for name in ATTRIBUTES}
    read = {name: str(getattr(reading, name)) for name in ATTRIBUTES}
    correct = {name: read[name] == asked[name] and read[name] != UNCLEAR for name in ATTRIBUTES}
    return {"asked": asked, "read": read, "correct": {**correct, "all": all(correct[name] for name in TOGETHER)}}


def measure(clips: Iterable[np.ndarray], specs: Sequence[SceneSpec]) -> PromptFollowing:
    """Judges each clip and counts.

    Args:
        clips: each (t, h, w, 3) uint8: generated, real or reconstructed. An iterator is read once, one clip at a time.
        specs: the scene asked of each clip.
    Returns:
        Accuracies, confusion tables and each clip's judgement.
    Raises:
        ValueError: if there are no clips, or their number is not that of the specs.
    """
    return tally([judge(clip, spec) for clip, spec in zip(clips, specs, strict=True)])


def tally(judgements: Sequence[dict]) -> PromptFollowing:
    """Counts judgements that were made before, or joins those of several sets.

    Args:
        judgements: dicts as `judge` gives them.
    Returns:
        As `measure`.
    Raises:
        ValueError: if there are none.
    """
    if not judgements:
        raise ValueError("no clips to measure: at least one is needed")
    n = len(judgements)
    accuracy: dict[str, float | int] = {
        name: sum(j["correct"][name] for j in judgements) / n for name in (*ATTRIBUTES, "all")
    }
    return PromptFollowing(
        accuracy={**accuracy, "n": n},
        confusion={name: confusion(judgements, name) for name in ATTRIBUTES},
        judgements=list(judgements),
    )


def confusion(judgements: Sequence[dict], attribute: str) -> Confusion:
    """How often what was asked was read as what.

    Args:
        judgements: dicts as `judge` gives them.
        attribute: color, shape, motion or size.
    Returns:
        {asked: {read: count}}; pairs that never occurred are absent; "unclear" is a reading like any other.
    """
    counts = Counter((j["asked"][attribute], j["read"][attribute]) for j in judgements)
    table: Confusion = {}
    for (asked, read), count in sorted(counts.items()):
        table.setdefault(asked, {})[read] = count
    return table


def chance() -> dict[str, float]:
    """Accuracy of answers that ignore the prompt, where prompts are balanced: {attribute: share, "all": share}."""
    shares = {name: 1.0 / len(words) for name, words in WORDS.items()}
    return {**shares, "all": math.prod(shares[name] for name in TOGETHER)}


def wilson_interval(share: float, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The range of true rates that a measured share is compatible with.

    Args:
        share: measured share of successes in [0, 1].
        n: number of trials; 0 gives the whole range.
        z: normal quantile; the default gives 95%.
    Returns:
        (low, high) within [0, 1].
    Raises:
        ValueError: if share is outside [0, 1] or n is negative.
    Source: Wilson (1927), J. Am. Stat. Assoc. 22:209-212.
    """
    if not 0.0 <= share <= 1.0 or n < 0:
        raise ValueError(f"a share in [0, 1] of n >= 0 trials is needed, got {share} of {n}")
    if n == 0:
        return 0.0, 1.0
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # rounding may leave 0/n or n/n an ulp outside
    return max(0.0, centre - half), min(1.0, centre + half)
