"""av and decord give the same frames of clips that ingest wrote."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests import tiny
from videodit.data.clip_reader import DataConfig
from videodit.data.frame_reader import frame_reader
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.loader import ClipLoader
from videodit.data.shards import ShardSet
from videodit.data.video_io import VideoError, read_frames

decord = pytest.importorskip("decord", reason="decord has no wheel for this platform")
read = frame_reader("decord")


def test_every_range_of_real_clips_is_the_same(real_clips: Path, tmp_path: Path) -> None:
    """Among their sources are a rotated one, 10 bits, VP9 and AV1, MPEG-4 and a variable frame rate."""
    ingest(real_clips, tmp_path / "shards", IngestConfig(min_frames=17, max_short_side=128, workers=1))
    shards = ShardSet.open(tmp_path / "shards")
    assert len({entry.meta["source"] for entry in shards.entries}) >= 5
    rng = np.random.default_rng(0)
    for index, entry in enumerate(shards.entries):
        data, count = shards.read(index, "mp4"), entry.meta["num_frames"]
        np.testing.assert_array_equal(read(data), read_frames(data), entry.key)
        for start in (0, 15, 16, *rng.integers(0, count - 1, 3)):
            stop = min(count, int(start) + 17)
            np.testing.assert_array_equal(read(data, start, stop), read_frames(data, start, stop), entry.key)


def test_the_loader_gives_the_same_batches(tmp_path: Path) -> None:
    folder = tiny.make_shards(tmp_path)
    batches = []
    for name in ("av", "decord"):
        config = DataConfig(
            shards=str(folder), buckets=["5x32x32"], reader=name, pixels="rgb", cache_decoded=False, num_workers=1
        )
        loader = ClipLoader(config, seed=0, global_batch_size=4, micro_batch_size=4)
        batches.append([batch.clip() for _, (batch,) in islice(loader.iterate(), 4)])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other) and one.std() > 0.1


def test_what_does_not_decode_is_a_video_error(tmp_path: Path) -> None:
    shards = ShardSet.open(tiny.make_shards(tmp_path, num_clips=1))
    data = shards.read(0, "mp4")
    for start, stop in ((0, tiny.FRAMES + 1), (tiny.FRAMES, None)):
        with pytest.raises(VideoError, match=f"ends after {tiny.FRAMES} frames"):
            read(data, start, stop)
    for damaged in (b"", b"no video at all", data[: len(data) // 2]):
        with pytest.raises(VideoError, match="decord does not read it"):
            read(damaged)


def test_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="data.reader 'opencv' is not one of av, decord"):
        DataConfig(reader="opencv")
