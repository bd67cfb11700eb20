"""Clips that stay in YUV until the device: the conversion, cuts of it, and the loader that gives them."""

import io
import json
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videodit.data import yuv
from videodit.data.clip_reader import DataConfig
from videodit.data.loader import ClipLoader
from videodit.data.mp4 import encode_mp4
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.data.transforms import to_model_range
from videodit.data.video_io import read_frames, read_yuv

# BT.709-6: Y = 0.2126 R + 0.7152 G + 0.0722 B, Cb = (B - Y) / 1.8556, Cr = (R - Y) / 1.5748
FROM_RGB = np.array([[0.2126, 0.7152, 0.0722], np.array([-0.2126, -0.7152, 0.9278]) / 1.8556,
                     np.array([0.7874, -0.7152, -0.0722]) / 1.5748])  # fmt: skip


def moving_scene(height: int, width: int, frames: int) -> np.ndarray:
    """(t, h, w, 3) smooth colours that move, different in every frame."""
    y, x, t = np.meshgrid(np.linspace(0, 3, height), np.linspace(0, 3, width), np.arange(frames), indexing="ij")
    waves = [np.sin(x + 0.4 * t), np.sin(2 * y - 0.3 * t), np.cos(x + y + 0.2 * t)]
    return np.rint(127.5 + 100 * np.stack(waves, -1)).astype(np.uint8).transpose(2, 0, 1, 3)


def blocks(frames: torch.Tensor) -> torch.Tensor:
    """Means of 2x2 pixels, which have one colour in 4:2:0."""
    return torch.nn.functional.avg_pool2d(frames, 2)


def packed_noise(frames: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    shape = yuv.packed_shape(frames, height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_it_is_the_inverse_of_bt709() -> None:
    packed = packed_noise(3, 6, 10)
    luma, chroma = yuv.split(packed)
    assert np.array_equal(luma, packed[:, :6]) and np.array_equal(
        chroma[:, 0].reshape(3, -1), packed[:, 6:].reshape(3, -1)[:, :15]
    )
    wide = chroma.repeat(2, axis=2).repeat(2, axis=3)
    values = np.stack([(luma - 16.0) / 219, (wide[:, 0] - 128.0) / 224, (wide[:, 1] - 128.0) / 224], axis=-1)
    expected = np.clip(2 * (values @ np.linalg.inv(FROM_RGB).T) - 1, -1, 1).transpose(3, 0, 1, 2)
    found = yuv.to_model_range(torch.from_numpy(packed)[None])
    assert found.shape == (1, 3, 3, 6, 10) and found.dtype == torch.float32 and found.is_contiguous()
    np.testing.assert_allclose(found[0].numpy(), expected, atol=2e-6)


def test_black_is_black() -> None:
    clips = torch.from_numpy(packed_noise(10, 4, 6)).unflatten(0, (2, 5))
    yuv.fill_black(clips)
    assert clips.shape == (2, 5, 6, 6) and bool((yuv.to_model_range(clips) == -1).all())
    assert bool((yuv.to_pixels(clips) == 0).all())


def test_what_ingest_wrote_is_read_without_a_conversion() -> None:
    data = encode_mp4(moving_scene(34, 46, 40), 8)
    with av.open(io.BytesIO(data)) as container:
        coded = np.stack([frame.to_ndarray() for frame in container.decode(video=0)])  # yuv420p, packed alike
    assert np.array_equal(read_yuv(data), coded) and coded.shape == (40, 51, 46)
    assert np.array_equal(read_yuv(data, 18, 35), coded[18:35])
    with pytest.raises(ValueError, match="no range"):
        read_yuv(data, 5, 5)


def test_pixels_are_those_of_read_frames(real_clips: Path) -> None:
    """Up to the rounding of swscale, whose fast way cuts off fractions; also of what is not as shards hold it."""
    for name in ("sintel_trailer_30s.mp4", "nasa_13013_rotated.mp4"):
        frames = read_frames(real_clips / name, 0, 9)
        frames = frames[:, : frames.shape[1] // 2 * 2, : frames.shape[2] // 2 * 2]
        written = encode_mp4(frames, 8)
        found = yuv.to_pixels(torch.from_numpy(read_yuv(written))[None])[0].numpy()
        assert np.abs(found.astype(int) - read_frames(written)).max() <= 3
        direct = yuv.to_pixels(torch.from_numpy(read_yuv(real_clips / name, 0, 9))[None])[0].numpy()
        one, other = (blocks(torch.from_numpy(x).permute(0, 3, 1, 2).float()) for x in (direct, frames))
        assert (one - other).abs().mean() < 2.0  # of 255 levels


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 6), st.integers(0, 6), st.booleans())
def test_a_crop_is_one_of_the_picture(rows: int, columns: int, over: int, beside: int, drawn: bool) -> None:
    """Converted and then cut, or cut and then converted."""
    height, width = 2 * rows, 2 * columns
    packed = packed_noise(2, height + 2 * over, width + 2 * beside)
    part, (top, left) = yuv.crop(packed, height, width, np.random.default_rng(1) if drawn else None)
    assert top % 2 == left % 2 == 0 and 0 <= top <= 2 * over and 0 <= left <= 2 * beside
    if not drawn:
        assert over - top in (0, 1) and beside - left in (0, 1)
    whole = yuv.to_model_range(torch.from_numpy(packed)[None])
    cut = whole[..., top : top + height, left : left + width]
    assert torch.equal(yuv.to_model_range(torch.from_numpy(part)[None]), cut)


def test_drawn_crops_reach_every_even_place() -> None:
    packed, places = packed_noise(1, 8, 12), set()
    for seed in range(200):
        places.add(yuv.crop(packed, 4, 8, np.random.default_rng(seed))[1])
    assert places == {(top, left) for top in (0, 2, 4) for left in (0, 2, 4)}
    with pytest.raises(ValueError, match="frames of 8x12 are smaller than the bucket's 8x14"):
        yuv.crop(packed, 8, 14, None)


def test_resized_planes_are_the_resized_picture() -> None:
    scene = moving_scene(96, 160, 3)
    packed = read_yuv(encode_mp4(scene, 8, crf=1))
    for height, width, covering in (
        (48, 80, (48, 80)),
        (48, 48, (48, 80)),
        (64, 64, (64, 106)),
        (120, 200, (120, 200)),
    ):
        resized = yuv.resize_to_cover(packed, height, width)
        assert yuv.split(resized)[0].shape[1:] == covering
        found = yuv.to_model_range(torch.from_numpy(resized)[None])[0].transpose(0, 1)
        pixels = to_model_range(torch.from_numpy(scene)[None])[0].transpose(0, 1)
        expected = torch.nn.functional.interpolate(pixels, size=covering, mode="bilinear", antialias=True)
        assert (blocks(found) - blocks(expected)).abs().mean() < 0.01  # 1.3 of 255 levels
    assert yuv.resize_to_cover(packed, 96, 160) is packed
    plain = packed_noise(2, 40, 50)
    yuv.fill_black(torch.from_numpy(plain))
    assert (yuv.to_pixels(torch.from_numpy(yuv.resize_to_cover(plain, 24, 24))[None]) == 0).all()


def write_clips(folder: Path, height: int, width: int, count: int = 3) -> str:
    with ShardWriter(folder) as writer:
        for number in range(count):
            record = {"num_frames": 12, "height": height, "width": width, "fps": 8.0, "captions": ["a clip"]}
            data = encode_mp4(np.roll(moving_scene(height, width, 12), 5 * number, axis=2), 8)
            writer.write(f"c{number}", {"mp4": data, "json": json.dumps(record).encode()})
    return str(folder)


def batches_of(shards: str, bucket: str, **data: object) -> dict[tuple[int, str], torch.Tensor]:
    """(epoch, key) -> (c, t, h, w) as models see it, and the packed form checked."""
    config = DataConfig(shards=shards, buckets=[bucket], **data)  # type: ignore[arg-type]
    loader = ClipLoader(config, seed=0, global_batch_size=1, micro_batch_size=1, multiple=2)
    found = {}
    for plan, (batch,) in islice(loader.iterate(), 6):
        assert (batch.frames.ndim == 4) == (config.in_yuv and batch.bucket.frames > 1)
        found[plan.epoch, batch.keys[0]] = batch.clip()[0]
    return found


@pytest.mark.parametrize(("bucket", "size"), [("5x32x48", (32, 48)), ("5x32x32", (40, 70)), ("1x32x32", (40, 70))])
def test_the_loader_gives_what_it_gives_in_rgb(tmp_path: Path, bucket: str, size: tuple[int, int]) -> None:
    shards = write_clips(tmp_path, *size)
    one, other = (batches_of(shards, bucket, random_crop=False, pixels=pixels) for pixels in ("yuv", "rgb"))
    assert len(one) == 6 and one.keys() == other.keys()
    for place, clip in one.items():
        assert clip.shape == other[place].shape
        assert (blocks(clip) - blocks(other[place])).abs().mean() < 0.02 and clip.std() > 0.2


@pytest.mark.parametrize("bucket", ["5x32x32", "1x32x32"])
def test_the_cache_and_workers_change_nothing(tmp_path: Path, bucket: str) -> None:
    shards = write_clips(tmp_path, 40, 70)
    one = batches_of(shards, bucket)
    for other in (batches_of(shards, bucket, cache_decoded=False), batches_of(shards, bucket, num_workers=1)):
        assert one.keys() == other.keys() and all(torch.equal(one[place], other[place]) for place in one)


def test_the_window_is_the_one_of_the_clip(tmp_path: Path) -> None:
    """Nothing to resize and nothing to cut: the frames are the clip's own, bit for bit."""
    shards = ShardSet.open(write_clips(tmp_path, 32, 48))
    config = DataConfig(shards=str(tmp_path), buckets=["5x32x48"], fps=4.0, cache_decoded=False)
    loader = ClipLoader(config, seed=0, global_batch_size=1, micro_batch_size=1, multiple=2)
    for _, (batch,) in islice(loader.iterate(), 6):
        whole, cut = read_yuv(shards.read(batch.ids[0], "mp4")), batch.cuts[0]
        assert cut.stride == 2 and (cut.original_height, cut.original_width) == (32, 48)
        assert np.array_equal(batch.frames[0].numpy(), whole[cut.first_frame : cut.first_frame + 9 : 2])
