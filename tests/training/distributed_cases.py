"""Cases for one or more ranks: `torchrun --nproc-per-node 2 -m tests.training.distributed_cases FOLDER [slow]`.

Many cases share one process group, since a launch costs seconds. Every rank asserts; rank 0 writes name -> ""
or traceback to FOLDER/report.json.
"""

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from tests import tiny
from tests.training import toy
from videodit.data.latent_reader import LatentDataConfig
from videodit.generation.pipeline import TextToVideo
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.token_layout import WHOLE
from videodit.models.vae import VideoVAE
from videodit.parallel.mesh import Mesh, World, barrier, gather_objects, init_process, leave, shutdown
from videodit.parallel.watch import watching
from videodit.planning.footprint import LiveBytes, ParameterCount, count_parameters
from videodit.planning.memory import BUCKET_BYTES, rank_memory
from videodit.training import checkpoint_writer, tensor_file
from videodit.training.batched_muon import BatchedMuon
from videodit.training.checkpoint import load_latest, steps_in
from videodit.training.checkpoint_writer import CheckpointWriter
from videodit.training.dit_config import DiTRunConfig
from videodit.training.dit_model import build_model, compile_blocks
from videodit.training.ema import PowerEMA
from videodit.training.engine import Engine, sharded_construction
from videodit.training.held_out import HeldOutLoss
from videodit.training.optim import OptimConfig
from videodit.training.run_folder import RunFolder

Case = Callable[[World], None]
CASES: dict[str, Case] = {}  # every pair of (stage, dtype, optimizer, function) is met here
SLOW_CASES: dict[str, Case] = {}  # the rest of the matrix


def add(function: Callable[..., None], *args: object, slow: bool = False) -> None:
    """Registers a function with arguments as a case."""
    name = "-".join([function.__name__, *map(str, args)])
    (SLOW_CASES if slow else CASES)[name] = lambda world: function(world, *args)


def gradient_of_global_mean(world: World, stage: int, micro: int) -> None:
    """Any number of ranks and micro batches trains as one plain process does on the whole batch."""
    weights, norms = toy.train_plain(4)
    engine = toy.make_engine(world, stage)
    results = toy.train(engine, world, 1, 4, micro)
    torch.testing.assert_close(torch.tensor([r.grad_norm for r in results]), torch.tensor(norms), rtol=1e-5, atol=0)
    state = toy.full_state(engine)
    for name, weight in weights.items():
        torch.testing.assert_close(state[f"weight/{name}"].view(weight.shape), weight, rtol=1e-5, atol=2e-6)


def muon_gradient_norm(world: World, stage: int, dtype: str) -> None:
    """With Muon the reported norm is still that of the raw gradient, and matrices move by an orthogonal step."""
    _, norms = toy.train_plain(1)
    engine = toy.make_engine(world, stage, dtype, "muon")
    before = toy.full_state(engine)
    (result,) = toy.train(engine, world, 1, 1, micro=2)
    tolerance = 1e-4 if dtype == "fp32" else 0.03
    assert abs(result.grad_norm / norms[0] - 1) < tolerance, (result, norms)
    after = toy.full_state(engine)
    lr, decay = toy.optim_config("muon").muon_lr / 3, 1 - toy.optim_config("muon").muon_lr / 3 * 0.1
    for name in ("up.weight", "down.weight"):
        shape = engine.shapes[name]
        update = (before[f"weight/{name}"] * decay - after[f"weight/{name}"]).view(shape) / lr
        singular = torch.linalg.svdvals(update) / max(1, shape[0] / shape[1]) ** 0.5
        # The gradient's rank is 4 behind the layer norm, and 3 before the last layer.
        rank = {"up.weight": 4, "down.weight": 3}[name]
        assert 0.5 < singular[:rank].min() and singular.max() < 1.4, (name, singular)


def batched_muon(world: World) -> None:
    """Orthogonalised together, in float32 as DeepSpeed does here, matrices and momenta become what DeepSpeed's do."""
    from deepspeed.runtime.zero.muon import original_muon

    states = []
    for batched in (True, False):
        engine = toy.make_engine(world, 1, "bf16", "muon")
        optimizer = engine._deepspeed.optimizer
        assert "_prepare_muon_updates" in vars(optimizer)  # the engine batches them by itself
        del optimizer._prepare_muon_updates
        if batched:
            BatchedMuon(optimizer, torch.float32, original_muon)
        toy.train(engine, world, 1, 4, micro=2)
        states.append(toy.full_state(engine))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.allclose(value, states[1][name], rtol=1e-4, atol=1e-5), (name, value, states[1][name])


def resume(world: World, stage: int, dtype: str, name: str) -> None:
    """2N steps give bit for bit what N steps, a checkpoint, a new engine and N steps give, averages and metrics too."""
    engine = toy.make_engine(world, stage, dtype, name)
    ema = PowerEMA(engine.slices())
    folder = toy.shared_folder()
    assert not toy.save(folder / "start", 0, engine, ema)
    first = toy.train(engine, world, 1, 3, 2, ema)
    assert not toy.save(folder, 3, engine, ema, {"seen": 24})
    straight = toy.train(engine, world, 4, 6, 2, ema)
    again = toy.make_engine(world, stage, dtype, name)
    again_ema = PowerEMA(again.slices())
    checkpoint = load_latest(folder)
    assert checkpoint is not None and checkpoint.step == 3
    assert checkpoint.restore(again, again_ema) == {"seen": 24}
    assert again.optimizer_step == 3
    resumed = toy.train(again, world, 4, 6, 2, again_ema)
    assert straight == resumed
    toy.assert_same(toy.full_state(engine, ema), toy.full_state(again, again_ema))
    checkpoint.restore(engine, ema)  # going back while training
    assert toy.train(engine, world, 4, 6, 2, ema) == straight
    toy.assert_same(toy.full_state(engine, ema), toy.full_state(again, again_ema))
    start = load_latest(folder / "start")
    assert start is not None
    start.restore(engine, ema)  # to before the first update
    assert engine.optimizer_step == 0
    assert toy.train(engine, world, 1, 3, 2, ema) == first
    toy.assert_same(toy.full_state(engine, ema), toy.whole(checkpoint))


def change_stage(world: World, old: int, new: int, name: str) -> None:
    """A checkpoint of one stage loads at another and saves again to the same bits; the module computes the same."""
    engine = toy.make_engine(world, old, name=name)
    ema = PowerEMA(engine.slices())
    toy.train(engine, world, 1, 2, 1, ema)
    folder = toy.shared_folder()
    assert not toy.save(folder, 2, engine, ema)
    other = toy.make_engine(world, new, name=name)
    other_ema = PowerEMA(other.slices())
    checkpoint = load_latest(folder)
    assert checkpoint is not None
    checkpoint.restore(other, other_ema)
    toy.assert_same(toy.whole(checkpoint), toy.full_state(other, other_ema))
    clip, token, *_ = toy.batch(9)
    assert torch.equal(engine(clip, token), other(clip, token))


def change_stage_8bit(world: World, old: int, new: int) -> None:
    """Weights and averages keep their bits; moments in other blocks are rounded anew, and train on nearly the same."""
    engine = toy.make_engine(world, old, name="adamw8bit")
    ema = PowerEMA(engine.slices())
    toy.train(engine, world, 1, 2, 1, ema)
    folder = toy.shared_folder()
    assert not toy.save(folder, 2, engine, ema)
    checkpoint = load_latest(folder)
    assert checkpoint is not None
    ends = []
    for optimizer in ("adamw8bit", "adamw"):  # which both read the moments of both
        other = toy.make_engine(world, new, name=optimizer)
        other_ema = PowerEMA(other.slices())
        checkpoint.restore(other, other_ema)
        was, now = toy.whole(checkpoint), toy.full_state(other, other_ema)
        assert was.keys() == now.keys()
        for key, value in was.items():
            moment = key.startswith("exp_avg") and optimizer == "adamw8bit"
            # Half of the widest gap of the maps, times the largest value that may be in the same block.
            kind = key.split("/")[0]
            largest = max(float(other.abs().max()) for name, other in was.items() if name.startswith(f"{kind}/"))
            bound = 0.9 / 64 / 2 * largest if moment else 0.0
            assert (now[key] - value).abs().max() <= bound, (key, bound)
        results = toy.train(other, world, 3, 6, 1, other_ema)
        ends.append([result.grad_norm for result in results])
    straight = [result.grad_norm for result in toy.train(engine, world, 3, 6, 1, ema)]
    for end in ends:
        torch.testing.assert_close(torch.tensor(end), torch.tensor(straight), rtol=0.02, atol=0)


def slices_tile(world: World, stage: int) -> None:
    """Over all ranks every element is owned once."""
    engine = toy.make_engine(world, stage)
    mine = [(part.name, part.start, part.weight.numel()) for part in engine.slices()]
    pieces = sorted(item for part in gather_objects(mine) for item in part)
    for name, shape in engine.shapes.items():
        end = 0
        for _, start, length in [item for item in pieces if item[0] == name]:
            assert start == end
            end = start + length
        assert end == torch.Size(shape).numel()


def save_beside_training(world: World, stage: int) -> None:
    """What is written is the state at the save, though all ranks train on meanwhile, with collectives of their own."""
    engine = toy.make_engine(world, stage)
    ema = PowerEMA(engine.slices())
    toy.train(engine, world, 1, 2, 1, ema)
    at_save = toy.full_state(engine, ema)
    folder = toy.shared_folder()
    writer = CheckpointWriter(folder, engine, ema)
    for step in (2, 12):
        writer.save(step)
        toy.train(engine, world, step + 1, step + 10, 1, ema)
        written = writer.wait()
        assert written is not None and (written.step, written.problem) == (step, "")
        if step == 2:
            checkpoint = load_latest(folder)
            assert checkpoint is not None
            toy.assert_same(toy.whole(checkpoint), at_save)
    assert gather_objects(steps_in(folder)) == [[2, 12]] * world.size


def full_disk_of_one_rank(world: World) -> None:
    """Every rank is told which rank failed, the old checkpoint stays, and the next save works."""
    engine = toy.make_engine(world, 1)
    folder = toy.shared_folder()
    writer = CheckpointWriter(folder, engine)
    expected = ["", f"rank {world.size - 1}: No space left", ""]
    write = checkpoint_writer.save_file
    for step, problem in enumerate(expected, start=1):

        def full(*args: Any, failing: bool = bool(problem) and world.rank == world.size - 1) -> None:
            if failing:
                raise OSError("No space left")
            write(*args)

        checkpoint_writer.save_file = full
        try:
            writer.save(step)
            written = writer.wait()
        finally:
            checkpoint_writer.save_file = write
        assert written is not None and written.problem == (problem if world.size > 1 else problem[8:])
        checkpoint = load_latest(folder)
        assert checkpoint is not None and checkpoint.step == (1 if problem else step)
    assert not list((folder / "checkpoints").glob(".*"))


def slow_disk_is_no_hang(world: World) -> None:
    """A save, and a resume's hashing on rank 0, that take longer than the watch lets a rank stay where it is."""
    engine, folder = toy.make_engine(world, 1), toy.shared_folder()
    sync, read_bytes = os.fsync, Path.open
    limit_s, pause_s, pieces = 3.0, 0.8, 6

    def slow_sync(handle: int) -> None:
        time.sleep(pause_s)
        sync(handle)

    class SlowFile(io.BufferedReader):
        def read(self, size: int | None = -1, /) -> bytes:
            time.sleep(pause_s)
            return super().read(math.ceil(os.fstat(self.fileno()).st_size / pieces))

    def slow_open(path: Path, mode: str = "r", *args: Any, **options: Any) -> Any:
        slow = mode == "rb" and path.suffix == ".safetensors"
        return SlowFile(io.FileIO(path)) if slow else read_bytes(path, mode, *args, **options)

    chunk = tensor_file.CHUNK_BYTES
    with watching(world, limit_s):
        os.fsync, tensor_file.CHUNK_BYTES = slow_sync, 400
        try:
            assert not toy.save(folder, 1, engine)
        finally:
            os.fsync, tensor_file.CHUNK_BYTES = sync, chunk
        Path.open = slow_open
        try:
            checkpoint = load_latest(folder)
        finally:
            Path.open = read_bytes
    assert checkpoint is not None
    toy.assert_same(toy.whole(checkpoint), toy.full_state(engine))


def offload_changes_nothing(world: World, stage: int, dtype: str) -> None:
    """With the optimizer on the CPU the run is that without, also when each goes on from the other's checkpoint."""
    states, results = [], []
    folder = toy.shared_folder()
    for name in ("adamw", "offload"):
        engine = toy.make_engine(world, stage, dtype, name)
        ema = PowerEMA(engine.slices())
        results.append(toy.train(engine, world, 1, 3, 2, ema))
        assert not toy.save(folder / name, 3, engine, ema)
        states.append(toy.full_state(engine, ema))
    check_alike(states, results)
    ends, end_results = [], []
    for name, saved in (("adamw", "offload"), ("offload", "adamw")):
        engine = toy.make_engine(world, stage, dtype, name)
        ema = PowerEMA(engine.slices())
        checkpoint = load_latest(folder / saved)
        assert checkpoint is not None
        checkpoint.restore(engine, ema)
        toy.assert_same(toy.full_state(engine, ema), states[saved == "offload"])
        end_results.append(toy.train(engine, world, 4, 6, 1, ema))
        ends.append(toy.full_state(engine, ema))
    check_alike(ends, end_results)


def check_alike(states: list[dict[str, torch.Tensor]], results: list[list[Any]]) -> None:
    """Of two runs: norms and states differ by rounding at most, since a norm is summed in another order."""
    norms = [torch.tensor([result.grad_norm for result in part]) for part in results]
    torch.testing.assert_close(*norms, rtol=1e-6, atol=0)
    assert states[0].keys() == states[1].keys()
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=1e-6, atol=1e-7)


def average_in_module(world: World, stage: int, dtype: str) -> None:
    """Inside `using` the module computes with the average, afterwards training goes on untouched."""
    engine = toy.make_engine(world, stage, dtype)
    ema = PowerEMA(engine.slices())
    toy.train(engine, world, 1, 3, 1, ema)
    before = toy.full_state(engine, ema)
    clip, token, *_ = toy.batch(9)
    clip = clip.to(engine.dtype)
    with engine.using(ema.averages[0]), torch.no_grad():
        got = engine(clip, token)
    module = toy.make_toy().to(engine.dtype)
    module.load_state_dict({name: before[f"ema0/{name}"].view(shape) for name, shape in engine.shapes.items()})
    torch.testing.assert_close(got, module(clip, token), rtol=0, atol=0)
    toy.assert_same(before, toy.full_state(engine, ema))


def held_out_loss(world: World, stage: int) -> None:
    """Each rank's share adds up to what one rank measures on all clips, with weights in parts too."""
    data = LatentDataConfig(shards=f"{sys.argv[1]}/latents")  # made by who launched this: encode is a run of its own
    shape = dataclasses.replace(tiny.DIT, micro_conditioning=True)
    config = DiTRunConfig(
        run_dir="unused", data=data, eval_shards=data.shards, model=shape, text=tiny.TEXT, micro_batch_size=1
    )
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.normal_(model.dit.patch_out.weight)  # a fresh model predicts 0
    engine = Engine(model, toy.optim_config(), zero_stage=stage, dtype="fp32", world=world, max_steps=toy.MAX_STEPS)
    ema = PowerEMA(engine.slices())
    with engine.using(ema.averages[0]) as module:
        shares, whole = (
            HeldOutLoss(config, mesh, lambda shape: WHOLE).measure(module)
            for mesh in (Mesh(world.rank, world.size), Mesh(0, 1))
        )
    for name, loss in whole.items():
        assert abs(shares[name] - loss) < 1e-6 * loss, (name, shares[name], loss)
    assert gather_objects(shares) == [shares] * world.size


def refuse(asked: list[float], norm: float) -> bool:
    """Says no, and keeps what it was asked."""
    asked.append(norm)
    return False


@contextlib.contextmanager
def spoilt_gradient(layer: nn.Module) -> Iterator[None]:
    """What runs inside gets an infinite gradient in this layer's weights, and finite ones elsewhere."""
    spoil = layer.register_forward_hook(lambda _, __, out: out.register_hook(lambda grad: grad * float("inf")) and None)
    yield
    spoil.remove()


def dropped_step(world: World, stage: int, dtype: str, name: str, first: bool) -> None:
    """A dropped step leaves no trace: not finite on one rank, or not wanted by all; at the first step or later."""
    engine, other = (toy.make_engine(world, stage, dtype, name) for _ in range(2))
    ema, other_ema = (PowerEMA(e.slices()) for e in (engine, other))
    if not first:
        toy.train(engine, world, 1, 1, ema=ema)
        toy.train(other, world, 1, 1, ema=other_ema)
    clip, token, *_ = toy.batch(1)
    clip = clip.to(engine.dtype)
    output = engine(clip, token)
    for fault in ("nan in the loss", "inf in one layer", "refused"):
        hit = fault != "refused" and world.rank == world.size - 1
        with spoilt_gradient(engine.module.conv) if hit and "layer" in fault else contextlib.nullcontext():  # type: ignore[arg-type]
            loss = engine(clip, token).float().square().sum()
        engine.backward(loss * (float("nan") if hit and "loss" in fault else 1.0))
        asked: list[float] = []
        result = engine.step(2, partial(refuse, asked))
        assert not result.applied and bool(asked) == (fault == "refused"), (fault, asked)
        known = name != "muon" or (stage, dtype) == (1, "bf16")
        assert result.grad_norm == (asked[0] if asked and known else float("inf"))
        assert torch.equal(engine(clip, token), output)
        engine.backward(engine(clip, token).sum() * 0)  # what that forward pass began
        assert not engine.step(2, lambda norm: False).applied
    if not first:
        toy.assert_same(toy.full_state(engine, ema), toy.full_state(other, other_ema))
    assert engine.optimizer_step == other.optimizer_step
    results = [toy.train(e, world, 3, 4, ema=a) for e, a in ((engine, ema), (other, other_ema))]
    assert results[0] == results[1] and results[0][0].applied
    toy.assert_same(toy.full_state(engine, ema), toy.full_state(other, other_ema))


def save_for_one_rank(world: World, folder: str) -> None:
    """Leaves checkpoints that a test loads on one rank."""
    for name in ("adamw", "muon"):
        engine = toy.make_engine(world, 2, name=name)
        ema = PowerEMA(engine.slices())
        toy.train(engine, world, 1, 2, 1, ema)
        assert not toy.save(Path(folder) / name, 2, engine, ema)


def memory_as_planned(world: World, stage: int, dtype: str, name: str) -> None:
    """At most, in backward, a rank holds what `rank_memory` says, to a tenth; buckets of one size left out of both."""
    offload, name = name == "offload", "adamw" if name == "offload" else name
    options: dict[str, Any] = {"zero_stage": stage, "dtype": dtype, "max_steps": 9, "offload": offload}
    with LiveBytes(meta=False) as live:
        module = nn.Sequential(*(nn.Linear(400, 400) for _ in range(8)))  # matrices that ZeRO-3 does shard
        engine = Engine(module, toy.optim_config(name), world=world, **options)
        ema = PowerEMA(engine.slices())
        for micro in (1, 2, 3):
            if micro == 2:
                engine.step(1)
            live.peak = live.now
            engine.backward(engine(torch.randn(2, 400, dtype=engine.dtype)).float().square().mean())
    if stage == 0 and not world.is_main:
        return  # the plan is for the fullest rank, which has the averages
    planned = rank_memory(
        count_parameters(module) if stage < 3 else ParameterCount(8 * 400 * 401, 8 * 400, plain=8 * 400),
        0.0,
        zero_stage=stage,
        ranks=world.size,
        dtype=engine.dtype,
        optimizer=name,
        ema_profiles=len(ema.profiles),
        offload=offload,
    ).in_one_place()
    bucket = max(size for size in (0, BUCKET_BYTES // 2, BUCKET_BYTES) if size < planned.gradients)
    ratio = (planned.total - bucket) / (live.peak - bucket)
    assert abs(ratio - 1) < 0.1, (ratio, planned, live.peak)


def sharded_from_the_start(world: World, dtype: str, name: str) -> None:
    """At ZeRO-3 a model is built in parts, has the weights of one that is built whole, and trains the same."""
    shape = DiTConfig(
        in_channels=4, hidden_size=96, depth=6, num_heads=2, text_dim=16, frequency_dim=32, micro_conditioning=True
    )
    size = 4 * sum(p.numel() for p in VideoDiT(shape).parameters())
    latents, mask = torch.randn(2, 4, 2, 4, 4), torch.ones(2, 3, dtype=torch.bool)
    told = {"micro_conditions": torch.tensor([[48.0, 64.0, 0.0, 3.0, 8.0], [90.0, 50.0, 4.0, 0.0, 24.0]])}
    states, results = [], []
    for sharded in (False, True):
        torch.manual_seed(3)
        with LiveBytes() as live:
            if sharded:
                with sharded_construction(3, world):
                    model = VideoDiT(shape)
            else:
                model = VideoDiT(shape)
        assert (live.peak < 0.75 * size) == sharded or not sharded, (live.peak, size)
        config = toy.optim_config(name)
        engine = Engine(model, config, zero_stage=3, dtype=dtype, world=world, max_steps=9)  # type: ignore[arg-type]
        states.append(toy.full_state(engine))
        for step in (1, 2):
            text = torch.ones(2, 3, 16, dtype=engine.dtype)
            out = engine(latents.to(engine.dtype), torch.full((2,), 0.5), text, mask, **told).float()
            engine.backward((out - latents).square().mean() / world.size)
            results.append(engine.step(step).grad_norm)
        with engine.using([part.weight for part in engine.slices()]) as module, torch.no_grad():  # sampling
            out = module(latents.to(engine.dtype), torch.full((2,), 0.5), text, mask, **told)
            results.append(float(out.float().sum()))
    toy.assert_same(*states)
    assert results[:3] == results[3:], results


def compiled(world: World, stage: int, policy: str) -> None:
    """Compiled blocks are one graph for each kind, ZeRO-3's hooks or not, train and sample as eager ones do."""
    # Matrices that ZeRO-3 does shard: those of the text's keys and values, which are made outside of the blocks, too.
    shape = DiTConfig(in_channels=4, hidden_size=320, depth=4, num_heads=2, text_dim=16, frequency_dim=32)
    latents, sigma, mask = torch.randn(2, 4, 2, 4, 4), torch.full((2,), 0.5), torch.ones(2, 3, dtype=torch.bool)
    text = torch.ones(2, 3, 16)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")  # graphs as inductor gets them, run as they are
    found: list[list[float]] = []
    for compiles in (False, True):
        torch.manual_seed(3)
        with sharded_construction(stage, world):
            model = VideoDiT(shape)
        model.checkpointing = policy
        if compiles:
            compile_blocks(model, backend=counter)
        engine = Engine(model, toy.optim_config(), zero_stage=stage, dtype="fp32", world=world, max_steps=9)
        found.append([])
        for step in (1, 2, 3):
            out = engine(latents, sigma, text, mask)
            engine.backward((out - latents).square().mean() / world.size)
            found[-1].append(engine.step(step).grad_norm)
        assert counter.frame_count == 2 * compiles, counter.frame_count
        for _ in range(2):
            with engine.using([part.weight for part in engine.slices()]) as module, torch.no_grad():
                context = module.text_context(text, mask)  # type: ignore[operator]
                found[-1].append(float(module(latents, sigma, context).square().sum()))
        engine.backward((engine(latents, sigma, text, mask) - latents).square().mean() / world.size)
        found[-1].append(engine.step(4).grad_norm)
    torch.testing.assert_close(torch.tensor(found[1]), torch.tensor(found[0]), rtol=1e-5, atol=0)
    assert found[0][0] > 0, found


class FrugalEngine(Engine):
    """Gathers as little as it can, as DeepSpeed does by itself from 1e9 weights on."""

    def _deepspeed_config(self) -> dict[str, Any]:
        config = super()._deepspeed_config()
        frugal = ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size", "param_persistence_threshold")
        config["zero_optimization"] |= {"reduce_bucket_size": 100_000} | {f"stage3_{name}": 0 for name in frugal}
        return config


def trains_and_samples_in_parts(world: World) -> None:
    """At ZeRO-3 no pass, of training or of sampling, brings the whole model together on a rank."""
    shape = DiTConfig(in_channels=4, hidden_size=192, depth=8, num_heads=2, text_dim=16, frequency_dim=32)
    with sharded_construction(3, world):
        model = VideoDiT(shape)
    model.checkpointing = "full"
    engine = FrugalEngine(model, toy.optim_config(), zero_stage=3, dtype="fp32", world=world, max_steps=9)
    size = 4 * sum(torch.Size(shape).numel() for shape in engine.shapes.values())
    latents, sigma, mask = torch.randn(2, 4, 2, 4, 4), torch.full((2,), 0.5), torch.ones(2, 3, dtype=torch.bool)
    text = torch.ones(2, 3, 16)
    for step in (1, 2):  # the second knows the order of the first
        with LiveBytes() as live:
            loss = (engine(latents, sigma, text, mask) - latents).square().mean() / world.size
            forward = live.peak
            engine.backward(loss)
        assert engine.step(step).applied
        # This rank's part of the gradients stays.
        assert forward < 0.4 * size and live.peak < size / world.size + 0.5 * size, (forward, live.peak, size)
    with engine.using([part.weight for part in engine.slices()]) as module, torch.no_grad(), LiveBytes() as live:
        context = module.text_context(text, mask)  # type: ignore[operator]
        for _ in range(2):
            module(latents, sigma, context)
    assert live.peak < 0.2 * size, (live.peak, size)


def samples_alike(world: World, first: int, second: int) -> None:
    """With a run's weights, trained or averaged, another stage draws the same latents, to rounding, on every rank."""
    # Some matrices are above what ZeRO-3 keeps whole, and an average is not what was gathered last.
    shape = dataclasses.replace(tiny.DIT, hidden_size=320)
    config = DiTRunConfig(run_dir="unused", data=LatentDataConfig(shards="unused"), model=shape, text=tiny.TEXT)
    vae, folder, prompts = VideoVAE(tiny.VAE).eval(), toy.shared_folder(), ["a red disc", "two blue squares"]
    drawn: list[list[torch.Tensor]] = []
    for stage in (first, second):
        torch.manual_seed(3)
        with sharded_construction(stage, world):
            model = build_model(config)
        optim = OptimConfig(lr=1e-2, warmup_steps=0)
        engine = Engine(model, optim, zero_stage=stage, dtype="fp32", world=world, max_steps=9)
        ema = PowerEMA(engine.slices(), [0.28])  # the longest there is: after few steps others are nearly the weights
        if stage == first:
            for step in (1, 2, 3):
                torch.manual_seed(step)
                out = engine(torch.randn(2, 4, 3, 4, 4), torch.rand(2, 3), prompts)
                engine.backward((out - 1).square().mean() / world.size)
                engine.step(step)
                ema.update(step)
            assert not toy.save(folder, 3, engine, ema)
        else:
            checkpoint = load_latest(folder)
            assert checkpoint is not None
            checkpoint.restore(engine, ema)
        drawn.append([])
        for weights in (ema.averages[0], [part.weight for part in engine.slices()]):
            with engine.using(weights) as module:
                pipe = TextToVideo(module, vae, module.text_encoder, config.flow, tiny.SAMPLING)  # type: ignore[arg-type]
                drawn[-1].append(pipe.sample_latents(prompts, seed=5))
    for one, other in zip(*drawn, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(one.abs().max()))
        assert all(torch.equal(other, rank) for rank in gather_objects(other))
    assert (drawn[0][0] - drawn[0][1]).abs().max() > 1e-2, "the average is the weights"


def errors_reach_all_ranks(world: World) -> None:
    """A folder that rank 0 cannot take is an error on every rank, not a hang."""
    from videodit.errors import UserError

    folder = toy.shared_folder()
    with RunFolder.open(folder, "model: 1", world):
        barrier()
        try:
            RunFolder.open(folder, "model: 1", world)
        except UserError as error:
            assert "in use" in str(error)
        else:
            raise AssertionError("a second run took the folder")


for _stage in (0, 1, 2, 3):
    add(gradient_of_global_mean, _stage, 1, slow=_stage in (0, 2))
    add(gradient_of_global_mean, _stage, 2, slow=_stage in (1, 3))
    add(slices_tile, _stage, slow=_stage == 2)
for _stage in (0, 1, 2, 3):
    for _dtype, _name in (("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon"), ("bf16", "muon")):
        if _stage > 0 or (_dtype, _name) == ("fp32", "adamw"):
            _quick = [(0, "fp32", "adamw"), (1, "bf16", "muon"), (1, "fp32", "muon"), (2, "fp32", "adamw")]
            _quick += [(2, "bf16", "adamw"), (3, "bf16", "adamw"), (3, "fp32", "muon")]
            add(resume, _stage, _dtype, _name, slow=(_stage, _dtype, _name) not in _quick)
            add(dropped_step, _stage, _dtype, _name, False, slow=(_stage, _dtype, _name) not in _quick)
            add(dropped_step, _stage, _dtype, _name, True, slow=True)
for _stage, _dtype in ((0, "fp32"), (1, "bf16"), (2, "fp32"), (3, "bf16")):
    add(average_in_module, _stage, _dtype, slow=_stage == 2)
for _stage, _dtype in ((1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (2, "bf16")):
    add(muon_gradient_norm, _stage, _dtype, slow=(_stage, _dtype) in ((1, "fp32"), (2, "bf16")))
for _pair in ((0, 1), (1, 3), (3, 2), (2, 0)):
    add(change_stage, *_pair, "adamw", slow=_pair == (3, 2))
for _pair in ((1, 3), (3, 2), (2, 1)):
    add(change_stage, *_pair, "muon", slow=_pair == (2, 1))
for _stage in (0, 1, 3):
    add(save_beside_training, _stage, slow=_stage == 0)
for _stage, _dtype in ((0, "fp32"), (1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
    add(resume, _stage, _dtype, "adamw8bit", slow=(_stage, _dtype) not in ((1, "bf16"), (3, "bf16")))
    add(dropped_step, _stage, _dtype, "adamw8bit", False, slow=(_stage, _dtype) != (3, "fp32"))
for _pair in ((0, 1), (1, 3), (3, 2), (2, 0)):
    add(change_stage_8bit, *_pair, slow=_pair != (1, 3))
add(full_disk_of_one_rank)
add(slow_disk_is_no_hang, slow=True)
add(errors_reach_all_ranks)
add(batched_muon)
for _stage, _dtype, _name in ((0, "fp32", "adamw"), (1, "fp32", "adamw"), (2, "bf16", "adamw"), (3, "fp32", "adamw")):
    add(memory_as_planned, _stage, _dtype, _name)
for _stage in (1, 3):
    add(held_out_loss, _stage)
for _stage, _policy in ((3, "full"), (3, "none"), (1, "none")):
    add(compiled, _stage, _policy, slow=_policy == "none")
add(trains_and_samples_in_parts)
for _pair in ((1, 3), (3, 0)):
    add(samples_alike, *_pair, slow=_pair != (1, 3))
for _dtype, _name in (("fp32", "adamw"), ("bf16", "adamw"), ("fp32", "muon")):
    add(sharded_from_the_start, _dtype, _name, slow=_name == "muon" or _dtype == "bf16")
for _stage, _dtype, _name in ((1, "bf16", "adamw"), (2, "fp32", "adamw"), (3, "bf16", "adamw"), (1, "fp32", "muon")):
    add(memory_as_planned, _stage, _dtype, _name, slow=True)
for _stage, _dtype in ((1, "fp32"), (3, "bf16")):
    add(memory_as_planned, _stage, _dtype, "adamw8bit", slow=_stage == 1)
for _stage in (1, 2, 3):
    for _dtype in ("fp32", "bf16"):
        add(offload_changes_nothing, _stage, _dtype, slow=(_stage, _dtype) not in ((1, "bf16"), (3, "bf16")))
        add(resume, _stage, _dtype, "offload", slow=(_stage, _dtype) != (2, "fp32"))
        add(dropped_step, _stage, _dtype, "offload", False, slow=(_stage, _dtype) != (1, "bf16"))
        add(dropped_step, _stage, _dtype, "offload", True, slow=True)
        add(memory_as_planned, _stage, _dtype, "offload", slow=(_stage, _dtype) != (2, "fp32"))


def run_all(world: World, cases: dict[str, Case]) -> dict[str, str]:
    """Runs every case; "" for a pass, else the traceback of the first rank that failed."""
    results = {}
    for name, function in cases.items():
        try:
            function(world)
            mine = ""
        except Exception:
            mine = traceback.format_exc()
        results[name] = next((text for text in gather_objects(mine) if text), "")
    return results


if __name__ == "__main__":
    this = init_process("cpu")
    add(save_for_one_rank, sys.argv[1])
    found = run_all(this, SLOW_CASES if sys.argv[2:] == ["slow"] else CASES)
    if this.is_main:
        (Path(sys.argv[1]) / "report.json").write_text(json.dumps(found))
    shutdown()
    leave(0)
