import json
import os
import signal
import subprocess
import sys
from collections import deque
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from videodit.data.batches import Request, read_all
from videodit.data.buckets import Bucket
from videodit.data.clip_reader import ClipReader, DataConfig
from videodit.data.latent_crop import LatentCropConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import write_latent_sample
from videodit.data.loader import ClipLoader, LatentLoader, clips_in_order
from videodit.data.mp4 import encode_mp4
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import ShardSet
from videodit.data.transforms import fit_clip
from videodit.data.video_io import read_frames, read_yuv
from videodit.errors import UserError

NUM_CLIPS = 11
ROOT = Path(__file__).parents[2]


def clip_frames(number: int, frames: int = 7) -> np.ndarray:
    rng = np.random.default_rng(number)
    coarse = rng.integers(0, 256, (frames, 5, 6, 3), dtype=np.uint8)
    return coarse.repeat(8, axis=1).repeat(8, axis=2)  # (t, 40, 48, 3)


def write_clips(folder, numbers=range(NUM_CLIPS), broken=(), frames=7):
    with ShardWriter(folder, clips_per_shard=4) as writer:
        for number in numbers:
            data = encode_mp4(clip_frames(number, frames), 8)
            if number in broken:
                data = data[: len(data) // 3]
            record = {"num_frames": frames, "height": 40, "width": 48, "fps": 8.0}
            record["captions"] = [f"clip {number}", f"number {number}", f"the clip {number}"]
            writer.write(f"c{number:03d}", {"mp4": data, "json": json.dumps(record).encode()})


def write_latents(folder, count=NUM_CLIPS):
    with ShardWriter(folder, clips_per_shard=4) as writer:
        for number in range(count):
            shape = (4, 2, 4, 4) if number % 3 else (4, 1, 2, 8)
            meta = {"bucket": "5x32x32" if number % 3 else "1x16x64", "captions": [f"clip {number}"]}
            write_latent_sample(writer, f"c{number:03d}", torch.full(shape, number / 8), torch.zeros(shape), meta)


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_clips(folder)
    return str(folder)


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    write_latents(folder)
    return str(folder)


def clip_loader(folder, rank=0, world=1, micro_batch_size=2, global_batch_size=4, **config):
    config = DataConfig(shards=folder, **{"buckets": ["5x32x32"], **config})
    return ClipLoader(
        config,
        seed=3,
        global_batch_size=global_batch_size,
        micro_batch_size=micro_batch_size,
        rank=rank,
        world=world,
    )


def samples_of(loaders, steps, start_step=1):
    """(step, key) -> (pixels' bytes, caption) and the keys of each step, over all ranks."""
    samples, orders = {}, []
    for loader in loaders:
        for plan, batches in islice(loader.iterate(start_step), steps):
            orders.append((plan.step, tuple(loader.keys(plan))))
            for batch in batches:
                data = batch.frames if hasattr(batch, "frames") else batch.mean
                for row, key in enumerate(batch.keys):
                    if key:
                        assert batch.weight[row] == 1 and (plan.step, key) not in samples
                        samples[plan.step, key] = data[row].numpy().tobytes(), batch.captions[row]
                    else:
                        assert batch.weight[row] == 0 and batch.ids[row] == -1
    return samples, sorted(set(orders))


def test_samples_and_digests_are_the_same_for_any_ranks_workers_and_cache(clips):
    reference = samples_of([clip_loader(clips)], steps=6)
    assert len(reference[0]) == 2 * NUM_CLIPS  # two epochs of 4 + 4 + 3
    variants = [
        [clip_loader(clips, rank, 3) for rank in range(3)],
        [clip_loader(clips, rank, 2, micro_batch_size=1) for rank in range(2)],
        [clip_loader(clips, micro_batch_size=3, cache_decoded=False)],
        [clip_loader(clips, num_workers=2)],
        [clip_loader(clips, num_workers=1, cache_decoded=False, prefetch=1)],
    ]
    for loaders in variants:
        assert samples_of(loaders, steps=6) == reference


def test_resume_at_any_step_is_the_uninterrupted_run(clips):
    loader = clip_loader(clips)
    everything, _ = samples_of([loader], steps=7)
    for start in (1, 3, 4, 7):
        rest, _ = samples_of([clip_loader(clips)], steps=8 - start, start_step=start)
        assert rest == {key: value for key, value in everything.items() if key[0] >= start}


def test_batches_hold_what_fit_clip_makes_and_epochs_differ(clips):
    loader = clip_loader(clips)
    shards = ShardSet.open(clips)
    seen = {}
    for plan, batches in islice(loader.iterate(), 2 * loader.steps_per_epoch):
        for batch in batches:
            assert batch.clip().shape == (2, 3, 5, 32, 32) and batch.bucket == (5, 32, 32)
            assert batch.epochs == [plan.epoch] * 2 and batch.wait_s >= 0
            for row, (index, key) in enumerate(zip(batch.ids, batch.keys, strict=True)):
                if key:
                    assert shards.entries[index].key == key
                    assert batch.captions[row] in shards.captions(index)
                    seen.setdefault(key, []).append((batch.frames[row], batch.captions[row]))
    assert len(seen) == NUM_CLIPS and all(len(epochs) == 2 for epochs in seen.values())
    assert any(not torch.equal(first[0], second[0]) for first, second in seen.values())
    assert any(first[1] != second[1] for first, second in seen.values())


def test_another_seed_cuts_the_clips_otherwise(clips):
    first, other = (
        ClipReader(ShardSet.open(clips), DataConfig(shards=clips, buckets=["5x32x32"]), seed, random_crop=True)
        for seed in (3, 4)
    )
    request = Request(Bucket(5, 32, 32), (0,) * NUM_CLIPS, tuple(range(NUM_CLIPS)))
    assert first[request].cuts == first[request].cuts != other[request].cuts


def test_without_random_crop_it_is_the_middle(clips):
    shards = ShardSet.open(clips)
    for _, batches in islice(clip_loader(clips, random_crop=False, pixels="rgb").iterate(), 2):
        for batch in batches:
            for row, index in enumerate(batch.ids):
                middle = fit_clip(read_frames(shards.read(index, "mp4")), Bucket(5, 32, 32), None)
                assert np.array_equal(batch.frames[row].numpy(), middle)


def test_fps_takes_every_second_frame(clips):
    (_, batches), *_ = islice(clip_loader(clips, buckets=["1x32x32"], fps=4.0).iterate(), 1)
    assert batches[0].clip().shape[2] == 1
    with pytest.raises(UserError, match="longest clip has 4 frames, data.buckets 5x32x32 want more"):
        clip_loader(clips, fps=4.0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_clip_is_a_row_of_weight_0_and_named(tmp_path, caplog, num_workers):
    write_clips(tmp_path, broken={5})
    loader = clip_loader(str(tmp_path), num_workers=num_workers)
    rows = [
        (key, batch.weight[row].item(), batch.clip()[row])
        for _, batches in islice(loader.iterate(), 3)
        for batch in batches
        for row, key in enumerate(batch.keys)
    ]
    assert sorted(key for key, weight, _ in rows if weight) == [f"c{n:03d}" for n in range(NUM_CLIPS) if n != 5]
    (broken,) = [clip for key, weight, clip in rows if key == "c005"]
    assert (broken == -1).all()
    assert loader.failures == 1 and "c005" in caplog.text


def test_a_hundred_failures_in_a_row_are_fatal_but_not_fewer(tmp_path):
    write_clips(tmp_path, numbers=[0])
    good = ShardSet.open(tmp_path).read(0, "mp4")
    record = json.dumps({"num_frames": 7, "height": 40, "width": 48, "fps": 8.0, "caption": "x"}).encode()
    for name, sound in (("all", ()), ("some", range(0, 300, 20))):
        with ShardWriter(tmp_path / name) as writer:
            for number in range(120):
                writer.write(f"c{number}", {"mp4": good if number in sound else b"no video", "json": record})
    loader = clip_loader(str(tmp_path / "all"), global_batch_size=10, cache_decoded=False)
    steps = loader.iterate()
    for _ in range(9):
        next(steps)
    with pytest.raises(UserError, match="100 samples in a row .* check the disk") as caught:
        next(steps)
    assert "\n" not in str(caught.value)
    assert loader.failures == 100
    some = clip_loader(str(tmp_path / "some"), global_batch_size=10, cache_decoded=False)
    for _ in islice(some.iterate(), 12):
        pass
    assert some.failures == 120 - 6


def test_too_short_clips_are_left_out_and_counted(tmp_path):
    with ShardWriter(tmp_path) as writer:
        for number, frames in enumerate([3, 7, 7, 4]):
            record = {"num_frames": frames, "height": 40, "width": 48, "fps": 8.0, "caption": "x"}
            data = encode_mp4(clip_frames(number, frames), 8)
            writer.write(f"c{number}", {"mp4": data, "json": json.dumps(record).encode()})
    loader = clip_loader(str(tmp_path), global_batch_size=2)
    assert loader.num_dropped == 2 and loader.num_clips == 2
    assert {clip for _, batches in islice(loader.iterate(), 1) for batch in batches for clip in batch.ids} == {1, 2}


def test_a_picture_is_a_clip_of_one_frame(tmp_path):
    picture = clip_frames(0)[0]
    Image.fromarray(picture).save(tmp_path / "picture.png")
    with ShardWriter(tmp_path / "shards") as writer:
        record = {"num_frames": 1, "height": 40, "width": 48, "caption": "a picture"}
        members = {"png": (tmp_path / "picture.png").read_bytes(), "json": json.dumps(record).encode()}
        writer.write("a", members)
    loader = clip_loader(
        str(tmp_path / "shards"), buckets=["1x32x48"], global_batch_size=1, micro_batch_size=1, random_crop=False
    )
    _, (batch,) = next(loader.iterate())
    assert np.array_equal(batch.frames[0, 0].numpy(), fit_clip(picture[None], Bucket(1, 32, 48), None)[0])


@pytest.mark.parametrize(("world", "num_workers"), [(1, 0), (3, 0), (1, 1)])
def test_in_order_every_clip_once_from_the_middle(clips, world, num_workers):
    shards = ShardSet.open(clips)
    config = DataConfig(shards=clips, buckets=["5x32x32"], num_workers=num_workers, pixels="rgb")
    batches = [batch for rank in range(world) for batch in clips_in_order(config, shards, 4, rank=rank, world=world)]
    assert [batch.clip().shape[0] for batch in batches] == [4, 4, 4]
    rows = {index: batch.frames[row] for batch in batches for row, index in enumerate(batch.ids) if index != -1}
    assert sorted(rows) == list(range(NUM_CLIPS))
    middle = fit_clip(read_frames(shards.read(6, "mp4")), Bucket(5, 32, 32), None)
    assert np.array_equal(rows[6].numpy(), middle)


class AskWorker:
    """Sends each worker the signals of a launcher that ends the job, and has it answer afterwards."""

    def __init__(self, reader):
        self.reader = reader

    def __getitem__(self, request):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        return self.reader[request]


def test_workers_outlive_sigterm_and_leave_the_global_generator_alone(clips):
    loader = clip_loader(clips, cache_decoded=False)
    expected = samples_of([loader], steps=3)
    surviving = clip_loader(clips, num_workers=1, cache_decoded=False)
    surviving._reader = AskWorker(surviving._reader)
    before = torch.get_rng_state()
    assert samples_of([surviving], steps=3) == expected
    assert torch.equal(torch.get_rng_state(), before)


def test_cache_is_filled_by_workers_for_everybody(clips):
    shards = ShardSet.open(clips)
    reader = ClipReader(shards, DataConfig(shards=clips, buckets=["5x32x32"]), seed=0, random_crop=True)
    loader = clip_loader(clips)
    requests = list(islice(loader._requests(1, deque()), 6))
    assert all(reader._cache.get(index) is None for index in range(NUM_CLIPS))
    list(read_all(reader, requests, num_workers=2, prefetch=1))
    for index in range(NUM_CLIPS):
        assert np.array_equal(reader._cache.get(index), read_yuv(shards.read(index, "mp4")))


@pytest.mark.parametrize(("cache_gib", "num_workers"), [(2.0, 0), (0.0, 0), (0.0, 2)])
def test_latents_are_the_same_for_any_ranks_workers_and_memory(latents, cache_gib, num_workers):
    def loader(rank=0, world=1, **config):
        config = LatentDataConfig(shards=latents, caption_drop=0.3, **config)
        return LatentLoader(config, seed=1, global_batch_size=4, micro_batch_size=2, rank=rank, world=world)

    reference = samples_of([loader()], steps=6)
    assert len(reference[0]) == 2 * NUM_CLIPS
    variant = [loader(rank, 2, cache_gib=cache_gib, num_workers=num_workers) for rank in range(2)]
    assert samples_of(variant, steps=6) == reference


@pytest.mark.parametrize(("cache_gib", "num_workers"), [(2.0, 0), (0.0, 0), (0.0, 2)])
def test_the_first_steps_read_windows_that_the_key_and_the_epoch_decide(tmp_path, cache_gib, num_workers):
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(3, 2, *size, generator=generator) for size in [(4, 6)] * 5 + [(2, 2)] * 4]
    with ShardWriter(tmp_path, clips_per_shard=4) as writer:
        for number, mean in enumerate(whole):
            meta = {"bucket": f"5x{8 * mean.shape[2]}x{8 * mean.shape[3]}", "captions": [""]}
            write_latent_sample(writer, f"c{number}", mean, 2 * mean, meta)

    def windows(rank=0, world=1, start=1, crop_steps=1000, seed=1, **config):
        loader = LatentLoader(
            LatentDataConfig(shards=str(tmp_path), **config),
            seed=seed,
            global_batch_size=2,
            micro_batch_size=1,
            rank=rank,
            world=world,
            crop=LatentCropConfig((2, 4), share=1.0, contrast_power=1.0),
            crop_steps=crop_steps,
            patch=(1, 2),
        )
        return {
            (plan.epoch, index): (None if batch.origin is None else tuple(batch.origin[0].tolist()), batch)
            for plan, batches in islice(loader.iterate(start), 60)
            for batch in batches
            for index in batch.ids
            if index >= 0
        }

    reference = windows()
    for (_, index), ((row, column), batch) in reference.items():
        assert column % 2 == 0
        part = whole[index].half()[:, :, row : row + 2, column : column + 4]
        assert torch.equal(batch.mean[0], part.float()) and torch.equal(batch.logvar[0], (2 * part).float())
        assert batch.mean.shape[3:] == ((2, 4) if index < 5 else (2, 2))  # smaller ones stay whole
    assert len({origin for (_, index), (origin, _) in reference.items() if index == 0}) > 2  # of 6
    others = windows(seed=2)
    assert any(others[place][0] != origin for place, (origin, _) in reference.items() if place in others)
    ranks = [windows(rank=rank, world=2, start=21, cache_gib=cache_gib, num_workers=num_workers) for rank in (0, 1)]
    shared = [(place, origin) for part in ranks for place, (origin, _) in part.items() if place in reference]
    assert len(shared) > 40 and all(reference[place][0] == origin for place, origin in shared)
    later = windows(crop_steps=30)
    assert {origin is None for (epoch, _), (origin, _) in later.items() if epoch == 0} == {False}
    assert {tuple(b.mean.shape[3:]) for _, (o, b) in later.items() if o is None} == {(4, 6), (2, 2)}


def test_latents_come_by_bucket_and_as_written(latents):
    loader = LatentLoader(
        LatentDataConfig(shards=latents, caption_drop=0), seed=1, global_batch_size=4, micro_batch_size=4
    )
    for _, (batch,) in islice(loader.iterate(), loader.steps_per_epoch):
        assert batch.mean.shape[1:] == ((4, 2, 4, 4) if batch.bucket == (5, 32, 32) else (4, 1, 2, 8))
        assert batch.mean.dtype == batch.logvar.dtype == torch.float32
        for row, index in enumerate(batch.ids):
            assert (batch.mean[row] == max(index, 0) / 8).all()
            assert batch.captions[row] == (f"clip {index}" if index >= 0 else "")


def test_the_means_alone_are_those_of_the_posteriors(latents):
    sizes = {"seed": 1, "global_batch_size": 4, "micro_batch_size": 4, "crop_steps": 3}
    config, crop = LatentDataConfig(shards=latents), LatentCropConfig(size=(2, 2), share=0.5)
    both, means = (LatentLoader(config, crop=crop, posterior=posterior, **sizes) for posterior in (True, False))
    for (_, (whole,)), (_, (mean,)) in islice(zip(both.iterate(), means.iterate()), 6):
        assert torch.equal(whole.mean, mean.mean) and mean.logvar is None and whole.logvar.shape == whole.mean.shape


@pytest.mark.parametrize("num_workers", [0, 2])
def test_by_tokens_smaller_buckets_have_more_clips(latents, num_workers):
    """32 positions a clip against 16: 4 clips a step and 2 a forward pass, against 8 and 4; on any ranks the same."""
    config = LatentDataConfig(shards=latents, num_workers=num_workers, cache_gib=0)
    sizes = {"5x32x32": (4, 2), "1x16x64": (8, 4)}
    epochs = []
    for world in (1, 2, 3):
        loaders = [
            LatentLoader(
                config, seed=3, global_batch_size=4, micro_batch_size=2, batch_by="tokens", rank=rank, world=world
            )
            for rank in range(world)
        ]
        assert loaders[0].batch_sizes == sizes
        seen, digests = [], []
        for steps in islice(zip(*(loader.iterate() for loader in loaders)), loaders[0].steps_per_epoch):
            for plan, batches in steps:
                total, micro = sizes[plan.bucket]
                assert len(plan.ids) == total
                assert len(batches) == -(-total // (world * micro)) and all(len(b.ids) == micro for b in batches)
                seen += [key for batch in batches for key in batch.keys if key]
            digests.append(loaders[0].keys(steps[0][0]))
        assert sorted(seen) == sorted(entry.key for entry in loaders[0].shards.entries)
        epochs.append(digests)
    assert epochs[0] == epochs[1] == epochs[2]


@pytest.mark.parametrize("drop", [0.0, 0.3, 1.0])
def test_captions_are_dropped_at_the_rate_asked_for(latents, drop):
    loader = LatentLoader(
        LatentDataConfig(shards=latents, caption_drop=drop), seed=1, global_batch_size=4, micro_batch_size=4
    )
    steps = 50 * loader.steps_per_epoch
    captions = [
        caption
        for _, batches in islice(loader.iterate(), steps)
        for batch in batches
        for caption, index in zip(batch.captions, batch.ids, strict=True)
        if index >= 0
    ]
    n = 50 * NUM_CLIPS
    assert len(captions) == n
    assert abs(sum(not caption for caption in captions) / n - drop) <= 4 * (drop * (1 - drop) / n) ** 0.5


def test_damaged_latents_are_rows_of_weight_0(tmp_path):
    write_latents(tmp_path, 6)
    entry = ShardSet.open(tmp_path).entries[0]
    shard = bytearray((tmp_path / entry.shard).read_bytes())
    offset, size = entry.members["safetensors"]
    shard[offset : offset + 8] = b"\xff" * 8
    (tmp_path / entry.shard).write_bytes(shard)
    loader = LatentLoader(LatentDataConfig(shards=str(tmp_path)), seed=0, global_batch_size=6, micro_batch_size=6)
    weights = {}
    for _, (batch,) in islice(loader.iterate(), loader.steps_per_epoch):
        weights |= dict(zip(batch.ids, batch.weight.tolist(), strict=True))
    assert {index for index, weight in weights.items() if index >= 0 and not weight} == {0}
    assert loader.failures == 1


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("foreign", [b"[1, 2]", b"null", b'"a caption"', b"7", b"{"])
def test_a_json_that_is_no_object_is_a_row_of_weight_0_and_named(tmp_path, caplog, foreign, num_workers):
    write_clips(tmp_path / "clips", range(6))
    write_latents(tmp_path / "latents", 6)
    for folder in (tmp_path / "clips", tmp_path / "latents"):
        entry = ShardSet.open(folder).entries[4]
        offset, size = entry.members["json"]
        with open(folder / entry.shard, "r+b") as shard:
            shard.seek(offset)
            shard.write(foreign.ljust(size))
    sizes = {"seed": 0, "global_batch_size": 6, "micro_batch_size": 6}
    config = LatentDataConfig(str(tmp_path / "latents"), num_workers=num_workers, cache_gib=0)
    for loader in (LatentLoader(config, **sizes), clip_loader(str(tmp_path / "clips"), num_workers=num_workers)):
        weights = {}
        for _, batches in islice(loader.iterate(), loader.steps_per_epoch):
            for batch in batches:
                weights |= dict(zip(batch.ids, batch.weight.tolist(), strict=True))
        assert [index for index, weight in weights.items() if index >= 0 and not weight] == [4]
        assert loader.failures == 1 and "sample c004 is left out" in caplog.text
        caplog.clear()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_clips_that_are_replaced_end_the_reading_in_one_line(tmp_path, num_workers):
    write_clips(tmp_path, range(8))
    steps = clip_loader(str(tmp_path), num_workers=num_workers, cache_decoded=False).iterate()
    next(steps)
    write_clips(tmp_path, range(8, 16))
    with pytest.raises(UserError, match=r"tar was written anew while it was in use: [^\n]*$"):
        for _ in range(20):
            next(steps)


def test_users_mistakes_are_one_line(clips, latents, tmp_path):
    def message(make):
        with pytest.raises(UserError) as caught:
            make()
        assert "\n" not in str(caught.value)
        return str(caught.value)

    text = message(lambda: clip_loader(clips, global_batch_size=12))
    assert "11 clips" in text and "global_batch_size 12" in text and "lower global_batch_size to 11" in text
    assert "no such folder" in message(lambda: clip_loader(str(tmp_path / "nothing")))
    assert "no samples" in message(lambda: clip_loader(str(tmp_path)))
    assert "nearest that fits is 5x32x32" in message(lambda: clip_loader(clips, buckets=["5x40x32"]))
    assert "longest clip has 7 frames" in message(lambda: clip_loader(clips, buckets=["9x32x32"]))
    config = LatentDataConfig(shards=clips)
    assert "does not hold latents" in message(
        lambda: LatentLoader(config, seed=0, global_batch_size=1, micro_batch_size=1)
    )
    config = LatentDataConfig(shards=latents)
    assert "lower global_batch_size to 11" in message(
        lambda: LatentLoader(config, seed=0, global_batch_size=64, micro_batch_size=1)
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"buckets": []}, "at least one"),
        ({"buckets": ["16x64x64"]}, "nearest that fits is 17x64x64"),
        ({"fps": 0.0}, "data.fps 0.0"),
        ({"num_workers": -1}, "data.num_workers -1"),
        ({"prefetch": 0}, "data.prefetch 0"),
    ],
)
def test_impossible_configs_name_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)


def test_impossible_caption_drop_names_the_value():
    with pytest.raises(ValueError, match="data.caption_drop 1.5"):
        LatentDataConfig(caption_drop=1.5)


def test_a_process_that_fails_ends_and_its_workers_with_it(clips):
    """Its traceback holds the loader, as that of a trainer does."""
    script = f"""
from multiprocessing import active_children
from videodit.data.clip_reader import DataConfig
from videodit.data.loader import ClipLoader
config = DataConfig(shards={str(clips)!r}, buckets=["5x32x32"], cache_decoded=False, num_workers=2)
def train():
    steps = ClipLoader(config, seed=0, global_batch_size=4, micro_batch_size=4).iterate()
    next(steps)
    print(*(process.pid for process in active_children()), flush=True)
    raise RuntimeError("a failure")
train()
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "a failure" in done.stderr
    workers = [int(pid) for pid in done.stdout.split()]
    assert len(workers) == 2
    for pid in workers:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
