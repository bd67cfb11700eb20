"""Which clips of a set training sees: thresholds on their scores, and one clip of several that look alike.

Clips that are filtered out stay in the shards, and the index says why they are not used: other thresholds later cost
seconds and no decoding.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from videodit.data.scores import HASH_BITS, hash_distance
from videodit.data.shards import Entry


@dataclass(frozen=True)
class FilterConfig:
    """Thresholds; the defaults keep everything."""

    min_short_side: int = 0
    """Pixels of a clip's shorter side."""
    min_duration_s: float = 0.0
    """Seconds."""
    min_brightness: float = 0.0
    """Mean luma, 0 black to 1 white; 0.05 leaves out clips that are all but black."""
    max_brightness: float = 1.0
    """Mean luma, likewise."""
    min_sharpness: float = 0.0
    """Variance of the Laplacian at 256 pixels of short side; below 20 most clips look blurred."""
    min_motion: float = 0.0
    """Mean optical flow in short sides a second; 0.01 leaves out what hardly moves."""
    max_motion: float = 0.0
    """Mean optical flow, likewise; above 2 it is shaking or flicker. 0 for no limit."""
    max_static: float = 1.0
    """Share of neighbouring frames that are one picture; 0.5 leaves out slide shows."""
    max_text: float = 1.0
    """Share of the picture that titles, subtitles and logos cover; 0.005 leaves out most subtitled clips."""
    min_match: float | None = None
    """Cosine of captions and frames, -1 to 1, by `models.match`; null for no limit."""
    min_aesthetic: float | None = None
    """Score by `models.aesthetic`, in its own units; null for no limit."""
    duplicate_bits: int = -1
    """Clips whose picture hashes differ in at most so many of their 192 bits are one; the first by name stays. 12 finds
    other encodings of the same pictures; -1 keeps all."""

    def __post_init__(self) -> None:
        for name in ("min_short_side", "min_duration_s", "min_sharpness", "min_motion", "max_motion"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"filters.{name} is {getattr(self, name)}: 0 (none) or more is needed")
        for name in ("min_brightness", "max_brightness", "max_static", "max_text"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"filters.{name} is {getattr(self, name)}: a number from 0 to 1 is needed")
        if self.min_brightness > self.max_brightness:
            raise ValueError(
                f"filters.min_brightness {self.min_brightness} is above max_brightness {self.max_brightness}: "
                "no clip would be left"
            )
        if 0 < self.max_motion < self.min_motion:
            raise ValueError(
                f"filters.min_motion {self.min_motion} is above max_motion {self.max_motion}: no clip would be left"
            )
        for name in ("min_match", "min_aesthetic"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise ValueError(f"filters.{name} is {value}: a number, or null for no limit, is needed")
        if not -1 <= self.duplicate_bits < HASH_BITS // 4:
            raise ValueError(
                f"filters.duplicate_bits is {self.duplicate_bits}: -1 (keep all) to {HASH_BITS // 4 - 1} is possible"
            )


_OF_VIDEOS = ("duration_s", "motion", "static")  # what a picture cannot be held against


@dataclass(frozen=True)
class Threshold:
    """One rule: a score, and the setting that bounds it from below or above."""

    setting: str
    score: str

    @property
    def is_minimum(self) -> bool:
        return self.setting.startswith("min_")

    def limit(self, config: FilterConfig) -> float | None:
        """The bound; None if it lets everything pass."""
        value: float | None = getattr(config, self.setting)
        neutral = next(field.default for field in fields(config) if field.name == self.setting)
        return None if value == neutral else value

    def reason(self, config: FilterConfig, meta: Mapping[str, Any]) -> str:
        """Why a clip does not pass; empty if it does, or has no such score."""
        limit, value = self.limit(config), self.value(meta)
        if limit is None or value is None or (value >= limit if self.is_minimum else value <= limit):
            return ""
        return f"{self.score} {value:g} is {'below' if self.is_minimum else 'above'} {self.setting} {limit:g}"

    def value(self, meta: Mapping[str, Any]) -> float | None:
        """The clip's score; None if its json has none, or it is a picture and the score is about time."""
        if self.score == "short_side":
            return min(meta["height"], meta["width"]) if {"height", "width"} <= meta.keys() else None
        if self.score in _OF_VIDEOS and meta.get("num_frames") == 1:
            return None
        if self.score == "duration_s":
            return meta["num_frames"] / meta["fps"] if meta.get("fps") and "num_frames" in meta else None
        return meta.get(self.score)


_SCORE_OF = {"max_text": "text_cover", "min_match": "text_match"}
THRESHOLDS = tuple(
    Threshold(setting, _SCORE_OF.get(setting) or setting.removeprefix("min_").removeprefix("max_"))
    for setting in (field.name for field in fields(FilterConfig))
    if setting != "duplicate_bits"
)
"""In the order in which a clip is held against them; the first that it fails is its reason."""


class LeftOut(NamedTuple):
    """Why a clip is not used."""

    setting: str
    """The threshold's name, as in "min_motion"."""
    reason: str
    """One line with the clip's value."""


def judge(metas: Sequence[Mapping[str, Any]], names: Sequence[str], config: FilterConfig) -> list[LeftOut | None]:
    """Why each clip of a set is left out.

    Args:
        metas: what the index says of each clip.
        names: what to call each clip in reasons.
        config: the thresholds.
    Returns:
        A reason each; None for those that stay.
    """
    verdicts = [_first_failure(meta, config) for meta in metas]
    if config.duplicate_bits >= 0:
        hashed = {i: str(m["picture_hash"]) for i, m in enumerate(metas) if not verdicts[i] and m.get("picture_hash")}
        for index, first in duplicates(hashed, config.duplicate_bits).items():
            bits = hash_distance(hashed[index], hashed[first])
            reason = f"duplicate of {names[first]}, {bits} of {HASH_BITS} bits differ"
            verdicts[index] = LeftOut("duplicate_bits", reason)
    return verdicts


def mark(entries: Sequence[Entry], config: FilterConfig) -> tuple[list[Entry], dict[str, "Stage"]]:
    """A set's entries with what is not to be used marked as dropped, and what each setting left out."""
    keys = [entry.key for entry in entries]
    verdicts = judge([entry.meta for entry in entries], keys, config)
    marked = [replace(entry, dropped=verdict.reason if verdict else "") for entry, verdict in zip(entries, verdicts)]
    return marked, funnel(verdicts, keys)


def duplicates(hashes: Mapping[int, str], most_bits: int) -> dict[int, int]:
    """Clips that look like an earlier one that stays.

    Every pair within most_bits is found: cut into most_bits + 1 bands, two such hashes agree in at least one.

    Args:
        hashes: picture hashes by clip, in order.
        most_bits: that two of the same may differ in.
    Returns:
        {clip: the first earlier clip that stays and that it is like}.
    """
    edges = [HASH_BITS * band // (most_bits + 1) for band in range(most_bits + 2)]
    staying: dict[tuple[int, int], list[int]] = defaultdict(list)
    found: dict[int, int] = {}
    for index, text in hashes.items():
        value = int(text, 16)
        bands = [
            (number, (value >> low) & ((1 << (high - low)) - 1))
            for number, (low, high) in enumerate(zip(edges, edges[1:]))
        ]
        near = {other for band in bands for other in staying.get(band, ())}
        alike = [other for other in near if hash_distance(text, hashes[other]) <= most_bits]
        if alike:
            found[index] = min(alike)
            continue
        for band in bands:
            staying[band].append(index)
    return found


class Stage(NamedTuple):
    """What one setting left out of a set."""

    clips: int
    """How many clips."""
    example: str
    """The first of them, and why."""


def funnel(verdicts: Iterable[LeftOut | None], names: Sequence[str]) -> dict[str, Stage]:
    """What each setting left out, in the order in which clips are held against them; settings without any are out."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for verdict, name in zip(verdicts, names):
        if verdict:
            counts[verdict.setting] += 1
            examples.setdefault(verdict.setting, f"{name}: {verdict.reason}")
    order = [*(threshold.setting for threshold in THRESHOLDS), "duplicate_bits"]
    return {setting: Stage(counts[setting], examples[setting]) for setting in order if counts[setting]}


def _first_failure(meta: Mapping[str, Any], config: FilterConfig) -> LeftOut | None:
    for threshold in THRESHOLDS:
        if reason := threshold.reason(config, meta):
            return LeftOut(threshold.setting, reason)
    return None
