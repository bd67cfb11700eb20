"""`videodit encode`: the VAE's own latents, captions that travel along, and a cache that knows when it is stale."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.models.tiny import randomize, tiny_vae
from videodit.data.captions import Captions
from videodit.data.clip_reader import DataConfig
from videodit.data.latents import read_latent_sample, read_manifest
from videodit.data.mp4 import encode_mp4
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.data.video_io import read_yuv
from videodit.data.yuv import to_model_range
from videodit.errors import UserError
from videodit.generation.encode import EncodeConfig, encode_clips
from videodit.models.vae import VideoVAE

NUM_CLIPS = 5


def write_clips(folder: Path, broken: tuple[int, ...] = (), with_txt: bool = False, noun: str = "clip") -> None:
    with ShardWriter(folder, clips_per_shard=2) as writer:
        for number in range(NUM_CLIPS):
            rng = np.random.default_rng(number)
            frames = rng.integers(0, 256, (5, 2, 2, 3), dtype=np.uint8).repeat(16, axis=1).repeat(16, axis=2)
            data = encode_mp4(frames, 8)
            record = {"num_frames": 5, "height": 32, "width": 32, "fps": 8.0, "source": f"{number}.mp4"}
            record["extra"] = {"spec": number}
            if not with_txt:
                record |= {"captions": [f"{noun} {number}", f"no {number}"], "caption_weights": [1, number + 1]}
            members = {"mp4": data[: len(data) // 3] if number in broken else data, "json": json.dumps(record).encode()}
            if with_txt:
                members["txt"] = f"text {number}".encode()
            writer.write(f"c{number}", members)


def encode_config(tmp_path: Path) -> EncodeConfig:
    """Five clips in three shards, and a VAE."""
    write_clips(tmp_path / "shards")
    tiny_vae().save_pretrained(tmp_path / "vae")
    data = DataConfig(shards=str(tmp_path / "shards"), buckets=["5x32x32"])
    return EncodeConfig(str(tmp_path / "vae"), str(tmp_path / "latents"), data, batch_size=2, device="cpu")


@pytest.fixture
def config(tmp_path: Path) -> EncodeConfig:
    return encode_config(tmp_path)


def test_latents_are_the_vaes_posterior(config: EncodeConfig) -> None:
    seen = []
    assert encode_clips(config, lambda *progress: seen.append(progress)) == NUM_CLIPS
    assert seen == [(2, 5), (4, 5), (5, 5)]
    vae = VideoVAE.from_pretrained(config.vae)
    clips, latents = ShardSet.open(config.data.shards), ShardSet.open(config.out)
    assert [entry.key for entry in latents.entries] == [entry.key for entry in clips.entries]
    for index in range(NUM_CLIPS):
        frames = torch.from_numpy(read_yuv(clips.read(index, "mp4")))
        posterior = vae.posterior(to_model_range(frames[None]))
        sample = read_latent_sample(latents, index)
        assert sample.mean.shape == (4, 2, 4, 4) and sample.mean.dtype == torch.float16
        torch.testing.assert_close(sample.mean.float(), posterior.mean[0], rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(sample.logvar.float(), posterior.logvar[0], rtol=2e-3, atol=2e-3)


def test_captions_and_facts_travel_along(config: EncodeConfig) -> None:
    encode_clips(config)
    latents = ShardSet.open(config.out)
    for index in range(NUM_CLIPS):
        captions = Captions([f"clip {index}", f"no {index}"], [1, index + 1] if index else [])
        assert latents.weighted_captions(index) == captions
        record = latents.read_json(index)
        assert (record["clip"], record["bucket"], record["fps"]) == (f"c{index}", "5x32x32", 8.0)
        assert record["extra"] == {"spec": index} and record["latent_shape"] == [4, 2, 4, 4]


def test_captions_in_text_files_travel_too(config: EncodeConfig, tmp_path: Path) -> None:
    write_clips(tmp_path / "shards", with_txt=True)
    encode_clips(config)
    assert [ShardSet.open(config.out).captions(i) for i in range(2)] == [["text 0"], ["text 1"]]


def test_a_second_call_does_nothing(config: EncodeConfig) -> None:
    encode_clips(config)
    before = {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()}
    assert encode_clips(config) == 0
    assert {path.name: path.stat().st_mtime_ns for path in Path(config.out).iterdir()} == before
    assert encode_clips(dataclasses.replace(config, batch_size=3)) == 0  # not part of what the latents are


def test_the_batch_size_does_not_change_the_latents(config: EncodeConfig, tmp_path: Path) -> None:
    other = dataclasses.replace(config, batch_size=5, out=str(tmp_path / "other"))
    encode_clips(config)
    encode_clips(other)
    for index in range(NUM_CLIPS):
        one, two = (read_latent_sample(ShardSet.open(c.out), index).mean for c in (config, other))
        torch.testing.assert_close(one, two, rtol=2e-3, atol=2e-3)


CHANGES = ["vae", "vae's config", "clips", "captions", "buckets", "fps"]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_latents_makes_them_anew(config: EncodeConfig, change: str) -> None:
    encode_clips(config)
    if change == "vae":
        randomize(tiny_vae(), 0.3).save_pretrained(config.vae)
    elif change == "vae's config":
        path = Path(config.vae) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text())))
    elif change == "captions":
        write_clips(Path(config.data.shards), noun="clap")  # of the same length: the index says nothing
    elif change == "clips":
        write_clips(Path(config.data.shards), with_txt=True)
    elif change == "buckets":
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, buckets=["5x16x32"]))
    else:
        config = dataclasses.replace(config, data=dataclasses.replace(config.data, fps=8.0))
    assert encode_clips(config) == NUM_CLIPS
    assert encode_clips(config) == 0


def test_the_manifest_says_from_what(config: EncodeConfig) -> None:
    encode_clips(config)
    manifest = read_manifest(config.out)
    assert manifest is not None
    assert (manifest["num_clips"], manifest["source"], manifest["vae"]) == (NUM_CLIPS, config.data.shards, config.vae)


def test_a_clip_that_does_not_decode_is_left_out(config: EncodeConfig) -> None:
    write_clips(Path(config.data.shards), broken=(1, 4))
    assert encode_clips(config) == 3
    assert [entry.key for entry in ShardSet.open(config.out).entries] == ["c0", "c2", "c3"]
    assert encode_clips(config) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae": "nowhere"}, "nowhere is not a model folder"),
        ({"multiple": 12}, "multiple 12 is not a multiple of the VAE's 8"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"data": DataConfig(shards="nowhere")}, "nowhere: no such folder of shards"),
    ],
)
def test_mistakes_are_one_line_for_the_user(config: EncodeConfig, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        encode_clips(dataclasses.replace(config, **changes))


def test_a_bucket_that_does_not_fit_names_the_nearest(config: EncodeConfig) -> None:
    data = dataclasses.replace(config.data, buckets=["5x20x32"])
    with pytest.raises(UserError, match="data.buckets: .*the nearest that fits is 5x16x32"):
        encode_clips(dataclasses.replace(config, data=data))


def test_an_out_that_is_a_file(config: EncodeConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        encode_clips(dataclasses.replace(config, out=str(tmp_path / "file")))


@pytest.mark.parametrize("name", ["vae", "out"])
def test_both_folders_must_be_given(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is not set: give --{name} FOLDER"):
        EncodeConfig(**{"vae": "v", "out": "o", name: ""})


@pytest.mark.parametrize("name", ["batch_size", "clips_per_shard", "text_max_length"])
def test_numbers_must_be_some(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0 is below 1: use for example"):
        EncodeConfig("v", "o", **{name: 0})
