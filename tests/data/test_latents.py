import json

import pytest
import torch

from videodit.data import latents
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.errors import UserError

FINGERPRINT = {"vae": "ab" * 32, "clips": "cd" * 32, "buckets": ("17x64x64",), "transform": {"crop": "centre"}}


def write_cache(folder, count=3):
    torch.manual_seed(0)
    pairs = [(torch.randn(4, 2, 3, 5), torch.randn(4, 2, 3, 5)) for _ in range(count)]
    with ShardWriter(folder, clips_per_shard=2) as writer:
        for number, (mean, logvar) in enumerate(pairs):
            meta = {"bucket": "5x24x40", "captions": [f"clip {number}", "a clip"], "source_key": f"c{number}"}
            latents.write_latent_sample(writer, f"c{number}", mean, logvar, meta)
    latents.write_manifest(folder, FINGERPRINT, count, "clips", vae="vae")
    return pairs


def test_round_trip_in_fp16(tmp_path):
    pairs = write_cache(tmp_path)
    shards = ShardSet.open(tmp_path)
    for index, (mean, logvar) in enumerate(pairs):
        sample = latents.read_latent_sample(shards, index)
        assert torch.equal(sample.mean, mean.half()) and torch.equal(sample.logvar, logvar.half())
        assert shards.captions(index) == [f"clip {index}", "a clip"]
        assert shards.read_json(index)["latent_shape"] == [4, 2, 3, 5]
        assert shards.entries[index].meta["bucket"] == "5x24x40"


def test_same_latents_same_bytes(tmp_path):
    write_cache(tmp_path / "a")
    write_cache(tmp_path / "b")
    names = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir())
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


@pytest.mark.parametrize(
    ("mean", "logvar", "meta", "message"),
    [
        (torch.zeros(4, 1, 2, 2), torch.zeros(4, 2, 2, 2), {"bucket": "1x16x16"}, "must both be"),
        (torch.zeros(1, 4, 1, 2, 2), torch.zeros(1, 4, 1, 2, 2), {"bucket": "1x16x16"}, "must both be"),
        (torch.zeros(4, 1, 2, 2), torch.zeros(4, 1, 2, 2), {}, "bucket"),
        (torch.full((4, 1, 2, 2), 1e5), torch.zeros(4, 1, 2, 2), {"bucket": "1x16x16"}, "mean of k is not finite"),
        (torch.zeros(4, 1, 2, 2), torch.full((4, 1, 2, 2), torch.nan), {"bucket": "1x16x16"}, "logvar of k"),
    ],
)
def test_latents_that_cannot_be_kept_are_refused(tmp_path, mean, logvar, meta, message):
    with pytest.raises(ValueError, match=message):
        latents.write_latent_sample(ShardWriter(tmp_path), "k", mean, logvar, meta)


def test_damaged_tensors_are_a_value_error(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.write("a", {"safetensors": b"\xff" * 64, "json": b"{}"})
    with pytest.raises(ValueError, match="damaged latents"):
        latents.read_latent_sample(ShardSet.open(tmp_path), 0)


def test_cache_is_valid_only_for_its_own_fingerprint(tmp_path):
    assert not latents.cache_is_valid(tmp_path / "missing", FINGERPRINT)
    write_cache(tmp_path)
    assert latents.cache_is_valid(tmp_path, FINGERPRINT)
    assert not latents.cache_is_valid(tmp_path, {**FINGERPRINT, "vae": "00" * 32})
    assert not latents.cache_is_valid(tmp_path, {"vae": FINGERPRINT["vae"]})


@pytest.mark.parametrize("fault", ["manifest", "half a manifest", "shard", "short shard", "fewer clips", "invalidated"])
def test_a_damaged_cache_is_not_valid(tmp_path, fault):
    write_cache(tmp_path)
    manifest, shard = tmp_path / latents.MANIFEST, tmp_path / "shard-000001.tar"
    if fault == "manifest":
        manifest.unlink()
    elif fault == "half a manifest":
        manifest.write_text(manifest.read_text()[:40])
    elif fault == "shard":
        shard.unlink()
    elif fault == "short shard":
        shard.write_bytes(shard.read_bytes()[:700])
    elif fault == "fewer clips":
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "num_clips": 4}))
    else:
        latents.invalidate(tmp_path)
    assert not latents.cache_is_valid(tmp_path, FINGERPRINT)


def test_manifest_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="not a folder"):
        latents.write_manifest(tmp_path / "file", FINGERPRINT, 1, "clips", vae="vae")


def test_keys_fit_a_shard(tmp_path):
    awkward = ["plain", "folder/clip", "folder_clip.v2", "x" * 200, "y" + "x" * 199, "ein Käfer", "."]
    keys = [latents.latent_key(key) for key in awkward]
    assert keys[0] == "plain" and len(set(keys)) == len(keys)
    with ShardWriter(tmp_path) as writer:
        for key in keys:
            writer.write(key, {"json": b"{}"})
