"""Reading clips for training: our loader beside plain webdataset and a DataLoader over files, on the same clips.

    pip install 'videodit[decord]'
    python benchmarks/data_vs_peers.py --videos ../shared/videos --out benchmarks/results/data_vs_peers.json

Clips of 2 to 10 s are cut from the videos by ingest, and copied until there are --clips of them. Every reader gives
17 frames from a random moment of every clip, once, in one process with one thread (a worker is a process, so that the
rates of several add up); readers take turns, --rounds times, and the medians are printed in clips a second. "videodit"
gives batches as they go to the device, in YUV; all others, and "videodit, RGB", the float tensor that a model takes,
made by the CPU. "decode only" is libavcodec alone, from the keyframe before the window to its last frame, without
conversion to RGB: what any reader of these files must do at least. "to float RGB" is what remains for the device after
"videodit", here done by the CPU. Then: latents, in memory also in the second epoch, memory over many clips, how long it
takes to begin in the middle of a million clips, from their index (--index_only measures that alone, and puts it into
the --out of an earlier run) and from arrays, and the order of a million clips for 1,024 ranks.
"""

import argparse
import io
import json
import logging
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import torch
import webdataset
from rich.console import Console
from rich.table import Table

from videodit.data import yuv
from videodit.data.clip_reader import DataConfig
from videodit.data.deal import deal
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.latents import write_latent_sample
from videodit.data.loader import ClipLoader, LatentLoader
from videodit.data.order import ClipPlaces, GlobalOrder
from videodit.data.shard_writer import ShardWriter, index_line
from videodit.data.shards import Entry, ShardSet, json_bytes
from videodit.data.transforms import to_model_range
from videodit.data.video_io import KEYFRAME_EVERY
from videodit.evaluation.machine import machine_facts

FRAMES = 17


def make_clips(videos: str, folder: Path, count: int, height: int) -> Path:
    """Shards of `count` clips of 2 to 10 s, all of one size."""
    config = IngestConfig(max_short_side=height, min_frames=48)
    ingest(videos, folder / "cut", config)
    cut = ShardSet.open(folder / "cut")
    sizes = [(entry.meta["height"], entry.meta["width"]) for entry in cut.entries]
    size = max(set(sizes), key=sizes.count)
    chosen = [index for index, entry in enumerate(cut.entries) if (entry.meta["height"], entry.meta["width"]) == size]
    with ShardWriter(folder / "clips", clips_per_shard=100) as writer:
        for number in range(count):
            index = chosen[number % len(chosen)]
            record = json_bytes(cut.read_json(index))
            writer.write(f"clip-{number:06d}", {"mp4": cut.read(index, "mp4"), "json": record})
    return folder / "clips"


def clip_loader(shards: ShardSet, bucket: str, pixels: str = "yuv") -> ClipLoader:
    """Reads one clip at a time in this process, in the global random order."""
    config = DataConfig(shards=str(shards.root), buckets=[bucket], pixels=pixels, cache_decoded=False)
    return ClipLoader(config, seed=0, global_batch_size=1, micro_batch_size=1, multiple=2)


def find_starts(shards: ShardSet, bucket: str) -> dict[str, int]:
    """The first frame of every clip's window, as the loader draws it; the peers get the same."""
    steps = islice(clip_loader(shards, bucket).iterate(), len(shards))
    return {batch.keys[0]: batch.cuts[0].first_frame for _, (batch,) in steps}


def decode_only(shards: ShardSet, begin: Mapping[str, int]) -> Iterator[int]:
    """libavcodec on just the frames that a window needs."""
    for index, entry in enumerate(shards.entries):
        first = begin[entry.key]
        keyframe = first // KEYFRAME_EVERY * KEYFRAME_EVERY
        with av.open(io.BytesIO(shards.read(index, "mp4"))) as container:
            stream = container.streams.video[0]
            stream.thread_type = "NONE"
            if keyframe:
                container.seek(int(keyframe / stream.average_rate / stream.time_base), stream=stream)
            for frame in container.decode(stream):
                if round(float(frame.pts * stream.time_base * stream.average_rate)) >= first + FRAMES - 1:
                    break
        yield 1


def ours(shards: ShardSet, bucket: str, pixels: str) -> Iterator[int]:
    """ClipLoader."""
    for _, batches in islice(clip_loader(shards, bucket, pixels).iterate(), len(shards)):
        assert batches[0].weight.item() == 1 and batches[0].frames.shape[1] == FRAMES
        if pixels == "rgb":
            assert batches[0].clip().shape[2] == FRAMES
        yield 1


def convert_only(shards: ShardSet) -> Iterator[int]:
    """One clip in YUV to float RGB, again and again."""
    meta = shards.entries[0].meta
    clip = torch.zeros(1, *yuv.packed_shape(FRAMES, meta["height"], meta["width"]), dtype=torch.uint8)
    for _ in shards.entries:
        assert yuv.to_model_range(clip).shape[2] == FRAMES
        yield 1


def plain_webdataset(
    shards: ShardSet, begin: Mapping[str, int], decode: Callable[[bytes, int], np.ndarray]
) -> Iterator[int]:
    """webdataset in the order of the tars; the window is cut by `decode`."""
    tars = sorted(str(path) for path in shards.root.glob("*.tar"))
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        clip = to_model_range(torch.from_numpy(decode(sample["mp4"], begin[sample["__key__"]]))[None])
        assert clip.shape[2] == FRAMES
        yield 1


def with_av_whole(data: bytes, first: int) -> np.ndarray:
    """Every frame decoded and converted, then cut: what webdataset's own examples do."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])[first : first + FRAMES]


def with_av(data: bytes, first: int) -> np.ndarray:
    """Decoded from the start, frames of the window converted."""
    with av.open(io.BytesIO(data)) as container:
        container.streams.video[0].thread_type = "NONE"
        frames = islice(container.decode(video=0), first, first + FRAMES)
        return np.stack([frame.to_ndarray(format="rgb24") for frame in frames])


def with_decord(data: bytes, first: int) -> np.ndarray:
    """decord's get_batch, which seeks."""
    import decord

    reader = decord.VideoReader(io.BytesIO(data), num_threads=1)
    return reader.get_batch(range(first, first + FRAMES)).asnumpy()


def file_loader(shards: ShardSet, begin: Mapping[str, int], folder: Path) -> Iterator[int]:
    """A torch DataLoader over files in random order, av with a seek."""
    folder.mkdir(exist_ok=True)
    files: list[Path] = []
    for index, entry in enumerate(shards.entries):
        files.append(folder / f"{entry.key}.mp4")
        if not files[-1].exists():
            files[-1].write_bytes(shards.read(index, "mp4"))

    class Files(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return len(files)

        def __getitem__(self, index: int) -> torch.Tensor:
            first = begin[files[index].stem]
            with av.open(str(files[index])) as container:
                stream = container.streams.video[0]
                stream.thread_type = "NONE"
                keyframe = first // KEYFRAME_EVERY * KEYFRAME_EVERY
                if keyframe:
                    container.seek(int(keyframe / stream.average_rate / stream.time_base), stream=stream)
                frames = islice(container.decode(stream), first - keyframe, first - keyframe + FRAMES)
                return torch.from_numpy(np.stack([frame.to_ndarray(format="rgb24") for frame in frames]))

    for frames in torch.utils.data.DataLoader(Files(), batch_size=1, shuffle=True):
        assert to_model_range(frames).shape[2] == FRAMES
        yield 1


def make_latents(folder: Path, count: int) -> ShardSet:
    """Latents of a 17x256x256 clip, 16 channels."""
    shape = (16, 5, 32, 32)
    with ShardWriter(folder, clips_per_shard=500) as writer:
        for number in range(count):
            mean = torch.randn(shape, generator=torch.Generator().manual_seed(number))
            meta = {"bucket": "17x256x256", "captions": ["a caption"]}
            write_latent_sample(writer, f"clip-{number:06d}", mean, torch.zeros(shape), meta)
    return ShardSet.open(folder)


def our_latents(shards: ShardSet, cache_gib: float, epoch: int = 1) -> Iterator[int]:
    """LatentLoader; without cache_gib every sample is read from its tar. Epochs before are not measured."""
    config = LatentDataConfig(shards=str(shards.root), cache_gib=cache_gib)
    loader = LatentLoader(config, seed=0, global_batch_size=8, micro_batch_size=8)
    steps = loader.iterate()
    for _ in range((epoch - 1) * loader.steps_per_epoch):
        next(steps)
    for _, batches in islice(steps, len(shards) // 8):
        yield int(batches[0].weight.sum())


def webdataset_latents(shards: ShardSet) -> Iterator[int]:
    """webdataset with safetensors, eight to a batch."""
    from safetensors.torch import load

    tars = sorted(str(path) for path in shards.root.glob("*.tar"))
    rows = []
    for sample in webdataset.WebDataset(tars, shardshuffle=False):
        rows.append((load(sample["safetensors"]), json.loads(sample["json"])))
        if len(rows) == 8:
            torch.stack([tensors["mean"] for tensors, _ in rows]).float()
            torch.stack([tensors["logvar"] for tensors, _ in rows]).float()
            rows.clear()
            yield 8


def rate(reader: Iterator[int]) -> float:
    """Clips a second, after the first."""
    next(reader)
    started = time.perf_counter()
    return sum(reader) / (time.perf_counter() - started)


def memory_growth(shards: ShardSet, bucket: str, clips: int) -> dict[str, float]:
    """Resident memory after a tenth of the clips, and after all."""
    seen = {}
    for number, _ in enumerate(islice(clip_loader(shards, bucket).iterate(), clips), 1):
        if number in (clips // 10, clips):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            seen[f"mib_after_{number}"] = pages * resource.getpagesize() / 2**20
    first, last = seen.values()
    return seen | {"growth": last / first - 1}


def make_large_index(folder: Path, shards: int, latents: bool) -> Path:
    """An index of shards of 1,000 samples, as ingest or encode write it; all but a tar's first sample is a hole."""
    folder.mkdir()
    shape = (16, 5, 32, 32)
    one = ShardWriter(folder / "one")
    meta = {"fps": 24.0, "num_frames": 120, "height": 256, "width": 456, "source": "videos/somewhere/video-0001.mp4"}
    meta |= {"start_s": 12.5, "end_s": 17.5, "sha256": 64 * "a", "motion": 0.123, "aesthetic": 4.567, "text_area": 0.0}
    if latents:
        meta |= {"bucket": "17x256x256", "captions": ["a caption"]}
        entry = write_latent_sample(one, "clip", torch.zeros(shape), torch.zeros(shape), meta)
    else:
        entry = one.write("clip", {"mp4": bytes(500_000), "json": json_bytes(meta | {"captions": ["a caption"]})})
    one.close()
    size = (folder / "one" / entry.shard).stat().st_size
    data = (folder / "one" / entry.shard).read_bytes()
    with open(folder / "index.jsonl", "wb") as index:
        for number in range(1000 * shards):
            shard, place = divmod(number, 1000)
            members = {name: (place * size + offset, length) for name, (offset, length) in entry.members.items()}
            facts = {**entry.meta, "sha256": f"{number:064x}"}
            index.write(index_line(Entry(f"clip-{number:07d}", f"shard-{shard:06d}.tar", members, facts)))
    for shard in range(shards):
        with open(folder / f"shard-{shard:06d}.tar", "wb") as tar:
            tar.write(data)
            tar.truncate(1000 * size)
    return folder


def resident_bytes() -> int:
    """What this process has in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def begin_in_index(folder: Path, latents: bool, clips: int) -> dict[str, float]:
    """One rank of 128 opens the set and reads its first micro batch of a step in the third epoch's middle."""
    logging.disable(logging.WARNING)  # that samples are left out
    sizes = {"seed": 0, "global_batch_size": 1024, "micro_batch_size": 1, "rank": 3, "world": 128}
    before, started, cpu = resident_bytes(), time.perf_counter(), time.process_time()
    if latents:
        loader: Any = LatentLoader(LatentDataConfig(str(folder), cache_gib=0), **sizes)
    else:
        config = DataConfig(str(folder), cache_decoded=False, buckets=["17x256x256", "17x256x456", "17x456x256"])
        loader = ClipLoader(config, **sizes, multiple=8)
    next(loader.iterate(2 * loader.steps_per_epoch + loader.steps_per_epoch // 2))
    seconds = {"s": time.perf_counter() - started, "cpu_s": time.process_time() - cpu}
    return seconds | {"bytes_per_clip": (resident_bytes() - before) / clips}


def begin_in_indices(shards: int = 1000) -> dict[str, Any]:
    """A million clips, a million latents: the first time, when the columns are made, and after that."""
    measured: dict[str, Any] = {"clips": 1000 * shards}
    with tempfile.TemporaryDirectory() as name:
        for kind in ("latents", "pixels"):
            folder = make_large_index(Path(name) / kind, shards, kind == "latents")
            measured[f"{kind}_index_bytes"] = (folder / "index.jsonl").stat().st_size
            for time_of in ("first", "later"):
                with ProcessPoolExecutor(1, get_context("fork")) as process:  # whose memory is its own
                    done = process.submit(begin_in_index, folder, kind == "latents", 1000 * shards)
                    measured[f"{kind}_{time_of}"] = done.result()
    return measured


def order_seconds(clips: int = 1_000_000, ranks: int = 1024) -> dict[str, float]:
    """To order a million clips and begin in the middle of the third epoch; then a whole epoch for all ranks."""
    started = time.perf_counter()
    shards = np.arange(clips) // 1000
    places = ClipPlaces(shards, np.zeros_like(shards))
    order = GlobalOrder({"17x256x256": range(clips)}, 8192, 0, places=places)
    order.batch(2 * order.steps_per_epoch + order.steps_per_epoch // 2)
    begin = time.perf_counter() - started
    started = time.perf_counter()
    for step in range(1, order.steps_per_epoch + 1):
        plan = order.batch(step)
        deal(plan.streams, plan.num_streams, ranks, 8)
    return {"start_in_the_middle_s": begin, "epoch_for_all_ranks_s": time.perf_counter() - started}


def shards_of_a_node(clips: int = 1_000_000, ranks: int = 64, ranks_per_node: int = 8) -> dict[str, int]:
    """What the first node reads in an epoch, of shards of 1,000 clips; and begins, but has not finished, at a time."""
    shards = np.arange(clips) // 1000
    order = GlobalOrder({"17x256x256": range(clips)}, 512, 0, places=ClipPlaces(shards, np.zeros_like(shards)))
    spans: dict[int, tuple[int, int]] = {}
    for step in range(1, order.steps_per_epoch + 1):
        plan = order.batch(step)
        rows = deal(plan.streams, plan.num_streams, ranks, 8)[:ranks_per_node].ravel()
        for shard in set(shards[np.array(plan.ids)[rows[rows >= 0]]].tolist()):
            spans[shard] = (spans.get(shard, (step, step))[0], step)
    steps = range(1, order.steps_per_epoch + 1)
    open_at_once = max(sum(first <= step <= last for first, last in spans.values()) for step in steps)
    return {"all": int(shards[-1]) + 1, "of_a_node": len(spans), "open_at_once": open_at_once}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--videos", required=True)
    parser.add_argument("--clips", type=int, default=200)
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--latents", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory_clips", type=int, default=10_000)
    parser.add_argument("--index_only", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/data_vs_peers.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    console = Console()
    index = begin_in_indices() | {"machine": machine_facts()}
    console.print(f"to begin in the middle, from an index: {index}")
    if options.index_only:
        options.out.write_text(json.dumps(json.loads(options.out.read_text()) | {"index": index}, indent=1) + "\n")
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = ShardSet.open(make_clips(options.videos, folder, options.clips, options.height))
        meta = shards.entries[0].meta
        bucket = f"{FRAMES}x{meta['height']}x{meta['width']}"
        latents = make_latents(folder / "latents", options.latents)
        begin = find_starts(shards, bucket)
        readers: dict[str, Callable[[], Iterator[int]]] = {
            "decode only": lambda: decode_only(shards, begin),
            "videodit": lambda: ours(shards, bucket, "yuv"),
            "videodit, RGB": lambda: ours(shards, bucket, "rgb"),
            "to float RGB": lambda: convert_only(shards),
            "webdataset + av, whole clip": lambda: plain_webdataset(shards, begin, with_av_whole),
            "webdataset + av": lambda: plain_webdataset(shards, begin, with_av),
            "webdataset + decord": lambda: plain_webdataset(shards, begin, with_decord),
            "DataLoader over files, av": lambda: file_loader(shards, begin, folder / "files"),
            "latents: videodit": lambda: our_latents(latents, 0.0),
            "latents: videodit, in memory": lambda: our_latents(latents, 8.0),
            "latents: videodit, in memory, second epoch": lambda: our_latents(latents, 8.0, epoch=2),
            "latents: webdataset": lambda: webdataset_latents(latents),
        }
        measured: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(options.rounds):
            for name, reader in readers.items():
                measured[name].append(rate(reader()))
        rates = {name: statistics.median(values) for name, values in measured.items()}
        memory = memory_growth(shards, bucket, options.memory_clips)
    table = Table("reader", "clips/s", "beside videodit")
    for name, value in rates.items():
        base = measured["latents: videodit" if name.startswith("latents") else "videodit"]
        # Of rounds, as the machine's speed drifts between them.
        table.add_row(name, f"{value:.1f}", f"{statistics.median(x / y for x, y in zip(measured[name], base)):.3f}")
    console.print(table)
    order = order_seconds()
    node = shards_of_a_node()
    console.print(f"{bucket}; memory {memory}; order of a million clips {order}; shards {node}")
    facts = {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}
    result = {"machine": machine_facts(), "options": facts, "bucket": bucket, "clips_per_s": rates, "rounds": measured}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(
        json.dumps(result | {"memory": memory, "order": order, "shards": node, "index": index}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
