"""Held-out loss by noise level: the same clips, noise and levels at every evaluation, whatever the number of ranks.

A loss over all levels hides where a model still learns: the noisy ones, where a clip's content is decided, change long
after the clean ones have settled.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from videodit.data.batches import LatentBatch, Request
from videodit.data.deal import num_micro_batches
from videodit.data.index_file import open_folder
from videodit.data.latent_reader import LatentReader
from videodit.data.latents import read_manifest
from videodit.data.loader import read_latents
from videodit.data.order import PADDING
from videodit.data.randomness import sample_noise, stable_hash
from videodit.errors import UserError
from videodit.flow.loss import frame_error
from videodit.flow.noise_level import sigma_from_uniform
from videodit.flow.path import interpolate, target
from videodit.models.token_layout import TokenLayout
from videodit.parallel.mesh import Mesh, all_reduce_sum
from videodit.training.dit_config import DiTRunConfig, check_patch, latent_folders, no_latents
from videodit.training.dit_model import read_text

QUANTILES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Of the density of `noise`, low is clean. They stay the same where training goes over to late_noise."""


class HeldOutLoss:
    """Mean squared error of the prediction on held-out latents, at fixed quantiles of the training's noise levels.

    Which clips, their noise and (with sample_posterior) their latents are functions of (seed, key). Each rank takes its
    share of the clips; captions are not dropped, latents are whole, a clip's frames have one level.

    Args:
        config: of the run, with eval_shards that `check_held_out` has accepted.
        mesh: which share of the clips this rank takes.
        layout: where the tokens of latents of shape (b, c, t, h, w) lie.
    Raises:
        UserError: if the latents cannot be read.
    """

    def __init__(self, config: DiTRunConfig, mesh: Mesh, layout: Callable[[torch.Size], TokenLayout]) -> None:
        assert config.eval_shards is not None
        self._config, self._mesh, self._layout = config, mesh, layout
        shards = open_folder(config.eval_shards)
        data = replace(config.data, shards=config.eval_shards, weights=[], caption_drop=0.0)
        self._reader = LatentReader(
            shards, data, config.seed, config.crop, config.model.patch_size[1:], posterior=config.sample_posterior
        )
        keys = shards.columns.keys
        order = sorted(range(len(keys)), key=lambda index: stable_hash(config.seed, 0, keys[index], "held out"))
        self._chosen = set(order[: config.eval_clips])

    def measure(self, module: nn.Module) -> dict[str, float]:
        """Runs the module on all held-out clips at all levels. Call on every rank.

        Args:
            module: TextToVideoModel in evaluation mode; autograd is off.
        Returns:
            loss_q10 … loss_q90 and loss, their mean: the same on every rank.
        """
        levels = sigma_from_uniform(torch.tensor(QUANTILES), self._config.noise)
        sums = torch.zeros(len(levels) + 1, dtype=torch.float64)  # of each level, and of the weights
        for batch in self._batches():
            errors = [self._errors(module, batch, float(level)) for level in levels]
            sums += (torch.stack([*errors, torch.ones_like(batch.weight)]).double() * batch.weight).sum(1)
        *totals, count = all_reduce_sum(sums).tolist()
        losses = [total / count if count else float("nan") for total in totals]
        named = {f"loss_q{round(100 * quantile)}": loss for quantile, loss in zip(QUANTILES, losses, strict=True)}
        return {**named, "loss": sum(losses) / len(losses)}

    def _batches(self) -> Iterator[LatentBatch]:
        """This rank's share; every rank gets equally many, some of them padding."""
        requests = []
        for bucket, clips in self._reader.members.items():
            chosen = [clip for clip in clips.tolist() if clip in self._chosen]
            micro, world = self._config.micro_batch_size, self._mesh.data_size
            chosen += [PADDING] * (num_micro_batches(len(chosen), world, micro) * world * micro - len(chosen))
            for start in range(self._mesh.data_rank * micro, len(chosen), world * micro):
                requests.append(Request(bucket, (0,) * micro, tuple(chosen[start : start + micro])))
        return read_latents(self._reader, requests)

    @torch.no_grad()
    def _errors(self, module: nn.Module, batch: LatentBatch, level: float) -> Tensor:
        """(b,) on the CPU, at one noise level."""
        config, shape = self._config, batch.mean.shape
        x0 = batch.draw(config.seed) if config.sample_posterior else batch.mean
        noise = sample_noise(config.seed, batch.epochs, batch.keys, tuple(shape[1:]), "held-out noise")  # type: ignore[arg-type]
        sigma = torch.full((shape[0], shape[2]), level)  # b t
        wide = sigma[:, None, :, None, None]
        weight = next(module.parameters())
        like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        seen = interpolate(config.flow.path, x0, noise, wide).to(**like)
        options = {"micro_conditions": batch.micro_conditions, "layout": self._layout(shape)}
        prediction = module(seen, sigma.to(weight.device), read_text(batch, **like), **options)
        wanted = target(config.flow, x0, noise, wide).to(weight.device)
        return frame_error(prediction, wanted).mean(dim=1).cpu()


def check_held_out(config: DiTRunConfig) -> None:
    """Refuses held-out latents whose loss would mean nothing.

    Args:
        config: of a run, filled in by `follow_latents`.
    Raises:
        UserError: if eval_shards has no finished latents, or those of the training's clips, of another VAE or of
            another text encoder, or of a size that the patch does not divide.
    """
    held_out = config.eval_shards
    if held_out is None:
        return
    manifest = read_manifest(held_out)
    if manifest is None:
        raise no_latents("eval_shards", held_out, Path(held_out))
    theirs = manifest["fingerprint"]
    for name, root in latent_folders(config).items():
        training = read_manifest(root)
        assert training is not None  # follow_latents has seen it
        ours = training["fingerprint"]
        if Path(held_out).resolve() == root.resolve() or ours["clips"] == theirs["clips"]:
            raise UserError(f"eval_shards {held_out} has the clips of data.shards {name}: give latents of other clips")
        for part, what in (("vae", "VAE"), ("text_encoder", "text encoder")):
            if ours[part] != theirs[part]:
                raise UserError(
                    f"eval_shards {held_out} and data.shards {name} were encoded with different settings of {what}: "
                    "run videodit encode for both with the same one"
                )
    check_patch(config.model.patch_size, manifest, config.vae or manifest["vae"], held_out)
