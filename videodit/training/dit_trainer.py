"""`videodit train dit`: the text-to-video DiT on latents, with its own text encoder or a frozen one's embeddings."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from videodit.config import to_yaml
from videodit.data.field import preview
from videodit.data.loader import LatentBatch, LatentLoader
from videodit.data.mp4 import write_mp4
from videodit.data.randomness import sample_noise, sample_uniform
from videodit.device import choose_device, torch_dtype
from videodit.errors import UserError
from videodit.flow.loss import Weighting, flow_loss, level_weight, likelihood_loss
from videodit.flow.noise_level import NoiseLevelConfig, frame_levels, frames_to_denoise, sigma_from_uniform
from videodit.flow.path import interpolate, target
from videodit.generation.pipeline import TextToVideo
from videodit.kernels.choice import choose_kernels
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.dit_block import DiTBlock
from videodit.models.folder import read_weights
from videodit.models.initialise import whole
from videodit.models.level_error import LevelError
from videodit.models.text import ByteTextEncoder, TextEncoder, TextFeatures
from videodit.models.text_prompts import EncodedPrompts
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.text_transformers import TransformersTextEncoder
from videodit.models.token_layout import WHOLE, TokenLayout
from videodit.models.vae_folder import load_vae
from videodit.parallel.mesh import Mesh, World, make_mesh
from videodit.parallel.sequence import split_layout
from videodit.planning.machines import device_memory
from videodit.planning.plan import choose_checkpointing
from videodit.training.checkpoint import Checkpoint, load_average
from videodit.training.dit_config import DiTRunConfig, follow_latents
from videodit.training.engine import sharded_construction
from videodit.training.run import TrainingRun, micro_batch_tokens, open_world, run_dtype


def build_model(config: DiTRunConfig) -> TextToVideoModel:
    """The module of a run with fresh weights; without text_encoder if that is frozen."""
    encoder = None if config.text_encoder else ByteTextEncoder(config.text)
    level_error = LevelError() if config.weighting == "learned" else None
    return TextToVideoModel(VideoDiT(config.model), encoder, level_error)


def compile_blocks(dit: VideoDiT, *, exchanging: bool = False, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles each block where it stands, as one graph; blocks of a kind share it.

    Args:
        dit: its blocks are compiled when they first run.
        exchanging: whether ranks share a clip's tokens: full attention then exchanges them in the middle of a block,
            which may be two graphs.
        backend: of torch.compile.
    """
    for block in cast("Iterable[DiTBlock]", dit.blocks):
        block.compile(fullgraph=not (exchanging and block.kind == "f"), backend=backend)


@torch.no_grad()
def load_init(model: TextToVideoModel, folder: str) -> None:
    """Fills the DiT, and a text encoder that is trained with it, with a model folder's weights.

    Raises:
        UserError: if the folder is not whole, or its weights do not fit its config.
    """
    for name in ("dit", "text_encoder"):
        part = getattr(model, name)
        if part is None:
            continue
        weights = read_weights(Path(folder) / name)
        own = dict(part.named_parameters())
        if weights.keys() != own.keys():
            odd = sorted(weights.keys() ^ own.keys())[0]
            raise UserError(f"{Path(folder) / name} does not fit its config.json: {odd}; export the run again")
        for key, parameter in own.items():
            with whole(parameter):
                parameter.copy_(weights[key])


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
    choose_kernels(config.kernels, choose_device(config.device))
    with open_world(config) as world, TrainingRun.open(config, to_yaml(config), world) as run:
        mesh = _mesh(config, world)
        loader = LatentLoader(
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
        )
        with sharded_construction(config.zero_stage, world):
            model = build_model(config)
            if config.init:
                load_init(model, config.init)
        text_encoder = model.text_encoder or _read_prompts(config, world)
        model.dit.checkpointing = _checkpointing(config, world)
        if config.compile:
            compile_blocks(model.dit, exchanging=mesh.sequence is not None)
        run.start(model)
        run.accept(loader.batch_sizes)
        steps = loader.iterate(run.next_data_step)
        while run.running:
            plan, batches = next(steps)
            total = run.total_weight(batches)
            levels = config.noise_at(run.step + 1)
            sums = {"loss": torch.zeros(()), "mse": torch.zeros(())}
            for batch in batches:
                noisy = make_noisy(batch, config, levels)
                layout = _layout(config.model, mesh, noisy.latents.shape)
                loss, error = clip_losses(run, noisy, batch_text(batch, run), config.weighting, layout)
                share = batch.weight.to(world.device) / total
                loss = (share * loss).sum()
                run.engine.backward(loss)
                sums["loss"] += loss.detach().cpu()
                sums["mse"] += (share * error).sum().cpu()
            frames, positions = token_shape(config.model, noisy.latents.shape)
            tokens = micro_batch_tokens(batches, frames * positions, mesh.data_size)
            run.finish_step(sums, keys=loader.keys(plan), tokens=tokens)
            if run.time_to_sample() and text_encoder and config.prompts:
                _draw_samples(run, config, text_encoder)
        run.save()
    return Path(config.run_dir)


def export_dit(config: DiTRunConfig, checkpoint: Checkpoint, out: Path, ema: int = 0) -> None:
    """Writes the model folder of a run: averaged weights of DiT and text encoder (or where it lies), and the VAE.

    Args:
        config: of the run, as its folder has it.
        checkpoint: of the run.
        out: folder to write.
        ema: which average.
    """
    model = build_model(config)
    load_average(model, checkpoint, ema)
    assert config.vae is not None  # a run's own config has it
    vae = load_vae(config.vae)
    text_encoder = model.text_encoder or frozen_text_encoder(config)
    TextToVideo(model, vae, text_encoder, config.flow, config.sampling).save_pretrained(out)


def frozen_text_encoder(
    config: DiTRunConfig, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TransformersTextEncoder:
    """The encoder that made the latents' embeddings, for prompts.

    Raises:
        UserError: if its folder is gone.
    """
    assert config.text_encoder is not None  # a run without one has its own in the model
    return TransformersTextEncoder(config.text_encoder, config.text_max_length, device, dtype)


def batch_text(batch: LatentBatch, run: TrainingRun) -> list[str] | TextFeatures:
    """What the module reads: captions, or their embeddings on the run's device where a frozen encoder made them."""
    if batch.text is None or batch.text_mask is None:
        return batch.captions
    return TextFeatures(run.cast(batch.text), batch.text_mask.to(run.world.device))


@dataclass
class NoisyBatch:
    """A micro batch on its way to the model.

    Attributes:
        latents: (b, c, t, h, w) what the model sees.
        sigma: (b, t) noise level of each latent frame.
        target: (b, c, t, h, w) what it should predict.
        weight: (b, t) weight of each latent frame in the loss.
        origin: (b, 2) where the clip lies in the latents that it is a window of, or None for whole ones.
    """

    latents: Tensor
    sigma: Tensor
    target: Tensor
    weight: Tensor
    origin: Tensor | None


def make_noisy(batch: LatentBatch, config: DiTRunConfig, levels: NoiseLevelConfig) -> NoisyBatch:
    """Draws latent, noise, level and condition of each row: functions of (seed, epoch, sample) and the step's.

    Args:
        batch: clean latents.
        config: of the run.
        levels: density of the noise levels in this step, see `DiTRunConfig.noise_at`.
    """
    seed, epoch, keys = config.seed, batch.epoch, batch.keys
    b, c, t, h, w = batch.mean.shape
    shape = (c, t, h, w)
    x0 = batch.mean
    if config.sample_posterior:
        x0 = x0 + torch.exp(0.5 * batch.logvar) * sample_noise(seed, epoch, keys, shape, "posterior")
    noise = sample_noise(seed, epoch, keys, shape, "noise")
    sigma = sigma_from_uniform(sample_uniform(seed, epoch, keys, "sigma"), levels)
    slope, focus = (sample_uniform(seed, epoch, keys, name) for name in ("frame slope", "focus frame"))
    sigma = frame_levels(sigma, t, slope, focus, levels)  # b t
    weight = level_weight(sigma, config.weighting) * frames_to_denoise(sigma, levels)
    if config.condition_rate > 0:
        given = sample_uniform(seed, epoch, keys, "condition") < config.condition_rate
        count = (sample_uniform(seed, epoch, keys, "condition frames") * (t - 1)).long() + 1  # 1 … t - 1
        clean = given[:, None] & (torch.arange(t)[None] < count[:, None])
        sigma, weight = sigma.masked_fill(clean, 0.0), weight.masked_fill(clean, 0.0)
    level = sigma[:, None, :, None, None]
    latents = interpolate(config.flow.path, x0, noise, level)
    return NoisyBatch(latents, sigma, target(config.flow, x0, noise, level), weight, batch.origin)


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
    if weighting == "learned":
        options = {"origin": noisy.origin, "layout": layout, "with_level_error": True}
        prediction, log_error = run.engine(latents, sigma, text, **options)
        loss = likelihood_loss(prediction, target, weight, log_error)
    else:
        prediction = run.engine(latents, sigma, text, origin=noisy.origin, layout=layout)
        loss = flow_loss(prediction, target, weight)
    return loss, flow_loss(prediction.detach(), target, (weight > 0).float())


def token_shape(model: DiTConfig, shape: torch.Size) -> tuple[int, int]:
    """Frames, and tokens of a frame, of clips with latents of shape (b, c, t, h, w)."""
    pt, ph, pw = model.patch_size
    return shape[2] // pt, (shape[3] // ph) * (shape[4] // pw)


def _mesh(config: DiTRunConfig, world: World) -> Mesh:
    try:
        return make_mesh(world, config.sequence_parallel)
    except ValueError as error:
        raise UserError(str(error)) from None


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


def _draw_samples(run: TrainingRun, config: DiTRunConfig, text_encoder: TextEncoder) -> None:
    """Clips for the fixed prompts, with the averaged weights and always the same seeds."""
    assert config.vae is not None  # follow_latents has set it
    with run.averaged() as module:
        vae = load_vae(config.vae).to(run.world.device)
        pipe = TextToVideo(module, vae, text_encoder, config.flow, config.sampling)  # type: ignore[arg-type]
        clips = pipe(config.prompts, seed=config.seed)
    if run.world.is_main:
        folder = run.folder.path / "samples" / f"step-{run.step:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        videos = {}
        for row, (prompt, clip) in enumerate(zip(config.prompts, clips)):
            videos[prompt] = folder / f"{row:02d}.mp4"
            write_mp4(videos[prompt], preview(clip), config.sampling.fps)
        run.log_videos(videos)
