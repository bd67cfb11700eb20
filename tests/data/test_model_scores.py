"""Models that look at clips: their answers lie in the index, are asked for once, and the tars stay as they are."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from tests.data import vision_models
from videodit.data.captions import Captions
from videodit.data.filters import FilterConfig
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.latent_parts import clips_fingerprint
from videodit.data.models_config import ModelsConfig
from videodit.data.mp4 import write_mp4
from videodit.data.shards import ShardSet
from videodit.data.video_io import sample_frames
from videodit.errors import MissingExtra, UserError

PLAIN = IngestConfig(workers=1, min_frames=5)
SAID = "model_scores.jsonl"


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five videos, one with two captions; and a field."""
    folder = tmp_path_factory.mktemp("videos")
    for number in range(5):
        blocks = np.random.default_rng(number).integers(0, 256, (1, 4, 4, 3), np.uint8).repeat(9, 0)
        write_mp4(folder / f"{number}.mp4", blocks.repeat(8, 1).repeat(8, 2), 8)
        (folder / f"{number}.txt").write_text(f"blocks {number}")
    (folder / "0.json").write_text(json.dumps({"captions": ["a", "b"], "caption_weights": [1, 3]}))
    np.save(folder / "field.npy", np.ones((6, 4, 4), np.float32))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> ModelsConfig:
    folder = tmp_path_factory.mktemp("models")
    vision_models.save_clip(folder / "clip")
    vision_models.save_scorer(folder / "scorer")
    vision_models.save_blip(folder / "blip")
    vision_models.save_llava(folder / "llava")
    config = ModelsConfig(str(folder / "clip"), str(folder / "scorer"), str(folder / "llava"))
    return replace(config, caption_tokens=6, batch_size=2, frames=3, device="cpu")


@pytest.fixture(scope="module")
def plain(videos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards without any model."""
    out = tmp_path_factory.mktemp("plain") / "shards"
    ingest(videos, out, PLAIN)
    return out


@pytest.fixture(scope="module")
def finished(videos: Path, plain: Path, models: ModelsConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same shards, looked at by models: nothing is cut again."""
    out = tmp_path_factory.mktemp("scored") / "shards"
    shutil.copytree(plain, out)
    result = ingest(videos, out, replace(PLAIN, models=models))
    assert (result.clips, result.up_to_date) == (6, False)
    return out


@pytest.fixture
def scored(finished: Path, tmp_path: Path) -> Path:
    """A copy of them to change."""
    return Path(shutil.copytree(finished, tmp_path / "scored"))


def contents(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.iterdir()}


def test_scores_are_those_of_the_models_themselves(finished: Path, models: ModelsConfig) -> None:
    shards = ShardSet.open(finished)
    clip = transformers.CLIPModel.from_pretrained(models.match)
    scorer = transformers.ViTForImageClassification.from_pretrained(models.aesthetic)
    pixels, squares = (transformers.AutoImageProcessor.from_pretrained(f) for f in (models.match, models.aesthetic))
    words = transformers.AutoTokenizer.from_pretrained(models.match)
    for index, entry in enumerate(shards.entries):
        if "npy" in entry.members:
            assert not {"text_match", "aesthetic"} & entry.meta.keys() and not entry.captions
            continue
        frames = sample_frames(shards.read(index, "mp4"), 3)
        text = words(shards.captions(index), return_tensors="pt", padding=True)
        with torch.no_grad():
            logits = scorer(**squares(images=frames, return_tensors="pt")).logits
            seen = clip(**pixels(images=frames, return_tensors="pt"), **text)
        direction = torch.nn.functional.normalize(seen.image_embeds.mean(0), dim=0)
        assert entry.meta["aesthetic"] == pytest.approx(float(logits.mean()), abs=1e-3)
        assert entry.meta["text_match"] == pytest.approx(float((seen.text_embeds @ direction).mean()), abs=1e-3)


def test_the_tars_stay_and_the_index_has_captions(finished: Path, plain: Path) -> None:
    before, with_models = ShardSet.open(plain), ShardSet.open(finished)
    one, other = contents(plain), contents(finished)
    assert {name for name in other if one.get(name) != other[name]} == {"index.jsonl", "ingest.json", SAID}
    for index, entry in enumerate(with_models.entries):
        given, now = before.weighted_captions(index), with_models.weighted_captions(index)
        if "npy" in entry.members:
            assert now == given
            continue
        assert now.texts[:-1] == given.texts and now.texts[-1]
        assert now.weights == ([1, 3, 1] if len(given.texts) == 2 else [])
        assert with_models.read_json(index) == before.read_json(index)
    assert clips_fingerprint(before, range(len(before))) != clips_fingerprint(with_models, range(len(before)))


def test_only_what_is_new_is_asked(scored: Path, videos: Path, models: ModelsConfig) -> None:
    """Answers that were changed by hand come back: nobody asked again."""
    lines = [json.loads(line) for line in (scored / SAID).read_text().splitlines()]
    assert len(lines) == 5 + 11 + 5  # captions; a match for each caption of a clip; aesthetic scores
    lines = [[*line[:-1], 7.5 if line[0] == "aesthetic" else line[-1]] for line in lines]
    (scored / SAID).write_text("".join(json.dumps(line) + "\n" for line in lines))
    tars = [(path, path.stat().st_mtime_ns) for path in scored.glob("*.tar")]
    result = ingest(videos, scored, replace(PLAIN, models=models, filters=FilterConfig(min_aesthetic=7)))
    assert (result.clips, result.filtered) == (6, {})
    assert {e.meta.get("aesthetic") for e in ShardSet.open(scored).entries} == {7.5, None}
    strict = replace(PLAIN, models=models, filters=FilterConfig(min_aesthetic=8, min_match=-1))
    assert ingest(videos, scored, strict).filtered["min_aesthetic"].clips == 5
    assert ingest(videos, scored, strict).up_to_date
    assert [(path, path.stat().st_mtime_ns) for path in scored.glob("*.tar")] == tars


def test_interrupted_and_started_again(scored: Path, videos: Path, models: ModelsConfig) -> None:
    """As if killed while answers were being written: the shards complete, half a line, no record of models."""
    expected = contents(scored)
    lines = expected[SAID].splitlines(keepends=True)
    (scored / SAID).write_bytes(b"".join(reversed(lines[4:])) + lines[0][:20])
    record = json.loads(expected["ingest.json"])
    del record["models"], record["filters"]
    (scored / "ingest.json").write_text(json.dumps(record))
    ingest(videos, scored, replace(PLAIN, models=models))
    assert contents(scored) == expected


def test_without_models_again_and_with_another(
    scored: Path, videos: Path, models: ModelsConfig, tmp_path: Path
) -> None:
    ingest(videos, tmp_path / "plain", PLAIN)
    ingest(videos, scored, PLAIN)
    assert contents(tmp_path / "plain") == {k: v for k, v in contents(scored).items() if k != SAID}
    blip = ModelsConfig(caption=models.caption.replace("llava", "blip"), keep_captions=False, frames=2, device="cpu")
    ingest(videos, scored, replace(PLAIN, models=blip))
    shards = ShardSet.open(scored)
    for index, entry in enumerate(shards.entries):
        if "npy" not in entry.members:
            assert len(shards.captions(index)) == 1 and not shards.captions(index)[0].startswith("blocks")
    ingest(videos, scored, replace(PLAIN, models=replace(blip, keep_captions=True, caption_weight=2)))
    weighted = [ShardSet.open(scored).weighted_captions(index) for index in range(5)]
    assert all(
        isinstance(said, Captions) and said.weights == ([1, 3, 2] if len(said.texts) == 3 else [1, 2])
        for said in weighted
    )


def test_dry_run_asks_and_writes_nothing(videos: Path, models: ModelsConfig, tmp_path: Path) -> None:
    config = replace(PLAIN, models=replace(models, caption=""), filters=FilterConfig(min_match=1.0), dry_run=True)
    result = ingest(videos, tmp_path / "out", config)
    assert result.filtered["min_match"].clips == 5 and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("match", lambda folder: None, "models.match .* is no folder with config.json"),
        ("match", lambda folder: folder.mkdir(), "models.match .* is no folder with config.json"),
        ("match", vision_models.save_scorer, "is a ViTModel without get_image_features: give a folder of CLIP"),
        ("aesthetic", lambda folder: vision_models.save_scorer(folder, 3), "has 3 outputs: a model with one"),
        ("aesthetic", vision_models.save_clip, "lacks .* weights"),
        ("caption", vision_models.save_scorer, "cannot be loaded"),
    ],
)
def test_wrong_models_get_one_line(kind: str, make, message: str, videos: Path, plain: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "out")
    make(tmp_path / "model")
    config = replace(PLAIN, models=ModelsConfig(**{kind: str(tmp_path / "model")}, device="cpu"))
    with pytest.raises(UserError, match=message) as caught:
        ingest(videos, tmp_path / "out", config)
    assert "\n" not in str(caught.value)


def test_transformers_is_an_extra(videos: Path, plain: Path, models: ModelsConfig, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(plain, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"transformers is not installed: run pip install 'videodit\[text\]'"):
        ingest(videos, tmp_path / "out", replace(PLAIN, models=models))


@pytest.mark.parametrize("name", ["match", "aesthetic"])
def test_a_threshold_needs_its_model(name: str) -> None:
    with pytest.raises(ValueError, match=f"filters.min_{name} is set without a model: give --models.{name} FOLDER"):
        IngestConfig(filters=FilterConfig(**{f"min_{name}": 0.2}))
