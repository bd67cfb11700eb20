"""Fields: arrays of any channels are checked, cut and read back as they were; what is no field is one reason."""

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from videodit.data.batches import Request
from videodit.data.buckets import Bucket
from videodit.data.channel_statistics import ChannelMoments, ChannelStatistics
from videodit.data.clip_reader import ClipReader, DataConfig, measured_statistics
from videodit.data.field import preview
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.ingest_record import read_record, read_rejects, read_statistics
from videodit.data.loader import ClipLoader, clips_in_order
from videodit.data.mp4 import encode_mp4
from videodit.data.shard_writer import rewrite_index
from videodit.data.shards import ShardSet, sha256_hex
from videodit.errors import UserError

ONE = IngestConfig(workers=1, min_frames=5, max_duration_s=4.0)


def values(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(5, 2, shape)


def places(t: int, h: int, w: int) -> np.ndarray:
    """(t, h, w, 3): each value says where it lies."""
    return np.stack(np.meshgrid(np.arange(t), np.arange(h), np.arange(w), indexing="ij"), axis=-1)


def saved(folder: Path, **arrays: np.ndarray) -> Path:
    folder.mkdir(exist_ok=True)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


def ingested(tmp_path: Path, **arrays: np.ndarray) -> ShardSet:
    ingest(saved(tmp_path / "in", **arrays), tmp_path / "out", replace(ONE, max_duration_s=100))
    return ShardSet.open(tmp_path / "out")


def stored(shards: ShardSet, i: int) -> np.ndarray:
    return np.load(io.BytesIO(shards.read(i, "npy")), allow_pickle=False)


def data(shards: ShardSet, *buckets: str, **options: object) -> DataConfig:
    return DataConfig(shards=str(shards.root), buckets=list(buckets), **options)


# ---- ingest


def test_a_field_is_cut_by_its_frame_rate_and_kept_as_it_is(tmp_path: Path) -> None:
    field = values(0, 30, 6, 7, 2)
    saved(tmp_path / "in", a=field)
    (tmp_path / "in" / "a.json").write_text(json.dumps({"caption": "a storm", "fps": 3, "place": "sea"}))
    result = ingest(tmp_path / "in", tmp_path / "out", replace(ONE, max_duration_s=13 / 3))
    assert (result.accepted, result.rejected, result.clips) == (1, 0, 2)
    shards = ShardSet.open(tmp_path / "out")
    assert [entry.key for entry in shards.entries] == ["a-0000", "a-0001"]
    for i, start in enumerate((0, 13)):
        record = shards.read_json(i)
        assert stored(shards, i).dtype == np.float32
        assert np.array_equal(stored(shards, i), field[start : start + 13].astype(np.float32))
        assert record.pop("sha256") == sha256_hex(shards.read(i, "npy"))
        assert record.pop("start_s") == pytest.approx(start / 3, abs=1e-6)
        assert record.pop("end_s") == pytest.approx((start + 13) / 3, abs=1e-6)
        assert record == {
            "caption": "a storm", "source": "a.npy", "num_frames": 13, "height": 6, "width": 7, "channels": 2,
            "fps": 3.0, "extra": {"fps": 3, "place": "sea"},
        }  # fmt: skip
    (reject,) = read_rejects(tmp_path / "out")
    assert reject["reason"] == "4 frames, shorter than min_frames 5" and reject["end_s"] == 10


@pytest.mark.parametrize(
    "array",
    [
        values(1, 15, 6, 7, 1).astype(np.float16),
        values(1, 15, 6, 7, 3).astype(">f8"),
        values(1, 15, 6, 7).astype(np.int16),
        np.asfortranarray(values(1, 15, 6, 7, 4).astype(np.float32)),
        np.asfortranarray(values(1, 15, 6, 7)),
    ],
)
def test_every_number_and_layout_arrives(tmp_path: Path, array: np.ndarray) -> None:
    ingest(saved(tmp_path / "in", a=array), tmp_path / "out", ONE)  # at 1 frame a second: clips of min_frames
    shards = ShardSet.open(tmp_path / "out")
    found = [stored(shards, i) for i in range(len(shards))]
    assert [clip.shape[0] for clip in found] == [5, 5, 5] and all(clip.flags.c_contiguous for clip in found)
    assert np.array_equal(np.concatenate(found), array.reshape(15, 6, 7, -1).astype(np.float32))


def test_statistics_are_those_of_all_clips_at_any_number_of_workers(tmp_path: Path) -> None:
    """Also where the mean is large: a sum of squares would lose all digits of the spread."""
    arrays = {f"f{i}": values(i, 5 + i, 4, 4, 2) * (1, 1e-3) + (0, 1e3 * i) for i in range(4)}
    saved(tmp_path / "in", **arrays)
    for workers in (1, 2):
        ingest(tmp_path / "in", tmp_path / f"out{workers}", replace(ONE, workers=workers, max_duration_s=100))
    everything = np.concatenate([array.astype(np.float32).reshape(-1, 2) for array in arrays.values()])
    statistics = read_statistics(tmp_path / "out1")
    assert statistics == read_statistics(tmp_path / "out2")
    np.testing.assert_allclose(statistics.mean, everything.mean(axis=0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(statistics.std, everything.std(axis=0, dtype=np.float64), rtol=1e-10)
    assert (tmp_path / "out1/shard-000000.tar").read_bytes() == (tmp_path / "out2/shard-000000.tar").read_bytes()


def test_what_is_no_field_is_a_line_of_rejects(tmp_path: Path) -> None:
    good = values(0, 5, 4, 4, 2)
    broken = {"nan": np.nan, "inf": -np.inf, "huge": 1e39}
    arrays = {name: np.where(places(5, 4, 4)[..., :1] == 3, value, good) for name, value in broken.items()}
    arrays |= {"flat": good[0, 0], "many": good[None], "none": good[:0], "complex": good + 1j, "words": np.full(3, "a")}
    folder = saved(tmp_path / "in", a_good=good, short=good[:4], other=good[..., :1], rate=good, **arrays)
    (folder / "rate.json").write_text('{"fps": "fast"}')
    np.save(folder / "pickle.npy", np.array([{"a": 1}, None]), allow_pickle=True)
    np.savez(folder / "zip.npz", good)
    (folder / "zip.npz").rename(folder / "zip.npy")
    (folder / "text.npy").write_text("0 1 2 3")
    (folder / "empty.npy").write_bytes(b"")
    (folder / "cut.npy").write_bytes((folder / "a_good.npy").read_bytes()[:-9])
    result = ingest(folder, tmp_path / "out", ONE)
    assert (result.accepted, result.clips) == (1, 1)
    found = {Path(reject["source"]).stem: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    wanted = {
        "nan": "frame 3 has values that are not finite", "inf": "frame 3 has values that are not finite",
        "huge": "not finite in float32", "flat": "shape (4, 2): (t, h, w)", "many": "shape (1, 5, 4, 4, 2)",
        "none": "shape (0, 4, 4, 2)", "complex": "dtype complex128", "words": "dtype <U1",
        "short": "4 frames, shorter than min_frames 5", "other": "1 channels, but a_good.npy has 2",
        "rate": "fps 'fast' in its .json", "pickle": "dtype object",
        "zip": "cannot be read as an array",
        "text": "cannot be read as an array", "empty": "cannot be read as an array",
        "cut": "cut short: 1271 bytes of values for float64 (5, 4, 4, 2)",
    }  # fmt: skip
    assert found.keys() == wanted.keys() and result.rejected == len(wanted)
    assert not [(name, found[name]) for name, words in wanted.items() if words not in found[name]]
    assert not any("\n" in reason for reason in found.values())
    np.testing.assert_allclose(read_statistics(tmp_path / "out").mean, good.mean(axis=(0, 1, 2)), rtol=1e-6)


def test_files_larger_than_memory_are_mapped_in_parts(tmp_path: Path) -> None:
    """Refused for the first value, not for the size: 6 GB, of which the disk has a page, in 3 GB of address space.

    Where a frame is spread over the whole file, it has to be mapped as a whole.
    """
    (tmp_path / "in").mkdir()
    shape = (1500, 1000, 1000, 1)
    for name, by_columns in (("frames", False), ("columns", True)):
        big = np.lib.format.open_memmap(tmp_path / "in" / f"{name}.npy", "w+", np.float32, shape, by_columns)
        big[0, 0, 0, 0] = np.nan
        del big
    with pytest.raises(UserError, match="none of the 2 videos"):
        ingest(tmp_path / "in", tmp_path / "out", replace(ONE, max_memory_gb=3))
    found = {reject["source"]: reject["reason"] for reject in read_rejects(tmp_path / "out")}
    assert found["frames.npy"] == "frame 0 has values that are not finite in float32"
    assert "cannot be mapped" in found["columns.npy"] and "ascontiguousarray" in found["columns.npy"]
    for path in (tmp_path / "in").iterdir():
        path.unlink()


def test_fields_of_a_tar_and_arrays_that_belong_to_a_video(tmp_path: Path) -> None:
    video = encode_mp4(np.random.default_rng(0).integers(0, 255, (17, 32, 32, 3), np.uint8), 8)
    array = io.BytesIO()
    np.save(array, values(0, 5, 4, 4, 2))
    members = {"a.mp4": video, "a.npy": array.getvalue(), "b.npy": array.getvalue(), "b.txt": b"a field"}
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "0.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for name in ("c.mp4", "c.npy"):
        (tmp_path / "in" / name).write_bytes(members[name.replace("c", "a")])
    ingest(tmp_path / "in", tmp_path / "out", ONE)
    shards = ShardSet.open(tmp_path / "out")
    kinds = {entry.meta["source"]: "npy" in entry.members for entry in shards.entries}
    assert kinds == {"0.tar/a.mp4": False, "0.tar/b.npy": True, "c.mp4": False}
    assert "channels" not in shards.entries[0].meta and shards.captions(1) == ["a field"]
    with pytest.raises(UserError, match="a video.*2 channels.*separate folders"):
        measured_statistics(shards)
    only = [replace(entry, dropped="" if kinds[entry.meta["source"]] else "a test") for entry in shards.entries]
    rewrite_index(shards.root, only)  # as filters would
    assert measured_statistics(ShardSet.open(shards.root)) == read_statistics(shards.root)
    (shards.root / "ingest.json").unlink()
    with pytest.raises(UserError, match="no statistics of its channels"):
        measured_statistics(ShardSet.open(shards.root))


def test_videos_have_no_statistics(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(encode_mp4(np.random.default_rng(0).integers(0, 255, (17, 32, 32, 3), "u1"), 8))
    ingest(tmp_path / "a.mp4", tmp_path / "out", ONE)
    assert "channels" not in read_record(tmp_path / "out")
    assert measured_statistics(ShardSet.open(tmp_path / "out")) is None


# ---- statistics


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=6), min_size=1, max_size=6),
    st.sampled_from([0.0, 1e6]),
)
def test_moments_of_parts_add_up(parts: list[list[float]], offset: float) -> None:
    arrays = [np.array(part)[:, None] + offset for part in parts]
    total = ChannelMoments.of(arrays[0])
    for array in arrays[1:]:
        total = total + ChannelMoments.of(array)
    whole = np.concatenate(arrays)
    assert total.count == len(whole)
    np.testing.assert_allclose(total.mean, whole.mean(axis=0), rtol=1e-12, atol=1e-9)
    np.testing.assert_allclose(total.squares / total.count, whole.var(axis=0), rtol=1e-6, atol=1e-6)


def test_models_see_thirds_of_standard_deviations_and_the_way_back_is_the_same() -> None:
    field = values(0, 3, 4, 5, 2).astype(np.float32) * (1, 1e-6) + np.array((0, 7), np.float32)
    field = np.concatenate([field, np.full_like(field[..., :1], 0.1)], axis=-1).astype(np.float32)  # one is constant
    statistics = ChannelStatistics.from_moments(ChannelMoments.of(field))
    assert statistics.std[2] == 0
    seen = statistics.standardise(field)
    assert seen.dtype == np.float32 and np.abs(seen[..., 2]).max() < 1e-6
    np.testing.assert_allclose(seen[..., 0].std(), 1 / 3, rtol=1e-5)
    back = statistics.restore(torch.from_numpy(seen).permute(3, 0, 1, 2)[None])[0].numpy()
    np.testing.assert_allclose(back, field, rtol=1e-6, atol=1e-6)
    noisy = statistics.restore(torch.randn(1, 3, 3, 4, 5))
    assert bool((noisy[..., 2] == np.float32(0.1)).all())


# ---- reading


@pytest.mark.parametrize("workers", [0, 2])
def test_windows_and_crops_are_parts_of_the_field(tmp_path: Path, workers: int) -> None:
    shards = ingested(tmp_path, a=places(40, 21, 19), b=places(12, 16, 24))
    statistics = read_statistics(shards.root)
    config = data(shards, "5x8x16", fps=0.5, num_workers=workers)  # every second frame
    loader = ClipLoader(config, seed=0, global_batch_size=2, micro_batch_size=2, multiple=8, statistics=statistics)
    steps, corners = loader.iterate(), set()
    for _ in range(6):
        (batch,) = next(steps)[1]
        assert batch.weight.tolist() == [1, 1] and batch.frames.dtype == torch.float32
        found = np.rint(statistics.restore(batch.clip()).numpy()).astype(int)  # b t h w c
        for clip in found:
            corner = clip[0, 0, 0]
            assert np.array_equal(clip - corner, places(5, 8, 16) * (2, 1, 1))
            corners.add(tuple(corner))
    assert len(corners) > 6  # drawn anew
    middle = next(clips_in_order(config, shards, 2, multiple=8, statistics=statistics))
    first = np.rint(statistics.restore(middle.clip()).numpy()).astype(int)[:, 0, 0, 0]
    assert sorted(map(tuple, first)) == [(1, 4, 4), (15, 6, 1)]


def test_fields_are_never_enlarged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shards = ingested(tmp_path, a=values(0, 9, 16, 16, 1), b=values(1, 9, 40, 40, 1))
    statistics = read_statistics(shards.root)

    def grouped(*buckets: str) -> dict[str, list[int]]:
        grouping = ClipReader(shards, data(shards, *buckets), 0, False, statistics).group(8)
        return {bucket.name: members for bucket, members in grouping.members.items()}

    assert grouped("9x32x32", "9x16x8") == {"9x32x32": [1], "9x16x8": [0]}
    assert grouped("9x32x32") == {"9x32x32": [1]} and "1 of 2 clips are shorter or smaller" in caplog.text
    with pytest.raises(UserError, match="a field of 40x40 is smaller than data.buckets 9x48x48"):
        grouped("9x48x48")
    with pytest.raises(UserError, match="the longest clip has 9 frames"):
        grouped("13x16x16")


def test_a_model_is_for_one_kind_of_clip(tmp_path: Path) -> None:
    shards = ingested(tmp_path, a=values(0, 5, 8, 8, 4))
    config = data(shards, "5x8x8")
    with pytest.raises(UserError, match="holds fields of 4 channels, the model reads videos"):
        ClipReader(shards, config, 0, False)
    with pytest.raises(UserError, match="holds fields of 4 channels, the model reads fields of 2 channels"):
        ClipReader(shards, config, 0, False, ChannelStatistics((0, 0), (1, 1)))


def test_an_array_that_is_not_what_the_index_says_is_left_out(tmp_path: Path) -> None:
    shards = ingested(tmp_path, a=values(0, 5, 8, 8, 2), b=values(1, 5, 8, 8, 2))
    wrong = replace(shards.entries[0], meta=shards.entries[0].meta | {"num_frames": 6})
    rewrite_index(shards.root, [wrong, shards.entries[1]])
    shards = ShardSet.open(shards.root)
    reader = ClipReader(shards, data(shards, "5x8x8"), 0, False, read_statistics(shards.root))
    rows = reader[Request(Bucket(5, 8, 8), (0, 0), (0, 1))]
    assert rows.failures == {0: "an array of float32 (5, 8, 8, 2), the index says float32 (6, 8, 8, 2)"}
    assert not rows.tensors["clip"][0].any() and rows.tensors["clip"][1].any()


# ---- looking at them


def test_previews() -> None:
    field = np.linspace(-5, 5, 4 * 8 * 8).reshape(4, 8, 8, 1)
    grey = preview(field)
    assert grey.shape == (4, 8, 8, 3) and grey.dtype == np.uint8
    assert (grey[..., 0] == grey[..., 1]).all() and (grey[..., 0] == grey[..., 2]).all()
    shown = grey[..., 0].ravel().astype(int)
    assert (np.diff(shown) >= 0).all() and not shown[:2].any() and (shown[-2:] == 255).all()
    assert 126 <= shown[128] <= 129
    two = preview(np.concatenate([field, -1e6 * field], axis=-1))
    assert (two[..., 0] == grey[..., 0]).all() and not two[..., 2].any()
    assert np.abs(two[..., 1].astype(int) + grey[..., 0] - 255).max() <= 1
    five = preview(np.concatenate([field] * 3 + [np.full_like(field, 9)] * 2, axis=-1))
    assert np.array_equal(five, grey) and not preview(np.full((1, 2, 2, 1), 3.0)).any()
    assert preview(grey) is grey
