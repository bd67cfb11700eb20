"""Captions with weights: read from every form, kept in the shards, chosen as often as they say."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.batches import choose_caption
from videodit.data.captions import Captions, parse_captions, stored_captions
from videodit.data.clip_reader import DataConfig
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.latents import write_latent_sample
from videodit.data.loader import clips_in_order
from videodit.data.mp4 import write_mp4
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.errors import UserError


@pytest.mark.parametrize(
    ("record", "captions"),
    [
        ({"caption": "a"}, Captions(["a"])),
        ({"caption": {"text": "a", "weight": 1}}, Captions(["a"])),
        ({"captions": [{"text": "a", "weight": 3}, "b"]}, Captions(["a", "b"], [3, 1])),
        ({"captions": ["a", "b"], "caption_weights": [1, 3]}, Captions(["a", "b"], [1, 3])),
        ({"captions": ["a", "b"], "caption_weights": [2, 2]}, Captions(["a", "b"], [2, 2])),
        ({"captions": ["a", " ", "b", "a"], "caption_weights": [1, 9, 3, 5]}, Captions(["a", "b"], [1, 3])),
        ({"caption": "a", "caption_weight": "0.5", "prompt": "b"}, Captions(["a", "b"], [0.5, 1])),
    ],
)
def test_forms(record: dict[str, Any], captions: Captions) -> None:
    assert parse_captions(record) == captions
    assert stored_captions(json.loads(json.dumps(captions.record()))) == captions


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"captions": ["a", "b"], "caption_weights": [1]}, "1 caption_weights for 2 captions"),
        ({"captions": ["a", "b"], "caption_weights": [1, 0]}, "caption weight 0: a number above 0"),
        ({"captions": ["a", "b"], "caption_weights": [1, True]}, "caption weight True"),
        ({"captions": [{"text": "a", "weight": "often"}]}, "caption weight 'often'"),
        ({"captions": [{"text": "a", "weight": float("inf")}]}, "caption weight inf"),
        ({"captions": [{"weight": 3}]}, "captions is no text"),
    ],
)
def test_mistakes(record: dict[str, Any], message: str) -> None:
    for parse in (parse_captions, stored_captions):
        with pytest.raises(ValueError, match=message):
            parse(record)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(0.05, 20), min_size=1, max_size=6), st.integers(0, 2**32), st.sampled_from([0.0, 0.25]))
def test_chosen_as_often_as_their_weights(weights: list[float], seed: int, drop: float) -> None:
    count = 4000
    captions = Captions([str(number) for number in range(len(weights))], weights)
    chosen = Counter(choose_caption(captions, seed, epoch, "key", drop) for epoch in range(count))
    for number, weight in enumerate(weights):
        share = (1 - drop) * weight / sum(weights)
        assert abs(chosen[number] / count - share) < 5 * (share * (1 - share) / count) ** 0.5 + 1e-3


def test_without_weights_the_choice_is_what_it_was() -> None:
    """Runs that were begun before there were weights go on with the same captions."""
    captions = Captions(["a", "b", "c"])
    chosen = "".join(captions.texts[choose_caption(captions, 5, epoch, "clip-0001") or 0] for epoch in range(24))
    assert chosen == "bbababbcabccccbcbbccbbac"
    equal = Captions(captions.texts, [2.0] * 3)
    keys = [f"key-{number}" for number in range(500)]
    assert [choose_caption(captions, 1, 0, k, 0.2) for k in keys] == [choose_caption(equal, 1, 0, k, 0.2) for k in keys]


def test_seed_epoch_and_key_draw_which_captions_are_dropped() -> None:
    captions, keys = Captions(["a"]), [f"key-{number}" for number in range(1000)]

    def dropped(seed: int, epoch: int, ending: str = "") -> np.ndarray:
        return np.array([choose_caption(captions, seed, epoch, key + ending, 0.5) is None for key in keys])

    for other in (dropped(1, 0), dropped(0, 1), dropped(0, 0, "b")):
        assert abs((dropped(0, 0) == other).mean() - 0.5) < 0.07  # as two throws of a coin


def test_from_a_sidecar_to_the_loader(tmp_path: Path) -> None:
    """Every epoch's caption of every clip is the one that its weights choose; heavy ones come nearly always."""
    (tmp_path / "videos").mkdir()
    said = {"captions": [{"text": "heavy", "weight": 30}, "light"]}
    for name in ("a", "b"):
        frames = np.random.default_rng(ord(name)).integers(0, 256, (1, 4, 4, 3), np.uint8).repeat(17, 0)
        write_mp4(tmp_path / "videos" / f"{name}.mp4", frames.repeat(8, 1).repeat(8, 2), 8)
        (tmp_path / "videos" / f"{name}.json").write_text(json.dumps(said))
    ingest(tmp_path / "videos", tmp_path / "shards", IngestConfig(workers=1))
    shards = ShardSet.open(tmp_path / "shards")
    expected = Captions(["heavy", "light"], [30, 1])
    assert [shards.weighted_captions(index) for index in range(2)] == [expected] * 2
    (batch,) = clips_in_order(DataConfig(buckets=["17x32x32"]), shards, 2)
    assert batch.captions == [expected.texts[choose_caption(expected, 0, 0, key) or 0] for key in batch.keys]


def test_bad_weights_in_a_shard_name_the_sample(tmp_path: Path) -> None:
    meta = {"bucket": "1x8x8", "captions": ["a", "b"], "caption_weights": [1, -1]}
    with ShardWriter(tmp_path / "out") as writer:
        write_latent_sample(writer, "one", torch.zeros(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), meta)
    with pytest.raises(UserError, match="one.json: caption weight -1"):
        ShardSet.open(tmp_path / "out").captions(0)
