"""The smallest of everything: clips, shards, VAE, latents and model folder, for tests of what is done with them."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from videodit.data.clip_reader import DataConfig
from videodit.data.mp4 import encode_mp4
from videodit.data.shapes.render import render
from videodit.data.shapes.world import captions, sample_spec
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import json_bytes
from videodit.flow.path import Parameterization
from videodit.generation.encode import EncodeConfig, encode_clips
from videodit.generation.pipeline import SamplingDefaults, TextToVideo
from videodit.models.dit import DiTConfig, VideoDiT
from videodit.models.text import ByteTextConfig, ByteTextEncoder
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.vae import VAEConfig, VideoVAE

FRAMES, SIZE = 9, 32
BUCKET = f"{FRAMES}x{SIZE}x{SIZE}"
VAE = VAEConfig(latent_channels=4, channels=(8, 16, 16))
TEXT = ByteTextConfig(dim=32, buckets=512, depth=1, num_heads=2)
DIT = DiTConfig(
    in_channels=4, hidden_size=32, depth=2, num_heads=2, text_dim=32, frequency_dim=32, local_width=8, local_depth=1
)
SAMPLING = SamplingDefaults(num_frames=FRAMES, height=SIZE, width=SIZE, num_steps=2)

VAE_OPTIONS = ["--model.latent_channels=4", "--model.channels=[8,16,16]"]
DIT_OPTIONS = [
    "--weighting=learned",
    "--model.hidden_size=32",
    "--model.depth=2",
    "--model.num_heads=2",
    "--model.frequency_dim=32",
    "--model.local_width=8",
    "--model.local_depth=1",
    "--text.dim=32",
    "--text.buckets=512",
    "--text.depth=1",
    "--text.num_heads=2",
    "--sampling.num_steps=2",
]
RUN_OPTIONS = ["--tracker.mode=disabled", "--device=cpu"]


def make_shards(folder: Path, num_clips: int = 8, first: int = 0, num_images: int = 0) -> Path:
    """Captioned clips of the shapes world, as ingest would have written them: those of these numbers.

    The first num_images of them have one frame.
    """
    with ShardWriter(folder) as writer:
        for index in range(first, first + num_clips):
            spec = sample_spec(np.random.default_rng(index))
            frames = 1 if index < first + num_images else FRAMES
            clip = encode_mp4(render(spec, num_frames=frames, size=SIZE), 8.0)
            facts = {"fps": 8.0, "num_frames": frames, "height": SIZE, "width": SIZE, "source": f"{index}.mp4"}
            writer.write(f"clip-{index}", {"mp4": clip, "json": json_bytes({"captions": captions(spec), **facts})})
    return folder


def make_vae(folder: Path) -> Path:
    """A VAE folder with fresh weights."""
    torch.manual_seed(0)
    VideoVAE(VAE).save_pretrained(folder)
    return folder


def make_latents(folder: Path, shards: Path, vae: Path, buckets: Sequence[str] = (BUCKET,)) -> Path:
    """The clips' latents."""
    data = DataConfig(shards=str(shards), buckets=list(buckets))
    encode_clips(EncodeConfig(str(vae), str(folder), data, device="cpu"))
    return folder


def make_model(folder: Path) -> Path:
    """A whole model folder; its last layer is not zero, as a fresh one's would be, so that the prompt matters."""
    torch.manual_seed(0)
    text = ByteTextEncoder(TEXT)
    dit = VideoDiT(DIT)
    for weight in dit.parameters():
        if not bool(weight.any()):
            torch.nn.init.normal_(weight, std=0.1)
    pipe = TextToVideo(TextToVideoModel(dit, text), VideoVAE(VAE), text, Parameterization(), SAMPLING)
    pipe.save_pretrained(folder)
    return folder


def videodit(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Runs the command line as a user does."""
    return subprocess.run(command(arguments), capture_output=True, text=True, timeout=timeout, check=False)


def command(arguments: Sequence[str | Path], ranks: int = 1) -> list[str]:
    """The command line of `videodit ARGUMENTS`, under torchrun if there is more than one rank."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [sys.executable, *torchrun, "-m", "videodit", *map(str, arguments)]


@contextmanager
def started(arguments: Sequence[str | Path], ranks: int = 1) -> Iterator[subprocess.Popen[bytes]]:
    """`videodit ARGUMENTS` in the background, killed at the end if it is still there; what it prints is not kept."""
    silent = subprocess.DEVNULL
    with tempfile.TemporaryFile("w+") as output:
        with subprocess.Popen(command(arguments, ranks), stdin=silent, stdout=silent, stderr=output) as process:
            try:
                yield process
            except AssertionError as error:
                output.seek(0)
                raise AssertionError(f"{error}; stderr:\n{output.read()}") from error
            finally:
                process.kill()


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes], limit_s: float = 240) -> None:
    """Waits for something that a process in the background does. It must not end before."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        try:
            code = process.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
        assert condition(), f"it ended with exit code {code} before"
        return
