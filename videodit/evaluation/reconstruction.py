"""How well a video VAE gives back what it was given: PSNR over whole clips and inside the objects' boxes.

Legend: b clips, c channels, t frames, h height, w width, n clips in a data set, o objects in a clip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from videodit.data.transforms import to_model_range, to_pixels

PSNR_CAP_DB = 100.0  # stands in for the infinite PSNR of two equal clips wherever PSNRs are averaged or written to JSON


class Autoencoder(Protocol):
    """What this module asks of a VAE; `VideoVAE` satisfies it."""

    def encode(self, clip: Tensor) -> Tensor:
        """(b, c, t, h, w) in [-1, 1] to latents."""

    def decode(self, latents: Tensor) -> Tensor:
        """Latents to (b, c, t, h, w) in [-1, 1]."""


def mean_squared_error(a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """Mean squared error of each clip, over all its values or over those that a mask selects.

    Args:
        a: (b, c, t, h, w) any dtype.
        b: same shape and dtype as a.
        mask: broadcastable to a, bool; True where a value counts.
    Returns:
        (b,) float64, in the clips' own units squared; nan for a clip with nothing selected.
    Raises:
        ValueError: if shapes or dtypes differ, or the clips have no batch axis.
    """
    if a.shape != b.shape or a.dtype != b.dtype:
        raise ValueError(
            f"clips must agree in shape and dtype, got {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}"
        )
    if a.ndim != 5:
        raise ValueError(f"clips must be (b, c, t, h, w), got {tuple(a.shape)}")
    error = (a.double() - b.double()).square()  # double: uint8 differences must not wrap, float32 sums must not round
    if mask is None:
        return error.mean(dim=(1, 2, 3, 4))
    weight = mask.to(error.device).bool().expand_as(error)
    # where, not a product: an unselected nan or inf must not leak in
    total = torch.where(weight, error, torch.zeros_like(error)).sum(dim=(1, 2, 3, 4))
    return total / weight.sum(dim=(1, 2, 3, 4))  # 0 / 0 is the nan promised above


def psnr_from_mse(mse: Tensor, data_range: float) -> Tensor:
    """Peak signal-to-noise ratio, 10 log10(range² / mse).

    Args:
        mse: any shape, in the data's units squared.
        data_range: largest value minus smallest value that the data can take.
    Returns:
        mse's shape, in dB; inf where mse is 0.
    """
    return 10.0 * torch.log10(data_range**2 / mse)


def psnr(a: Tensor, b: Tensor, mask: Tensor | None = None, *, data_range: float | None = None) -> Tensor:
    """PSNR of each clip.

    Args:
        a: (b, c, t, h, w) uint8, or float in [-1, 1].
        b: same shape and dtype as a.
        mask: broadcastable to a, bool; only selected values count.
        data_range: defaults to 255 for uint8 and 2 for float, the width of [-1, 1].
    Returns:
        (b,) float64 in dB; inf for equal clips, nan for a clip in which the mask selects nothing.
    Raises:
        ValueError: if shapes or dtypes differ, or the dtype is an integer other than uint8 and no data_range is given.
    """
    if data_range is None:
        if a.dtype != torch.uint8 and not a.is_floating_point():
            raise ValueError(
                f"data_range is needed for {a.dtype}: only uint8 (255) and float in [-1, 1] (2) have a default"
            )
        data_range = 255.0 if a.dtype == torch.uint8 else 2.0
    return psnr_from_mse(mean_squared_error(a, b, mask), data_range)


def boxes_mask(boxes: Tensor, height: int, width: int) -> Tensor:
    """Which pixels lie in at least one box.

    Args:
        boxes: (b, o, t, 4) x0, y0, x1, y1 in pixels, x1 and y1 exclusive; a box with x1 <= x0 or y1 <= y0 is empty.
        height: of the frames, in pixels.
        width: of the frames, in pixels.
    Returns:
        (b, 1, t, h, w) bool.
    """
    x0, y0, x1, y1 = rearrange(boxes, "b o t corner -> corner b o t 1 1")
    x = torch.arange(width, device=boxes.device)  # w
    y = torch.arange(height, device=boxes.device)[:, None]  # h 1
    inside = (x >= x0) & (x < x1) & (y >= y0) & (y < y1)  # b o t h w
    return rearrange(inside.any(dim=1), "b t h w -> b 1 t h w")


def psnr_in_boxes(a: Tensor, b: Tensor, boxes: Tensor, *, data_range: float | None = None) -> Tensor:
    """PSNR of each clip over the pixels inside its objects' boxes, where a flat background cannot flatter the figure.

    Args:
        a: (b, c, t, h, w) uint8, or float in [-1, 1].
        b: same shape and dtype as a.
        boxes: (b, o, t, 4) as in `boxes_mask`. A pixel in two boxes counts once.
        data_range: as in `psnr`.
    Returns:
        (b,) float64 in dB; nan for a clip whose boxes are all empty.
    Raises:
        ValueError: if the boxes are not (b, o, t, 4) for these clips.
    """
    if boxes.ndim != 4 or boxes.shape[-1] != 4 or boxes.shape[0] != a.shape[0] or boxes.shape[2] != a.shape[2]:
        raise ValueError(f"boxes must be (b, objects, t, 4) for clips {tuple(a.shape)}, got {tuple(boxes.shape)}")
    return psnr(a, b, boxes_mask(boxes.to(a.device), a.shape[-2], a.shape[-1]), data_range=data_range)


@torch.inference_mode()
def reconstruct(
    vae: Autoencoder, clips: np.ndarray, *, micro_batch_size: int = 8, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Clips through the VAE and back to 8 bits, which is what a viewer and the oracle see.

    Args:
        vae: the autoencoder, already on `device` and in evaluation mode.
        clips: (n, t, h, w, 3) uint8.
        micro_batch_size: clips in one pass.
        device: where the VAE lives.
    Returns:
        (n, t, h, w, 3) uint8.
    """
    out = np.empty_like(clips)
    for start in range(0, len(clips), micro_batch_size):
        rows = slice(start, start + micro_batch_size)
        clip = to_model_range(torch.from_numpy(clips[rows]).to(device))  # b c t h w
        out[rows] = to_pixels(vae.decode(vae.encode(clip))).cpu().numpy()
    return out


def compare(clips: np.ndarray, reconstructed: np.ndarray, boxes: Sequence[np.ndarray] | None = None) -> dict:
    """PSNR figures of a set of reconstructions, each taken both ways that the literature takes the mean.

    `psnr_db` is the mean over clips of each clip's PSNR, where every clip has the same say (equal clips enter with
    100 dB, so that the mean stays finite). `psnr_of_mean_mse_db` is the PSNR of the mean squared error over the whole
    set, which is never the larger of the two and is ruled by the worst clips. The same holds for the two figures inside
    the boxes: there a clip without a single pixel in a box has no part, and the mean is over all boxed pixels.

    Args:
        clips: (n, t, h, w, 3) uint8.
        reconstructed: (n, t, h, w, 3) uint8.
        boxes: for each clip (o, t, 4) as in `boxes_mask`; clips may differ in their number of objects.
    Returns:
        dict with psnr_db, psnr_of_mean_mse_db, n, and with boxes also psnr_boxes_db, psnr_boxes_of_mean_mse_db.
    Raises:
        ValueError: if there are no clips, or boxes are given for another number of clips.
    """
    if len(clips) == 0:
        raise ValueError("no clips to compare: at least one is needed")
    if boxes is not None and len(boxes) != len(clips):
        raise ValueError(f"{len(boxes)} sets of boxes for {len(clips)} clips: give one set for each clip")
    whole: list[float] = []
    boxed: list[tuple[float, int]] = []  # mean squared error and number of boxed pixels of each clip that has any
    for i, (original, copy) in enumerate(zip(clips, reconstructed, strict=True)):  # clip by clip: constant memory
        a, b = (rearrange(torch.from_numpy(x), "t h w c -> 1 c t h w") for x in (original, copy))
        whole.append(mean_squared_error(a, b).item())
        if boxes is not None:
            mask = boxes_mask(torch.as_tensor(np.asarray(boxes[i]))[None], a.shape[-2], a.shape[-1])
            if mask.any():
                boxed.append((mean_squared_error(a, b, mask).item(), int(mask.sum())))
    report: dict = {
        "psnr_db": _mean([_psnr_db(mse) for mse in whole]),
        "psnr_of_mean_mse_db": _psnr_db(_mean(whole)),
        "n": len(whole),
    }
    if boxed:
        pixels = sum(count for _, count in boxed)
        report["psnr_boxes_db"] = _mean([_psnr_db(mse) for mse, _ in boxed])
        report["psnr_boxes_of_mean_mse_db"] = _psnr_db(sum(mse * count for mse, count in boxed) / pixels)
    return report


def reconstruction_report(
    vae: Autoencoder,
    clips: np.ndarray,
    boxes: Sequence[np.ndarray] | None = None,
    *,
    micro_batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> dict:
    """Sends clips through the VAE and measures what came back: `reconstruct`, then `compare`.

    Args:
        vae: as in `reconstruct`.
        clips: (n, t, h, w, 3) uint8, held out of the VAE's training.
        boxes: as in `compare`.
        micro_batch_size: clips in one pass.
        device: where the VAE lives.
    Returns:
        `compare`'s dict.
    """
    return compare(clips, reconstruct(vae, clips, micro_batch_size=micro_batch_size, device=device), boxes)


def _psnr_db(mse: float) -> float:
    """8-bit PSNR in dB, capped so that it can be averaged and written as JSON."""
    return PSNR_CAP_DB if mse == 0 else min(PSNR_CAP_DB, 10.0 * math.log10(255.0**2 / mse))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
