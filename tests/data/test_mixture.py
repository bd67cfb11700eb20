import json
from collections import Counter
from itertools import islice

import pytest
import torch

from tests.data.test_loader import clip_frames, write_clips
from videodit.data.clip_reader import DataConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import read_manifests, write_latent_sample, write_manifest
from videodit.data.loader import ClipLoader, LatentLoader, clips_in_order
from videodit.data.mixture import open_shards
from videodit.data.mp4 import encode_mp4
from videodit.data.shard_writer import ShardWriter
from videodit.errors import UserError


def write_latents(folder, name, count, shape=(4, 2, 4, 4), vae="v1", bucket="5x32x32"):
    with ShardWriter(folder, clips_per_shard=4) as writer:
        for number in range(count):
            meta = {"bucket": bucket, "captions": [f"{name} {number} {k}" for k in range(5)]}
            write_latent_sample(writer, f"c{number}", torch.full(shape, number / 8), torch.zeros(shape), meta)
    write_manifest(folder, {"vae": vae, "buckets": [bucket], "text_encoder": None}, count, "clips", "vae")
    return str(folder)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    images = write_latents(root / "images", "image", 9, (4, 1, 4, 4), bucket="1x32x32")
    return [write_latents(root / "a", "a", 10), write_latents(root / "b", "b", 7), images]


def loader_of(folders, weights, rank=0, world=1, **config):
    config = LatentDataConfig(shards=folders, weights=weights, caption_drop=0.3, **config)
    return LatentLoader(config, seed=1, global_batch_size=4, micro_batch_size=2, rank=rank, world=world)


def rows_of(loaders, steps, start=1):
    """step -> its rows, of all ranks together: key, how often it was seen before, caption, contents."""
    rows = {}
    for loader in loaders:
        for plan, batches in islice(loader.iterate(start), steps):
            of_step = rows.setdefault(plan.step, (loader.keys(plan), Counter()))
            assert of_step[0] == loader.keys(plan)
            for batch in batches:
                for row, key in enumerate(batch.keys):
                    if key:
                        of_step[1][key, batch.epochs[row], batch.captions[row], batch.mean[row].mean().item()] += 1
    return rows


@pytest.mark.parametrize(("images", "videos", "steps"), [(1.0, 1.0, (3, 5)), (2.0, 0.5, (6, 3)), (1 / 3, 2.0, (1, 9))])
def test_weights_are_the_ratio_of_images_and_videos(tmp_path, images, videos, steps):
    """Of 12 images and 18 videos, every epoch; their steps are of 4, the last one of an epoch padded."""
    folders = [
        write_latents(tmp_path / "i", "image", 12, (4, 1, 4, 4), bucket="1x32x32"),
        write_latents(tmp_path / "v", "video", 18),
    ]
    loader = loader_of(folders, [images, videos])
    assert loader.steps_per_epoch == sum(steps)
    for epoch in range(3):
        plans = [loader.order.batch(epoch * sum(steps) + step) for step in range(1, sum(steps) + 1)]
        clips = Counter(id < 12 for plan in plans for id in plan.ids if id >= 0)
        assert (clips[True], clips[False]) == (12 * images, 18 * videos)
        assert Counter(plan.bucket for plan in plans) == {"1x32x32": steps[0], "5x32x32": steps[1]}


def test_sets_come_by_their_weights_with_images_among_videos(three):
    """Twice a, half of b, images once; keys that both have are told apart, and read from their own set."""
    loader = loader_of(three, [2.0, 0.5, 1.0])
    keys = [entry.key for entry in loader.shards.entries]
    assert len(set(keys)) == 26 and keys[0] == "c0" and keys[10] == "1/c0" and keys[17] == "2/c0"
    everything, captions = Counter(), {}
    for epoch in range(2):
        rows = rows_of([loader], loader.steps_per_epoch, epoch * loader.steps_per_epoch + 1)
        for _, of_step in rows.values():
            assert len({loader.shards.entries[keys.index(key)].meta["bucket"] for key, *_ in of_step}) == 1
            for (key, seen, caption, value), times in of_step.items():
                everything[key, seen] += times
                captions.setdefault(key, set()).add(caption)
                assert value == pytest.approx(int(key.split("c")[1]) / 8)
                assert not caption or caption.split()[0] == {"": "a", "1": "b", "2": "image"}[key.rpartition("/")[0]]
    of_b = Counter(key for key, _ in everything.elements() if key.startswith("1/"))
    assert len(of_b) == 7 and of_b.total() == 8  # 3.5 are rounded to 4 an epoch
    assert {row: times for row, times in everything.items() if row[0] not in of_b} == dict.fromkeys(
        [(f"c{n}", seen) for n in range(10) for seen in range(4)]
        + [(f"2/c{n}", seen) for n in range(9) for seen in range(2)],
        1,
    )
    assert all(len(captions[f"c{n}"]) > 1 for n in range(10))  # a clip that is seen again is captioned anew


def test_the_mixture_is_the_same_for_any_ranks_workers_and_start(tmp_path):
    """In four streams; 2 and 4 ranks own theirs, 3 share all, 8 share each."""
    folders = [write_latents(tmp_path / "a", "a", 120), write_latents(tmp_path / "b", "b", 25)]
    options = {"weights": [0.7, 2.0], "streams": 4}
    loader = loader_of(folders, **options)
    assert loader.order.batch(1).num_streams == 4
    steps = loader.steps_per_epoch + 4
    reference = rows_of([loader], steps)
    for world in (3, 4, 8):
        assert reference == rows_of(
            [loader_of(folders, rank=rank, world=world, **options) for rank in range(world)], steps
        )
    two = [loader_of(folders, rank=rank, world=2, num_workers=1, cache_gib=0, **options) for rank in range(2)]
    later = rows_of(two, steps - 10, start=11)
    assert later == {step: rows for step, rows in reference.items() if step > 10}


def test_clips_of_videos_and_pictures_from_two_folders(tmp_path):
    write_clips(tmp_path / "videos", range(5))
    with ShardWriter(tmp_path / "stills") as writer:
        for number in range(4):
            record = {"num_frames": 1, "height": 40, "width": 48, "fps": 8.0, "caption": "a still"}
            data = encode_mp4(clip_frames(number, 1), 8)
            writer.write(f"c{number:03d}", {"mp4": data, "json": json.dumps(record).encode()})
    folders = [str(tmp_path / "videos"), str(tmp_path / "stills")]
    config = DataConfig(shards=folders, weights=[1, 2], buckets=["5x32x32", "1x32x32"])
    loader = ClipLoader(config, seed=0, global_batch_size=2, micro_batch_size=2)
    frames = Counter()
    for _, (batch,) in islice(loader.iterate(), loader.steps_per_epoch):
        frames[batch.bucket.frames] += int(batch.weight.sum())
        assert all((caption == "a still") == (batch.bucket.frames == 1) for caption in batch.captions if caption)
    assert frames == {5: 5, 1: 8}
    first = next(iter(clips_in_order(DataConfig(shards=folders, buckets=["1x32x32"]), loader.shards, 4)))
    assert sorted(first.keys) == ["1/c000", "1/c001", "c000", "c001"]  # measured on a few, both count


def test_manifests_of_sets_made_alike_are_one(three, tmp_path):
    roots = {folder: folder for folder in three}
    assert read_manifests(roots)["fingerprint"]["buckets"] == ["5x32x32", "1x32x32"]
    other = write_latents(tmp_path / "other", "o", 3, vae="v2")
    with pytest.raises(UserError, match="was made by another VAE"):
        read_manifests({three[0]: three[0], other: other})
    assert read_manifests({three[0]: three[0], "gone": tmp_path / "gone"}) is None


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shards": ["a", "b", "a"]}, "data.shards has a twice.*weight of 2"),
        ({"shards": ["a", "b"], "weights": [1.0]}, "1 numbers for 2 of data.shards"),
        ({"shards": ["a", "b"], "weights": [1.0, 0.0]}, "data.weights 0.0 must be above 0"),
        ({"shards": "a", "streams": 0}, "data.streams 0"),
    ],
)
def test_impossible_mixtures_name_the_value(values, message):
    with pytest.raises(ValueError, match=message):
        LatentDataConfig(**values)


def test_a_set_that_is_gone_is_named(three):
    with pytest.raises(UserError, match="nowhere: no such folder"):
        open_shards(LatentDataConfig(shards=[three[0], "nowhere"]))
