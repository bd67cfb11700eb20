"""A frozen text encoder from encode to generate: embeddings travel with the latents, prompts are read by the same."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from tests import tiny
from videodit import TextToVideo
from videodit.config import load_yaml
from videodit.data.clip_reader import DataConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import EMPTY_TEXT, read_empty_text, read_latent_sample, read_manifest, write_latent_sample
from videodit.data.loader import LatentBatch, LatentLoader
from videodit.data.mp4 import encode_mp4
from videodit.data.shapes.render import render
from videodit.data.shapes.world import sample_spec
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet, json_bytes
from videodit.data.video_io import read_frames
from videodit.errors import UserError
from videodit.generation.encode import EncodeConfig, encode_clips
from videodit.generation.generate import GenerateConfig, generate
from videodit.models.text_transformers import TransformersTextEncoder
from videodit.training.dit_config import DiTRunConfig, follow_latents
from videodit.training.dit_model import build_model
from videodit.training.dit_trainer import train_dit
from videodit.training.export import export_run
from videodit.training.optim import OptimConfig
from videodit.training.run_folder import read_metrics
from videodit.training.tracker import TrackerConfig

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

DIM, MAX_LENGTH = 12, 5
CAPTIONS = [
    ["a red circle", "red"],
    ["a small blue square moves left", "blue square"],  # six words and the end: cut to MAX_LENGTH
    ["a star"],
    ["a large red star moves"],
    ["square", "a square", "a blue square"],
    [""],
]
HALF = {"rtol": 2e-3, "atol": 2e-3}


class World(NamedTuple):
    encode: EncodeConfig
    encoder: TransformersTextEncoder
    run: Path
    model: Path


def write_t5(folder: Path, seed: int = 0) -> Path:
    """A T5 with random weights, and a tokenizer of whole words."""
    words = ["<pad>", "</s>", "<unk>", *dict.fromkeys(word for each in CAPTIONS for c in each for word in c.split())]
    torch.manual_seed(seed)
    shape = {"vocab_size": 32, "d_model": DIM, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 3}
    transformers.T5EncoderModel(transformers.T5Config(**shape)).save_pretrained(folder)
    by_word = tokenizers.models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(by_word)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return folder


def write_clips(folder: Path, captions: list[list[str]]) -> Path:
    with ShardWriter(folder) as writer:
        for number, each in enumerate(captions):
            frames = render(sample_spec(np.random.default_rng(number)), num_frames=tiny.FRAMES, size=tiny.SIZE)
            facts = {"fps": 8.0, "num_frames": tiny.FRAMES, "height": tiny.SIZE, "width": tiny.SIZE, "captions": each}
            writer.write(f"clip-{number}", {"mp4": encode_mp4(frames, 8.0), "json": json_bytes(facts)})
    return folder


def encode_config(root: Path, clips: Path) -> EncodeConfig:
    data = DataConfig(shards=str(clips), buckets=[tiny.BUCKET])
    vae, text_encoder = tiny.make_vae(root / "vae"), write_t5(root / "t5")
    return EncodeConfig(
        str(vae), str(root / "latents"), data, batch_size=4, device="cpu",
        text_encoder=str(text_encoder), text_max_length=MAX_LENGTH,
    )  # fmt: skip


def run_config(run_dir: Path, latents: str, **changes: Any) -> DiTRunConfig:
    config = DiTRunConfig(
        run_dir=str(run_dir),
        data=LatentDataConfig(shards=latents, caption_drop=0.3),
        model=dataclasses.replace(tiny.DIT, text_dim=99),  # the latents decide
        optim=OptimConfig(lr=1e-2, warmup_steps=0),
        sampling=tiny.SAMPLING,
        max_steps=4,
        global_batch_size=5,
        micro_batch_size=3,
        device="cpu",
        tracker=TrackerConfig(mode="disabled"),
    )
    return dataclasses.replace(config, **changes)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("frozen")
    config = encode_config(root, write_clips(root / "clips", CAPTIONS))
    assert encode_clips(config) == len(CAPTIONS)
    encoder = TransformersTextEncoder(root / "t5", MAX_LENGTH)
    run = train_dit(run_config(root / "dit", config.out, prompts=("a red circle", "blue star")))
    export_run(run, root / "model")
    return World(config, encoder, run, root / "model")


def embedding(encoder: TransformersTextEncoder, caption: str) -> torch.Tensor:
    return encoder.encode([caption]).embeddings[0]


# ---- what encode writes


def test_every_caption_lies_beside_the_latents(world: World) -> None:
    latents = ShardSet.open(world.encode.out)
    for index, captions in enumerate(CAPTIONS):
        assert latents.captions(index) == captions
        text = read_latent_sample(latents, index).text
        assert [tokens.shape for tokens in text] == [(min(len(c.split()) + 1, MAX_LENGTH), DIM) for c in captions]
        for tokens, caption in zip(text, captions):
            assert tokens.dtype == torch.float16
            torch.testing.assert_close(tokens.float(), embedding(world.encoder, caption), **HALF)
    empty = read_empty_text(world.encode.out)
    torch.testing.assert_close(empty.float(), embedding(world.encoder, ""), **HALF)


def test_the_manifest_names_the_encoder(world: World, tmp_path: Path) -> None:
    manifest = read_manifest(world.encode.out)
    assert manifest is not None
    assert manifest["text_encoder"] == {"source": world.encode.text_encoder, "max_length": MAX_LENGTH, "dim": DIM}
    plain = dataclasses.replace(world.encode, out=str(tmp_path / "plain"), text_encoder=None)
    encode_clips(plain)
    manifest = read_manifest(plain.out)
    assert manifest is not None and manifest["text_encoder"] is None
    assert not (tmp_path / "plain" / EMPTY_TEXT).exists()


def other_settings(config: EncodeConfig) -> EncodeConfig:
    path = Path(str(config.text_encoder)) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "layer_norm_epsilon": 1e-3}))
    return config


def other_tokenizer(config: EncodeConfig) -> EncodeConfig:
    path = Path(str(config.text_encoder)) / "tokenizer.json"
    values = json.loads(path.read_text())
    vocabulary = values["model"]["vocab"]
    vocabulary["red"], vocabulary["blue"] = vocabulary["blue"], vocabulary["red"]
    path.write_text(json.dumps(values))
    return config


def other_captions(config: EncodeConfig) -> EncodeConfig:
    write_clips(Path(config.data.shards), [["a red circus", "rad"], *CAPTIONS[1:]])  # of the same lengths
    return config


def other_weights(config: EncodeConfig) -> EncodeConfig:
    write_t5(Path(str(config.text_encoder)), seed=1)
    return config


def lose_empty_text(config: EncodeConfig) -> EncodeConfig:
    (Path(config.out) / EMPTY_TEXT).unlink()
    return config


CHANGES: dict[str, Callable[[EncodeConfig], EncodeConfig]] = {
    "caption": other_captions,
    "weights": other_weights,
    "settings": other_settings,
    "tokenizer": other_tokenizer,
    "max length": lambda config: dataclasses.replace(config, text_max_length=3),
    "no encoder": lambda config: dataclasses.replace(config, text_encoder=None),
    "empty text lost": lose_empty_text,
}


@pytest.fixture
def copied(world: World, tmp_path: Path) -> EncodeConfig:
    """The same clips, encoder and latents, to be changed; all of them moved, which changes nothing."""
    root = Path(world.encode.out).parent
    for name in ("clips", "t5", "latents"):
        shutil.copytree(root / name, tmp_path / name)
    data = dataclasses.replace(world.encode.data, shards=str(tmp_path / "clips"))
    changes = {"out": str(tmp_path / "latents"), "text_encoder": str(tmp_path / "t5")}
    return dataclasses.replace(world.encode, data=data, **changes)


@pytest.mark.parametrize("change", [*CHANGES])
def test_what_changes_the_embeddings_makes_them_anew(copied: EncodeConfig, change: str) -> None:
    assert encode_clips(copied) == 0
    config = CHANGES[change](copied)
    assert encode_clips(config) == (0 if change == "empty text lost" else len(CAPTIONS))
    assert encode_clips(config) == 0
    assert (Path(config.out) / EMPTY_TEXT).exists() == bool(config.text_encoder)


def test_an_encoder_that_cannot_be_used_leaves_the_cache_alone(copied: EncodeConfig) -> None:
    with pytest.raises(UserError, match="text encoder nowhere is not a folder"):
        encode_clips(dataclasses.replace(copied, text_encoder="nowhere"))
    assert encode_clips(copied) == 0
    with pytest.raises(ValueError, match="text_max_length 0 is below 1"):
        dataclasses.replace(copied, text_max_length=0)


# ---- what training reads


def batches_of(latents: str, steps: int = 4, **changes: Any) -> list[LatentBatch]:
    config = LatentDataConfig(shards=latents, **{"caption_drop": 0.5, **changes})
    loader = LatentLoader(config, seed=1, global_batch_size=5, micro_batch_size=3)
    return [batch for _, batches in islice(loader.iterate(), steps) for batch in batches]


@pytest.mark.parametrize("changes", [{}, {"cache_gib": 0.0}, {"cache_gib": 0.0, "num_workers": 1}], ids=str)
def test_a_batch_has_the_embeddings_of_its_captions(world: World, changes: dict[str, Any]) -> None:
    seen = set()
    for batch in batches_of(world.encode.out, **changes):
        assert batch.text is not None and batch.text_mask is not None
        assert batch.text.dtype == torch.float16 and batch.text_mask.dtype == torch.bool
        expected = world.encoder.encode(batch.captions)  # dropped captions and padding are ''
        assert torch.equal(batch.text_mask, expected.mask)  # padded to the longest in the batch
        torch.testing.assert_close(batch.text.float(), expected.embeddings, **HALF)
        assert (batch.text[~batch.text_mask] == 0).all()
        for key, caption, weight in zip(batch.keys, batch.captions, batch.weight.tolist()):
            seen.add("padding" if not weight else "dropped" if not caption and key != "clip-5" else "caption")
    assert seen == {"padding", "dropped", "caption"}


def test_the_choice_of_captions_does_not_hang_on_the_encoder(copied: EncodeConfig, world: World) -> None:
    encode_clips(dataclasses.replace(copied, text_encoder=None))
    plain, frozen = batches_of(copied.out), batches_of(world.encode.out)
    assert [batch.captions for batch in plain] == [batch.captions for batch in frozen]
    assert all(batch.text is None and batch.text_mask is None for batch in plain)
    assert all(torch.equal(a.mean, b.mean) for a, b in zip(plain, frozen))


def test_a_sample_with_too_few_embeddings_is_left_out(copied: EncodeConfig) -> None:
    shards = ShardSet.open(copied.out)
    samples = [(read_latent_sample(shards, index), shards.read_json(index)) for index in range(len(shards))]
    manifest = (Path(copied.out) / "latents.json").read_text()
    with ShardWriter(copied.out) as writer:
        for index, (sample, record) in enumerate(samples):
            text = [] if index == 0 else [tokens[:, :4] for tokens in sample.text] if index == 1 else sample.text
            write_latent_sample(writer, f"clip-{index}", sample.mean, sample.logvar, record, text)
    (Path(copied.out) / "latents.json").write_text(manifest)
    for batch in batches_of(copied.out):
        for key, weight in zip(batch.keys, batch.weight.tolist()):
            assert weight == (key not in ("", "clip-0", "clip-1"))


def test_embeddings_that_cannot_be_kept_are_refused(tmp_path: Path) -> None:
    latents, meta = torch.zeros(4, 1, 2, 2), {"bucket": "1x16x16", "captions": ["one"]}
    faults = {
        "2 embeddings for the 1 captions of k": [torch.zeros(2, 3)] * 2,
        "text/0 of k is not finite in fp16": [torch.full((2, 3), 1e5)],
        "text/0 of k has shape": [torch.zeros(0, 3)],
    }
    for message, text in faults.items():
        with pytest.raises(ValueError, match=message):
            write_latent_sample(ShardWriter(tmp_path), "k", latents, latents, meta, text)


def test_latents_that_lost_the_empty_caption_are_the_users_error(copied: EncodeConfig) -> None:
    (Path(copied.out) / EMPTY_TEXT).write_bytes(b"torn")
    with pytest.raises(UserError, match="empty_text.safetensors is missing or damaged .*videodit encode"):
        batches_of(copied.out)


# ---- training, export, generation


def test_the_module_has_no_text_encoder(world: World) -> None:
    config = load_yaml(DiTRunConfig, world.run / "config.yaml")
    assert (config.text_encoder, config.text_max_length) == (world.encode.text_encoder, MAX_LENGTH)
    model = build_model(config)
    assert model.text_encoder is None and model.dit.config.text_dim == DIM


def test_the_export_refers_to_the_encoder_and_generates(world: World, tmp_path: Path) -> None:
    reference = json.loads((world.model / "text_encoder/reference.json").read_text())
    assert reference == {"source": world.encode.text_encoder, "max_length": MAX_LENGTH}
    config = GenerateConfig(model=str(world.model), prompt=["a red circle", "star"], out=str(tmp_path), device="cpu")
    for path in generate(config):
        assert read_frames(path).shape == (tiny.FRAMES, tiny.SIZE, tiny.SIZE, 3)
    pipe = TextToVideo.from_pretrained(world.model)
    one, other = (pipe.sample_latents([prompt], seed=0) for prompt in ("a red circle", "blue star"))
    assert (one - other).abs().max() > 1e-4  # the prompt is heard


def test_samples_of_the_run_are_those_of_the_export(world: World) -> None:
    paths = sorted((world.run / "samples").rglob("*.mp4"))
    assert [path.parent.name for path in paths] == ["step-00000004"] * 2
    clips = TextToVideo.from_pretrained(world.model)(["a red circle", "blue star"], seed=0)
    for path, clip in zip(paths, clips):
        coded = read_frames(encode_mp4(clip, tiny.SAMPLING.fps))
        assert np.abs(read_frames(path).astype(int) - coded.astype(int)).mean() < 0.1


def test_weights_sharded_over_ranks_train_the_same(world: World, tmp_path: Path) -> None:
    for stage in (1, 3):
        # fp32: with bf16 the linear layers that DeepSpeed has at stage 3 round the bias's sum once more.
        train_dit(run_config(tmp_path / f"stage-{stage}", world.encode.out, zero_stage=stage, dtype="fp32"))
    losses = [read_losses(tmp_path / f"stage-{stage}") for stage in (1, 3)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def read_losses(run: Path) -> list[float]:
    return [line["train/loss"] for line in read_metrics(run) if "train/loss" in line]


def test_an_encoder_is_given_where_it_was_moved_to(world: World, tmp_path: Path) -> None:
    moved = shutil.copytree(str(world.encode.text_encoder), tmp_path / "moved")
    config = follow_latents(run_config(tmp_path / "dit", world.encode.out, text_encoder=str(moved)))
    assert (config.text_encoder, config.text_max_length, config.model.text_dim) == (str(moved), MAX_LENGTH, DIM)


def test_mistakes_are_one_line_for_the_user(copied: EncodeConfig, tmp_path: Path) -> None:
    config = run_config(tmp_path / "dit", copied.out, text_encoder="nowhere", prompts=("red",))
    with pytest.raises(UserError, match="text encoder nowhere is not a folder"):
        train_dit(config)
    encode_clips(dataclasses.replace(copied, text_encoder=None))
    with pytest.raises(UserError, match="text_encoder nowhere is given, but .* run videodit encode with"):
        train_dit(config)
