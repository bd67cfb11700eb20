"""Scores and captions that models give the clips of finished shards; they go into the index, the tars stay as they are.

What a model said is kept in model_scores.jsonl beside the shards, by the clip's sha256 and the model's, so that
interrupted work goes on, another threshold costs nothing, and of a set that grew only the new clips are looked at.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from videodit.data.captions import Captions
from videodit.data.clip_reader import CLIP_EXTENSIONS
from videodit.data.models_config import SCORES, ModelsConfig
from videodit.data.picture import read_picture
from videodit.data.shards import PART, Entry, ShardSet, json_bytes, sha256_hex
from videodit.data.video_io import VideoError, sample_frames
from videodit.device import choose_device
from videodit.models.vision_language import Captioner, ImageScorer, ImageTextMatcher

SAID = "model_scores.jsonl"


def apply_models(
    root: Path,
    entries: Sequence[Entry],
    config: ModelsConfig,
    models: Mapping[str, Any],
    progress: Callable[[int, int], None] = lambda done, total: None,
    keep: bool = True,
) -> list[Entry]:
    """A set's entries with what models say of the clips, and without what other models said before.

    A clip that does not decode, and a field, is left without.

    Args:
        root: folder of the shards, complete.
        entries: of their index.
        config: which models.
        models: its `record`, which takes a while where models are large.
        progress: called with (clips that a model has seen, all that it has to see), model by model.
        keep: whether answers are written beside the shards.
    Raises:
        UserError: if a model cannot be used.
        MissingExtra: for a model without the transformers library.
    """
    bare = [
        replace(entry, meta={k: v for k, v in entry.meta.items() if k not in SCORES}, captions={}) for entry in entries
    ]
    if not models:
        return bare
    said = _Said(root / SAID, keep)
    stage = _Stage(root, bare, config, models, said, progress)
    for work in (stage.caption, stage.match, stage.aesthetic):
        work()
    said.close()
    return bare


_Key = tuple[str, ...]  # what was asked of which model about which clip


class _Said:
    """What models said, kept line by line."""

    def __init__(self, path: Path, keep: bool) -> None:
        self._path, self._keep = path, keep
        self._lines: dict[_Key, Any] = {}
        if path.is_file():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    *key, value = json.loads(line)
                except ValueError:
                    continue  # cut short when its run was killed
                self._lines[tuple(key)] = value
            self._write_all()

    def __contains__(self, key: _Key) -> bool:
        return key in self._lines

    def get(self, key: _Key) -> Any:
        return self._lines.get(key)

    def add(self, values: Iterable[tuple[_Key, Any]]) -> None:
        new = dict(values)
        self._lines |= new
        if self._keep:
            with open(self._path, "ab") as file:
                file.writelines(json_bytes([*key, value]) + b"\n" for key, value in new.items())

    def close(self) -> None:
        """In an order that does not depend on how often the work was interrupted."""
        self._write_all()

    def _write_all(self) -> None:
        if self._keep and self._lines:
            part = self._path.with_name(self._path.name + PART)
            part.write_bytes(b"".join(json_bytes([*key, self._lines[key]]) + b"\n" for key in sorted(self._lines)))
            os.replace(part, self._path)


class _Stage:
    """One model after the other over the clips of a set, so that one at a time is in memory."""

    def __init__(
        self,
        root: Path,
        entries: list[Entry],
        config: ModelsConfig,
        models: Mapping[str, Any],
        said: _Said,
        progress: Callable[[int, int], None],
    ) -> None:
        self.shards, self._entries = ShardSet(root, entries), entries  # the same list, whose elements are replaced
        self._config, self._models, self._said, self._progress = config, models, said, progress
        self._device = choose_device(config.device)
        self._clips = {
            index: str(entry.meta.get("sha256", entry.key))
            for index, entry in enumerate(entries)
            if any(extension in entry.members for extension in CLIP_EXTENSIONS)
        }

    def caption(self) -> None:
        model = self._models.get("caption")
        if not model:
            return
        keys: dict[int, list[_Key]] = {index: [("caption", model, clip)] for index, clip in self._clips.items()}
        if missing := self._missing(keys):
            config = self._config
            captioner = Captioner(config.caption, self._device, config.caption_prompt, config.caption_tokens)
            for indices, frames in self._batches(missing):
                texts = captioner.caption(frames)
                self._said.add((keys[index][0], text) for index, text in zip(indices, texts))
        for index, (key,) in keys.items():
            if text := self._said.get(key):
                written = Captions([text], [self._config.caption_weight])
                given = self.shards.weighted_captions(index) if self._config.keep_captions else Captions([])
                self._replace(index, captions=(given + written).record())

    def match(self) -> None:
        model = self._models.get("match")
        if not model:
            return
        texts = {index: self.shards.captions(index) for index in self._clips}
        keys: dict[int, list[_Key]] = {
            index: [("match", model, clip, sha256_hex(text.encode())[:16]) for text in texts[index]]
            for index, clip in self._clips.items()
        }
        if missing := self._missing(keys):
            matcher = ImageTextMatcher(self._config.match, self._device)
            for indices, frames in self._batches(missing):
                for index, direction in zip(indices, matcher.images(frames)):
                    cosines = matcher.texts(texts[index]) @ direction
                    self._said.add(zip(keys[index], [round(value, 4) for value in cosines.tolist()]))
        self._score("text_match", keys)

    def aesthetic(self) -> None:
        model = self._models.get("aesthetic")
        if not model:
            return
        keys: dict[int, list[_Key]] = {index: [("aesthetic", model, clip)] for index, clip in self._clips.items()}
        if missing := self._missing(keys):
            scorer = ImageScorer(self._config.aesthetic, self._device)
            for indices, frames in self._batches(missing):
                values = scorer.score(frames)
                self._said.add((keys[index][0], round(value, 4)) for index, value in zip(indices, values))
        self._score("aesthetic", keys)

    def _missing(self, keys: dict[int, list[_Key]]) -> list[int]:
        return [index for index, of_clip in keys.items() if any(key not in self._said for key in of_clip)]

    def _score(self, name: str, keys: dict[int, list[_Key]]) -> None:
        """The mean of what was said of a clip."""
        for index, of_clip in keys.items():
            values = [self._said.get(key) for key in of_clip if key in self._said]
            if values:
                meta = self.shards.entries[index].meta | {name: round(float(np.mean(values)), 4)}
                self._replace(index, meta=meta)

    def _replace(self, index: int, **changes: Any) -> None:
        self._entries[index] = replace(self._entries[index], **changes)

    def _batches(self, indices: list[int]) -> Iterator[tuple[list[int], list[list[np.ndarray]]]]:
        """Clips that decode, with their frames."""
        for start in range(0, len(indices), self._config.batch_size):
            together = indices[start : start + self._config.batch_size]
            frames = {index: found for index in together if (found := self._frames(index))}
            if frames:
                yield list(frames), list(frames.values())
            self._progress(start + len(together), len(indices))

    def _frames(self, index: int) -> list[np.ndarray]:
        members = self.shards.entries[index].members
        extension = next(extension for extension in CLIP_EXTENSIONS if extension in members)
        data = self.shards.read(index, extension)
        try:
            return sample_frames(data, self._config.frames) if extension == "mp4" else [read_picture(data)]
        except VideoError:
            return []
