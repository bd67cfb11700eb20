import fcntl
import json
import multiprocessing
import os
import shutil
import signal
from importlib.util import find_spec
from itertools import islice

import fsspec
import pytest

from tests.data.test_loader import write_clips
from tests.data.test_mixture import rows_of, write_latents
from videodit.data import remote
from videodit.data.clip_reader import DataConfig
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import read_manifests
from videodit.data.loader import ClipLoader, LatentLoader
from videodit.data.mixture import local_folders, open_shards
from videodit.data.remote import RemoteFolder, ShardCache, open_remote
from videodit.data.shards import INDEX, ShardSet
from videodit.errors import UserError

CLIPS = 24  # in shards of 4


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(remote, "_PAUSE_S", 0.0)


@pytest.fixture
def store(tmp_path):
    """A folder of latents and its address."""
    write_latents(tmp_path / "store", "a", CLIPS)
    return tmp_path / "store", f"file://{tmp_path}/store"


def loader_of(shards, cache_dir="", gib=1.0, rank=0, world=1, num_workers=0):
    config = LatentDataConfig(
        shards=str(shards), disk_cache=str(cache_dir), disk_cache_gib=gib, cache_gib=0, num_workers=num_workers
    )
    return LatentLoader(config, seed=1, global_batch_size=8, micro_batch_size=2, rank=rank, world=world)


def shard_bytes(folder):
    return max(path.stat().st_size for path in folder.glob("*.tar"))


def cached(cache_dir):
    return sorted(path.name for path in cache_dir.glob("*/*.tar"))


def test_remote_shards_read_as_local_ones_in_a_cache_smaller_than_they_are(store, tmp_path):
    """Two ranks with two workers each share a folder that has room for three of six shards."""
    folder, address = store
    reference = rows_of([loader_of(folder)], 9)
    gib = 3 * shard_bytes(folder) / 2**30
    ranks = [loader_of(address, tmp_path / "cache", gib, rank, 2, num_workers=2) for rank in range(2)]
    assert rows_of(ranks, 9) == reference
    assert 1 <= len(cached(tmp_path / "cache")) <= 3
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.suffix in (".part", ".room")]


def test_the_same_from_memory_and_what_lies_beside_the_shards_comes_too(store, tmp_path):
    folder, _ = store
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/latents", recursive=True)
    try:
        loader = loader_of("memory://latents", tmp_path / "cache")
        assert rows_of([loader], 3) == rows_of([loader_of(folder)], 3)
        config = LatentDataConfig(shards="memory://latents", disk_cache=str(tmp_path / "cache"))
        assert read_manifests(local_folders(config))["fingerprint"]["vae"] == "v1"
    finally:
        memory.rm("/latents", recursive=True)


def test_each_shard_is_fetched_once_and_the_one_not_used_for_longest_goes(store, tmp_path):
    folder, address = store
    source = RemoteFolder(address, tmp_path / "cache")
    cache = ShardCache(source, 2.5 * shard_bytes(folder))
    names = sorted(path.name for path in folder.glob("*.tar"))
    for name in names[:2]:
        cache.local(name)
    shutil.rmtree(folder)  # nothing more can be fetched
    inode = cache.local(names[0]).stat().st_ino
    assert cache.local(names[0]).stat().st_ino == inode and cached(tmp_path / "cache") == names[:2]
    write_latents(folder, "a", CLIPS)
    with open(cache.local(names[1]), "rb") as reader:
        cache.local(names[0])
        cache.local(names[2])
        assert cached(tmp_path / "cache") == [names[0], names[2]]
        assert len(reader.read()) == source.sizes[names[1]]  # who has it open reads on
    assert cache.read(names[1], 0, 10) == (folder / names[1]).read_bytes()[:10]


def fetch_until_killed(address, cache_dir, name, ready):
    """In a process of its own: stops in the middle of a download."""
    source = RemoteFolder(address, cache_dir)

    def half(path, part):
        with open(part, "wb") as file:
            file.write(b"half")
        ready.set()
        signal.pause()

    filesystem, path = source._connect()
    filesystem.get_file = half
    ShardCache(source, 1e9).local(name)


def test_a_killed_download_leaves_no_shard_and_no_room_taken(store, tmp_path):
    folder, address = store
    names = sorted(path.name for path in folder.glob("*.tar"))
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    process = context.Process(target=fetch_until_killed, args=(address, tmp_path / "cache", names[0], ready))
    process.start()
    assert ready.wait(60)
    cache = ShardCache(RemoteFolder(address, tmp_path / "cache"), 1.5 * shard_bytes(folder))
    cache.local(names[1])
    assert len(list((tmp_path / "cache").rglob("*.room"))) == 1  # it counts as long as somebody fetches
    process.kill()
    process.join()
    cache.local(names[2])
    assert cached(tmp_path / "cache") == [names[2]] and not list((tmp_path / "cache").rglob("*.room"))
    assert cache.local(names[0]).read_bytes() == (folder / names[0]).read_bytes()


def hold(path, held, release):
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        held.set()
        release.wait()


def test_others_wait_for_who_fetches(store, tmp_path):
    """The lock of a shard is all that keeps ten processes from fetching it ten times."""
    folder, address = store
    source = RemoteFolder(address, tmp_path / "cache")
    cache = ShardCache(source, 1e9)
    name = sorted(path.name for path in folder.glob("*.tar"))[0]
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=hold, args=(source.local / f"{name}.lock", held, release))
    process.start()
    assert held.wait(60)
    (future,) = cache.fetch_ahead([name, name])
    shutil.copyfile(folder / name, source.local / "other")
    assert not future.done()
    os.replace(source.local / "other", source.local / name)  # as the one who holds the lock does
    shutil.rmtree(folder)
    release.set()
    assert future.result(60).read_bytes()
    process.join()
    assert cache.fetch_ahead([name]) == []


def test_what_cannot_be_fetched_is_rows_of_weight_0_and_a_shard_that_comes_back_is_read(store, tmp_path):
    folder, address = store
    loader = loader_of(address, tmp_path / "cache")
    lost = sorted(folder.glob("*.tar"))[-1]  # of the first one the shape of the latents was read
    data = lost.read_bytes()
    lost.unlink()

    def weight_of_epoch(start):
        steps = islice(loader.iterate(start), 3)
        return sum(batch.weight.sum().item() for _, batches in steps for batch in batches)

    assert weight_of_epoch(1) == CLIPS - 4 and loader.failures == 4
    lost.write_bytes(data[: len(data) // 2])
    assert weight_of_epoch(4) == CLIPS - 4 and loader.failures == 8
    lost.write_bytes(data)
    assert weight_of_epoch(7) == CLIPS and loader.failures == 8


def test_a_download_that_ends_early_is_tried_again(store, tmp_path):
    folder, address = store
    source = RemoteFolder(address, tmp_path / "cache")
    name = sorted(path.name for path in folder.glob("*.tar"))[0]
    filesystem, _ = source._connect()
    real, calls = filesystem.get_file, []

    def flaky(path, part):
        calls.append(path)
        real(path, part)
        if len(calls) == 1:
            os.truncate(part, 100)
        if len(calls) == 2:
            raise ConnectionError("reset by peer")

    filesystem.get_file = flaky
    assert ShardCache(source, 1e9).local(name).read_bytes() == (folder / name).read_bytes()
    assert len(calls) == 3


def test_shards_are_fetched_before_they_are_read(store, tmp_path, monkeypatch):
    """The loader asks for what is two steps ahead; nothing of it is read yet."""
    _, address = store
    monkeypatch.setattr("videodit.data.step_loader.FETCH_AHEAD_STEPS", 2)
    loader = loader_of(address, tmp_path / "cache")
    steps = loader.iterate()
    (cache,) = [part.cache for part in loader.shards.sets]
    next(steps)
    for future in cache.fetch_ahead([]):
        future.result(60)
    third = {loader.shards.entries[clip].shard for clip in loader.order.batch(3).ids if clip >= 0}
    assert third <= set(cached(tmp_path / "cache"))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_node_fetches_the_shards_of_its_streams_alone(tmp_path, num_workers):
    """Two nodes of one rank and one cache each, two streams of 32 clips: eight shards of four for each node."""
    write_latents(tmp_path / "store", "a", 64)
    names = sorted(path.name for path in (tmp_path / "store").glob("*.tar"))
    for rank in range(2):
        config = LatentDataConfig(
            shards=f"file://{tmp_path}/store",
            streams=2,
            disk_cache=str(tmp_path / f"cache-{rank}"),
            cache_gib=0,
            num_workers=num_workers,
        )
        loader = LatentLoader(config, seed=1, global_batch_size=8, micro_batch_size=2, rank=rank, world=2)
        for _ in islice(loader.iterate(), 3 * loader.steps_per_epoch):
            pass
        for future in loader.shards.cache.fetch_ahead([]):
            future.result(60)
        own = names[8 * rank : 8 * (rank + 1)]
        # Of the first shard everybody reads the shape of the latents.
        assert cached(tmp_path / f"cache-{rank}") == sorted({names[0], *own})


def test_shards_that_were_written_anew_are_fetched_anew(store, tmp_path):
    folder, address = store
    first = RemoteFolder(address, tmp_path / "cache")
    assert RemoteFolder(address, tmp_path / "cache").local == first.local
    write_latents(folder, "b", CLIPS + 1)
    second = RemoteFolder(address, tmp_path / "cache")
    assert second.local != first.local and len(open_remote(second, 1e9)) == CLIPS + 1


def test_clips_in_pixels_too(tmp_path):
    write_clips(tmp_path / "store", range(5))
    config = DataConfig(
        shards=[f"file://{tmp_path}/store"], buckets=["5x32x32"], disk_cache=str(tmp_path / "cache"), num_workers=1
    )
    loader = ClipLoader(config, seed=0, global_batch_size=5, micro_batch_size=5)
    _, (batch,) = next(loader.iterate())
    assert sorted(batch.keys) == [f"c{number:03d}" for number in range(5)] and batch.weight.sum() == 5


def test_mistakes_are_one_line(store, tmp_path):
    folder, address = store
    cache = str(tmp_path / "cache")
    with pytest.raises(ValueError, match="data.shards s3://bucket/x is not on a disk: give --data.disk_cache"):
        LatentDataConfig(shards="s3://bucket/x")
    with pytest.raises(UserError, match="data.shards file:///nowhere/shards cannot be read"):
        RemoteFolder("file:///nowhere/shards", cache)
    with pytest.raises(UserError, match="data.shards nonsense://a/b cannot be read.*nonsense"):
        RemoteFolder("nonsense://a/b", cache)
    if find_spec("gcsfs") is None:
        with pytest.raises(UserError, match="data.shards gs://bucket/x cannot be read.*gcsfs"):
            RemoteFolder("gs://bucket/x", cache)
    with pytest.raises(UserError, match="data.disk_cache_gib is .* but a shard"):
        open_remote(RemoteFolder(address, cache), 100)
    sorted(folder.glob("*.tar"))[0].unlink()
    with pytest.raises(UserError, match=r"shard-000000.tar is missing"):
        open_shards(LatentDataConfig(shards=address, disk_cache=cache))
    (folder / INDEX).unlink()
    with pytest.raises(UserError, match="has no index.jsonl"):
        open_shards(LatentDataConfig(shards=address, disk_cache=cache))


def test_an_index_cannot_name_files_elsewhere(store):
    folder, _ = store
    lines = (folder / INDEX).read_text().splitlines()
    record = json.loads(lines[0])
    for shard, places in ((f"../store/{record['shard']}", record["members"]), (record["shard"], {"json": [-512, 10]})):
        (folder / INDEX).write_text("\n".join([json.dumps({**record, "shard": shard, "members": places}), *lines[1:]]))
        with pytest.raises(UserError, match="line 1 is damaged"):
            ShardSet.open(folder)
