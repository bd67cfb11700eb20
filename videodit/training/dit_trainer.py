"""`videodit train dit`: the text-to-video DiT on latents, with its own text encoder or a frozen one's embeddings."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from videodit.config import to_yaml
from videodit.data.field import preview
from videodit.data.loader import LatentBatch, LatentLoader
from videodit.data.mp4 import write_mp4
from videodit.data.randomness import sample_noise, sample_uniform
from videodit.device import choose_device, torch_dtype
from videodit.errors import UserError
from videodit.flow.loss import Weighting, flow_loss, frame_error, level_weight, likelihood_loss
from videodit.flow.noise_level import NoiseLevelConfig, frame_levels, frames_to_denoise, sigma_from_uniform
from videodit.flow.path import interpolate, target
from videodit.generation.pipeline import TextToVideo
from videodit.kernels.choice import choose_kernels
from videodit.models.dit import DiTConfig
from videodit.models.text import TextEncoder, TextFeatures
from videodit.models.text_prompts import EncodedPrompts
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.token_layout import WHOLE, TokenLayout
from videodit.models.vae_folder import load_vae
from videodit.parallel.mesh import Mesh, World, make_mesh
from videodit.parallel.sequence import split_layout
from videodit.planning.machines import device_memory
from videodit.planning.plan import choose_checkpointing
from videodit.planning.workload import DiTWorkload
from videodit.training.clip_seconds import ClipSeconds
from videodit.training.dit_config import DiTRunConfig, follow_latents, latent_encoders, warn_of_another_vae
from videodit.training.dit_model import (
    build_model,
    compile_blocks,
    fine_tuned,
    frozen_facts,
    frozen_text_encoder,
    read_text,
)
from videodit.training.engine import sharded_construction
from videodit.training.held_out import HeldOutLoss, check_held_out
from videodit.training.run import TrainingRun, micro_batch_tokens
from videodit.training.run_config import open_world, run_dtype
from videodit.training.stages import Stage, StagedLoader, stages_of


def train_dit(config: DiTRunConfig) -> Path:
    """Trains, or goes on training, a DiT.

    Args:
        config: of the run.
    Returns:
        The run folder.
    Raises:
        UserError: for latents, a VAE or a folder that cannot be used.
    """
    config = follow_latents(config)
    check_held_out(config)
    choose_kernels(config.kernels, choose_device(config.device))
    with open_world(config) as world, TrainingRun.open(config, to_yaml(config), world) as run:
        mesh = _mesh(config, world)
        layout_of = functools.partial(_layout, config.model, mesh)
        clip_flops: dict[torch.Size, int] = {}

        def count(stage: Stage[DiTRunConfig], loader: LatentLoader) -> None:
            # Before DeepSpeed starts: what it does to torch at ZeRO-3 falsifies the count.
            clip_flops.update(_clip_flops(stage.config, loader) if run.counts_flops else {})

        loader = StagedLoader(stages_of(config), functools.partial(_open_latents, mesh), count)
        with sharded_construction(config.zero_stage, world):
            model = fine_tuned(build_model(config), config)
        text_encoder = model.text_encoder or _read_prompts(config, world)
        policies = {stage.number: _checkpointing(stage.config, world) for stage in loader.stages}
        if config.compile:
            compile_blocks(model.dit, exchanging=mesh.sequence is not None)
        run.start(model)
        encoders = latent_encoders(config) if world.is_main else {}
        run.folder.freeze("encoders.json", encoders, fix="give it the latents that it began with")
        if world.is_main:
            warn_of_another_vae(config, encoders)
        if config.lora.rank:
            facts = frozen_facts(config) if world.is_main else {}
            run.folder.freeze("frozen.json", facts)
        times = ClipSeconds(run)
        loader.use_seconds(functools.partial(_measure_stage, run, model, times, policies, layout_of))
        run.accept(loader)
        times.freeze(free=loader.endings_after(run.step))
        held_out = HeldOutLoss(config, mesh, layout_of) if config.eval_shards else None
        evaluate = functools.partial(_evaluate, run, config, held_out, text_encoder)
        if run.evaluation_was_cut():
            evaluate()
        while run.running:
            data = loader.read(run.step + 1, run.next_data_step)
            model.dit.checkpointing = policies[data.stage.number]
            total = run.total_weight(data.batches, copies=world.size // mesh.data_size)
            levels = data.stage.config.noise_at(run.step + 1 - data.stage.steps_before)
            # Summed on the device: a figure that is fetched would wait for the kernels at every micro batch.
            sums = {name: torch.zeros((), device=world.device) for name in ("loss", "mse")}
            for batch in data.batches:
                losses = _micro_step(run, data.stage.config, batch, levels, total, layout_of)
                for name, value in losses.items():
                    sums[name] += value
            shape = batch.mean.shape
            frames, positions = token_shape(config.model, shape)
            tokens = micro_batch_tokens(data.batches, frames * positions, mesh.data_size)
            flops = micro_batch_tokens(data.batches, clip_flops.get(shape[1:], 0), mesh.data_size)
            run.finish_step(sums, bucket=data.plan.bucket, keys=data.keys, tokens=tokens, flops=flops)
            evaluate()
        run.finish()
    return Path(config.run_dir)


def _micro_step(
    run: TrainingRun,
    config: DiTRunConfig,
    batch: LatentBatch,
    levels: NoiseLevelConfig,
    total: float,
    layout_of: Callable[[torch.Size], TokenLayout],
) -> dict[str, Tensor]:
    """Forward and backward pass of a micro batch; its part of each loss, total being the weight of the whole step."""
    noisy = make_noisy(batch, config, levels)
    layout = layout_of(noisy.latents.shape)
    with run.meter.phase("forward"):
        text = read_text(batch, run.world.device, run.engine.dtype)
        loss, error = clip_losses(run, noisy, text, config.weighting, layout)
        share = batch.weight.to(run.world.device) / total
        loss = (share * loss).sum()
    with run.meter.phase("backward"):
        run.engine.backward(loss)
    return {"loss": loss.detach(), "mse": (share * error).sum()}


def _measure_stage(
    run: TrainingRun,
    model: TextToVideoModel,
    times: ClipSeconds,
    policies: Mapping[int, str],
    layout_of: Callable[[torch.Size], TokenLayout],
    stage: Stage[DiTRunConfig],
    loader: LatentLoader,
) -> Mapping[str, float]:
    """Seconds of a clip of each bucket, whole ones, computed as the stage will."""
    model.dit.checkpointing = policies[stage.number]
    config = stage.config

    def one_pass(batch: LatentBatch) -> None:
        _micro_step(run, config, batch, config.noise_at(1), config.micro_batch_size, layout_of)

    return times.of(loader, one_pass, stage.ending)


@dataclass
class NoisyBatch:
    """A micro batch on its way to the model.

    Attributes:
        latents: (b, c, t, h, w) what the model sees.
        sigma: (b, t) noise level of each latent frame.
        target: (b, c, t, h, w) what it should predict.
        weight: (b, t) weight of each latent frame in the loss.
        origin: (b, 2) where the clip lies in the latents that it is a window of, or None for whole ones.
        micro_conditions: (b, 5) of `MICRO_CONDITIONS`, given with and without caption; None where nobody knows.
    """

    latents: Tensor
    sigma: Tensor
    target: Tensor
    weight: Tensor
    origin: Tensor | None
    micro_conditions: Tensor | None


def make_noisy(batch: LatentBatch, config: DiTRunConfig, levels: NoiseLevelConfig) -> NoisyBatch:
    """Draws latent, noise, level and condition of each row: functions of (seed, epoch, sample) and the step's.

    Args:
        batch: clean latents.
        config: of the run, or its stage.
        levels: density of the noise levels in this step, see `DiTRunConfig.noise_at`.
    """
    seed, epochs, keys = config.seed, batch.epochs, batch.keys
    b, c, t, h, w = batch.mean.shape
    shape = (c, t, h, w)
    x0 = batch.draw(seed) if config.sample_posterior else batch.mean
    noise = sample_noise(seed, epochs, keys, shape, "noise")
    sigma = sigma_from_uniform(sample_uniform(seed, epochs, keys, "sigma"), levels)
    slope, focus = (sample_uniform(seed, epochs, keys, name) for name in ("frame slope", "focus frame"))
    pt = config.model.patch_size[0]
    patches = t // pt  # the frames of a patch have one level: the DiT is told one
    sigma = frame_levels(sigma, patches, slope, focus, levels)  # b patches
    weight = level_weight(sigma, config.weighting) * frames_to_denoise(sigma, levels)
    if config.condition_rate > 0 and patches > 1:  # of a single one nothing would be left to learn
        given = sample_uniform(seed, epochs, keys, "condition") < config.condition_rate
        count = (sample_uniform(seed, epochs, keys, "condition frames") * (patches - 1)).long() + 1
        clean = given[:, None] & (torch.arange(patches)[None] < count[:, None])  # 1 … patches - 1
        sigma, weight = sigma.masked_fill(clean, 0.0), weight.masked_fill(clean, 0.0)
    sigma, weight = (x.repeat_interleave(pt, dim=1) for x in (sigma, weight))  # b t
    level = sigma[:, None, :, None, None]
    latents = interpolate(config.flow.path, x0, noise, level)
    wanted = target(config.flow, x0, noise, level)
    return NoisyBatch(latents, sigma, wanted, weight, batch.origin, batch.micro_conditions)


def clip_losses(
    run: TrainingRun,
    noisy: NoisyBatch,
    text: list[str] | TextFeatures,
    weighting: Weighting,
    layout: TokenLayout = WHOLE,
) -> tuple[Tensor, Tensor]:
    """Runs the model: each clip's loss and, without gradient, its mean squared error; both (b,).

    Ranks that share the clips' tokens get the same losses: the sum of the rows' weights over all ranks, which each
    row's is divided by, counts such a clip once for each of them, and so each adds its part of the gradient.
    """
    device = run.world.device
    latents, sigma = run.cast(noisy.latents), noisy.sigma.to(device)
    target, weight = noisy.target.to(device), noisy.weight.to(device)
    options = {"origin": noisy.origin, "micro_conditions": noisy.micro_conditions, "layout": layout}
    if weighting == "learned":
        prediction, log_error = run.engine(latents, sigma, text, **options, with_level_error=True)
        error = frame_error(prediction, target)
        loss = likelihood_loss(error, weight, log_error)
    else:
        prediction = run.engine(latents, sigma, text, **options)
        error = frame_error(prediction, target)
        loss = flow_loss(error, weight)
    return loss, flow_loss(error.detach(), (weight > 0).float())


def token_shape(model: DiTConfig, shape: torch.Size) -> tuple[int, int]:
    """Frames, and tokens of a frame, of clips with latents of shape (b, c, t, h, w)."""
    pt, ph, pw = model.patch_size
    return shape[2] // pt, (shape[3] // ph) * (shape[4] // pw)


def _mesh(config: DiTRunConfig, world: World) -> Mesh:
    try:
        return make_mesh(world, config.sequence_parallel)
    except ValueError as error:
        raise UserError(str(error)) from None


def _open_latents(mesh: Mesh, config: DiTRunConfig) -> LatentLoader:
    return LatentLoader(
        config.data,
        seed=config.seed,
        global_batch_size=config.global_batch_size,
        micro_batch_size=config.micro_batch_size,
        batch_by=config.batch_by,
        rank=mesh.data_rank,
        world=mesh.data_size,
        crop=config.crop,
        crop_steps=config.crop_steps,
        patch=config.model.patch_size[1:],
        posterior=config.sample_posterior,
    )


def _layout(model: DiTConfig, mesh: Mesh, shape: torch.Size) -> TokenLayout:
    return split_layout(mesh.sequence, *token_shape(model, shape))


def _checkpointing(config: DiTRunConfig, world: World) -> str:
    """The policy of the run; with auto the first that fits the memory of this rank's device."""
    if config.checkpointing != "auto":
        return config.checkpointing
    dtype = torch_dtype(run_dtype(config, world.device))
    memory, on_cpu = device_memory(world.device), world.device.type == "cpu"
    return choose_checkpointing(config, memory, world.size, dtype, on_cpu=on_cpu)


def _read_prompts(config: DiTRunConfig, world: World) -> TextEncoder | None:
    """The prompts, read by the frozen encoder before training fills the memory; None if no samples will be drawn."""
    if not (config.prompts and config.sample_every):
        return None
    dtype = torch_dtype(run_dtype(config, world.device))
    return EncodedPrompts(frozen_text_encoder(config, world.device, dtype), config.prompts)


def _clip_flops(config: DiTRunConfig, loader: LatentLoader) -> dict[torch.Size, int]:
    """Of the DiT's forward and backward pass on a clip of each shape (c, t, h, w) of latents, windows too."""
    workload, counted = DiTWorkload(config), {}
    for c, t, h, w in loader.latent_shapes.values():
        for rows, columns in {(h, w), config.crop.size_in(h, w) if config.crop_steps else (h, w)}:
            shape = (c, t, rows, columns)
            counted[torch.Size(shape)] = workload.shape_flops(shape, "none")
    return counted


def _evaluate(
    run: TrainingRun, config: DiTRunConfig, held_out: HeldOutLoss | None, text_encoder: TextEncoder | None
) -> None:
    """What is due at the current step."""
    if held_out is not None and run.due(config.eval_every):
        _measure_held_out(run, held_out)
    if run.due(config.sample_every) and text_encoder and config.prompts:
        _draw_samples(run, config, text_encoder)


def _measure_held_out(run: TrainingRun, held_out: HeldOutLoss) -> None:
    """The weights as they are, whose curve answers at once, and averaged, which are what is exported."""
    figures: dict[str, float] = {}
    for weights, ending in (("raw", ""), ("ema", "_ema")):
        with run.evaluating(weights) as module:  # type: ignore[arg-type]
            measured = held_out.measure(module)
        figures |= {f"eval/{name}{ending}": value for name, value in measured.items()}
    run.log(figures)


def _draw_samples(run: TrainingRun, config: DiTRunConfig, text_encoder: TextEncoder) -> None:
    """Clips for the fixed prompts, always with the same seeds: NN.mp4, and raw-NN.mp4 with the weights as they are."""
    assert config.vae is not None  # follow_latents has set it
    folder = run.folder.path / "samples" / f"step-{run.step:08d}"
    for weights in ("ema", "raw") if config.sample_raw else ("ema",):
        with run.evaluating(weights) as module:  # type: ignore[arg-type]
            vae = load_vae(config.vae).to(run.world.device)
            pipe = TextToVideo(module, vae, text_encoder, config.flow, config.sampling)  # type: ignore[arg-type]
            clips = pipe(config.prompts, seed=config.seed)
        if not run.world.is_main:
            continue
        with run.keeping_samples():
            folder.mkdir(parents=True, exist_ok=True)
            videos = {}
            for row, (prompt, clip) in enumerate(zip(config.prompts, clips)):
                videos[prompt] = folder / f"{'raw-' if weights == 'raw' else ''}{row:02d}.mp4"
                write_mp4(videos[prompt], preview(clip), config.sampling.fps)
            run.log_videos(f"samples/{weights}", videos)
