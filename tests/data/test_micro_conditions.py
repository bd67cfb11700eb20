"""What encode says of how a clip was cut, and what training reads of it, from old latents too."""

import json
from pathlib import Path

import numpy as np
import torch

from tests.models.tiny import tiny_vae
from videodit.data.batches import Request
from videodit.data.buckets import Bucket
from videodit.data.clip_reader import DataConfig
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig, LatentReader
from videodit.data.latents import read_latent_sample, write_latent_sample, write_manifest
from videodit.data.loader import clips_in_order, read_latents
from videodit.data.mp4 import encode_mp4
from videodit.data.order import PADDING
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.data.transforms import fit_clip, to_model_range
from videodit.data.video_io import read_frames, read_yuv
from videodit.data.yuv import to_pixels
from videodit.generation.encode import EncodeConfig, encode_clips

BUCKET = Bucket(5, 32, 32)


def write_clip(folder: Path, height: int, width: int, frames: int, fps: float | None) -> None:
    blocks = np.random.default_rng(0).integers(0, 256, (frames, height // 8, width // 8, 3), dtype=np.uint8)
    clip = encode_mp4(blocks.repeat(8, axis=1).repeat(8, axis=2), fps or 8)
    record = {"num_frames": frames, "height": height, "width": width, "captions": ["a clip"]}
    record |= {} if fps is None else {"fps": fps}
    with ShardWriter(folder) as writer:
        writer.write("clip", {"mp4": clip, "json": json.dumps(record).encode()})


def encoded(root: Path, **data: object) -> ShardSet:
    tiny_vae().save_pretrained(root / "vae")
    config = DataConfig(shards=str(root / "clips"), buckets=["5x32x32"], **data)  # type: ignore[arg-type]
    assert encode_clips(EncodeConfig(str(root / "vae"), str(root / "latents"), config, device="cpu")) == 1
    return ShardSet.open(root / "latents")


def conditions(folder: Path, crop: LatentCropConfig | None = None, ids: tuple[int, ...] = (0,)) -> torch.Tensor:
    config = LatentDataConfig(shards=str(folder), cache_gib=0.0)
    reader = LatentReader(ShardSet.open(folder), config, 0, crop or LatentCropConfig(), (1, 1))
    (batch,) = read_latents(reader, [Request(BUCKET, (0,) * len(ids), ids, windowed=crop is not None)])
    assert batch.micro_conditions is not None
    if crop is not None:
        assert batch.origin is not None and bool(batch.origin.any())
        batch.micro_conditions[:, 2:4] -= 8.0 * batch.origin  # pixels of a latent
    return batch.micro_conditions


def test_a_wide_clip_of_24_fps_is_recorded_as_it_was_cut(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips", height=48, width=96, frames=21, fps=24.0)
    latents = encoded(tmp_path, fps=8.0, pixels="rgb")
    record = latents.read_json(0)
    # Every 3rd frame: 5 of them span 13 of 21, 4 are left on each side. 48x96 becomes 32x64, 16 columns left and right.
    expected = {"original_height": 48, "original_width": 96, "crop_top": 0, "crop_left": 16}
    assert expected.items() <= record.items()
    assert (record["first_frame"], record["stride"], record["fps"]) == (4, 3, 8.0)
    assert conditions(tmp_path / "latents").tolist() == [[48, 96, 0, 16, 8]]
    # These are the very frames and pixels that were encoded.
    frames = read_frames(ShardSet.open(tmp_path / "clips").read(0, "mp4"))
    assert np.array_equal(
        fit_clip(frames, BUCKET, None, stride=3),
        fit_clip(frames[record["first_frame"] :: record["stride"]][:5], BUCKET, None),
    )
    vae = tiny_vae()
    pixels = torch.from_numpy(fit_clip(frames[4:17:3], BUCKET, None))
    mean = vae.posterior(to_model_range(pixels[None])).mean[0]
    torch.testing.assert_close(read_latent_sample(latents, 0).mean.float(), mean, rtol=2e-3, atol=2e-3)


def test_a_tall_clip_without_a_rate(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips", height=56, width=32, frames=6, fps=None)
    record = encoded(tmp_path).read_json(0)
    assert (record["crop_top"], record["crop_left"], record["stride"]) == (12, 0, 1) and "fps" not in record
    assert conditions(tmp_path / "latents").tolist() == [[56, 32, 12, 0, 0]]


def test_the_crop_is_where_the_pixels_are(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips", height=48, width=96, frames=9, fps=8.0)
    config = DataConfig(shards=str(tmp_path / "clips"), buckets=["5x48x48"])
    (batch,) = clips_in_order(config, ShardSet.open(tmp_path / "clips"), 2, multiple=8)
    assert list(batch.cuts) == [0]  # the other row is padding
    cut, packed = batch.cuts[0], read_yuv(ShardSet.open(tmp_path / "clips").read(0, "mp4"))
    frames = to_pixels(torch.from_numpy(packed)[None])[0].numpy()
    part = frames[cut.first_frame : cut.first_frame + 5, cut.crop_top :, cut.crop_left : cut.crop_left + 48]
    assert np.array_equal(batch.pixels()[0].numpy(), part)


def test_latents_that_say_nothing_are_whole_clips_of_their_own_rate(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        meta = {"bucket": BUCKET.name, "captions": ["a clip"], "fps": 12.5}
        write_latent_sample(writer, "old", torch.zeros(4, 2, 4, 4), torch.zeros(4, 2, 4, 4), meta)
    write_manifest(tmp_path, {"buckets": [BUCKET.name]}, 1, "clips", vae="vae")
    assert conditions(tmp_path, ids=(0, PADDING)).tolist() == [[32, 32, 0, 0, 12.5], [0] * 5]


def test_a_window_is_a_crop_that_lies_further_in(tmp_path: Path) -> None:
    write_clip(tmp_path / "clips", height=48, width=96, frames=5, fps=8.0)
    encoded(tmp_path)
    windows = conditions(tmp_path / "latents", LatentCropConfig((1, 1), share=1.0))
    assert windows.tolist() == [[48, 96, 0, 16, 8]]
