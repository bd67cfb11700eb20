"""`videodit import wan`: a whole tiny model as diffusers writes it, imported, sampled, and trained on."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.many_commands import FULL_AND_READ_ONLY, NO_MOUNTS, can_mount, run_all
from tests.models.test_text_transformers import write_encoder
from tests.models.test_wan import write_wan
from videodit import cli
from videodit.data.video_io import probe
from videodit.generation.import_wan import import_wan
from videodit.generation.pipeline import TextToVideo
from videodit.models.vae_wan import WanVAE
from videodit.models.wan import TEXT_LENGTH

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

PROMPT = "a small red circle moves left"
SIZE = ["--num_frames", "5", "--height", "32", "--width", "48", "--num_steps", "2"]


def write_vae(folder: Path) -> None:
    torch.manual_seed(0)
    statistics = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [1.5, 0.5, 1.0, 2.0]}
    diffusers.AutoencoderKLWan(base_dim=8, z_dim=4, num_res_blocks=1, **statistics).save_pretrained(folder)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    write_wan(folder / "transformer", shard_size="20KB", text_dim=12)
    write_vae(folder / "vae")
    write_encoder("umt5", folder / "text_encoder")
    (folder / "tokenizer").mkdir()
    for path in (folder / "text_encoder").glob("*token*"):
        shutil.move(path, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"flow_shift": 5.0}))
    return folder


@pytest.fixture(scope="module")
def model(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return import_wan(source, tmp_path_factory.mktemp("imported") / "model")


def test_commands_from_import_to_a_playable_clip(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = str(tmp_path / "model")
    assert cli.main(["import", "wan", str(source), "--out", out]) == 0
    command = ["generate", "--model", out, "--prompt", PROMPT, "--out", str(tmp_path / "clips"), *SIZE]
    assert cli.main([*command, "--device", "cpu"]) == 0, capsys.readouterr().err
    (clip,) = (tmp_path / "clips").glob("*.mp4")
    info = probe(clip)
    assert (info.num_frames, info.height, info.width, info.fps) == (5, 32, 48, 16.0)
    assert json.loads(clip.with_suffix(".json").read_text())["guidance_scale"] == 5.0
    assert "import wan" in (tmp_path / "model" / "README.md").read_text()


def test_the_defaults_are_those_of_the_published_model(model: Path) -> None:
    defaults = TextToVideo.from_pretrained(model).defaults
    assert (defaults.num_frames, defaults.height, defaults.width, defaults.fps) == (81, 480, 832, 16.0)
    assert (defaults.num_steps, defaults.guidance_scale, defaults.shift) == (50, 5.0, 5.0)


@torch.no_grad()
def test_every_part_computes_what_diffusers_pipeline_does(source: Path, model: Path, tmp_path: Path) -> None:
    """One guided velocity and its decoded pixels, against the parts of `diffusers.WanPipeline`."""
    pipe = TextToVideo.from_pretrained(model)
    theirs = diffusers.WanPipeline(
        tokenizer=transformers.AutoTokenizer.from_pretrained(source / "tokenizer"),
        text_encoder=transformers.UMT5EncoderModel.from_pretrained(source / "text_encoder"),
        transformer=write_wan(tmp_path, text_dim=12),  # the same weights again
        vae=diffusers.AutoencoderKLWan.from_pretrained(source / "vae", low_cpu_mem_usage=False),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    embeds, empty = theirs.encode_prompt([PROMPT], "", max_sequence_length=TEXT_LENGTH)
    latents = torch.randn(1, 4, 2, 4, 6)
    sigma = torch.tensor([0.7])
    both = [theirs.transformer(latents, 1000 * sigma, text).sample for text in (embeds, empty)]
    context = [pipe.model.text_context(pipe.text_encoder.encode([text])) for text in (PROMPT, "")]
    for text, expected in zip(context, both):
        torch.testing.assert_close(pipe.model(latents, sigma, text), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(both[0], both[1], atol=1e-2)
    std, mean = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in ([1.5, 0.5, 1.0, 2.0], [0.1, -0.2, 0.3, 0.0]))
    torch.testing.assert_close(pipe.vae.decode(latents), theirs.vae.decode(latents * std + mean).sample)
    clip = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    raw = theirs.vae.encode(clip).latent_dist
    posterior = pipe.vae.posterior(clip)
    torch.testing.assert_close(posterior.mean * std + mean, raw.mean)
    torch.testing.assert_close(torch.exp(0.5 * posterior.logvar) * std, raw.std)


def test_the_vae_says_which_size_fits(source: Path) -> None:
    vae = WanVAE.from_pretrained(source / "vae")
    assert vae.encode(torch.zeros(1, 3, 9, 16, 24)).shape == (1, *vae.config.latent_shape(9, 16, 24)) == (1, 4, 3, 2, 3)
    with pytest.raises(ValueError, match="num_frames 8 is not 4k.1: the nearest is 9"):
        vae.encode(torch.zeros(1, 3, 8, 16, 24))


def test_clips_depend_on_the_seed_alone(model: Path) -> None:
    pipe = TextToVideo.from_pretrained(model)
    options = {"num_frames": 5, "height": 32, "width": 48, "num_steps": 2}
    together = pipe([PROMPT, "a circle"], seed=3, **options)
    alone = pipe(["a circle"], seed=4, **options)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1 and together.std() > 1


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: shutil.rmtree(f / "vae"), "no vae/config.json"),
        (lambda f: shutil.rmtree(f / "tokenizer"), "no tokenizer"),
        (lambda f: (f / "transformer_2").mkdir(), "two transformers"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), "is damaged"),
        (lambda f: next((f / "vae").glob("*.safetensors")).write_bytes(b"short"), "VAE in .* cannot be loaded"),
        (lambda f: next((f / "vae").glob("*.safetensors")).unlink(), "has no weights"),
        (lambda f: write_wan(f / "transformer", in_channels=6, out_channels=6, text_dim=12), "4 latent channels"),
        (lambda f: write_wan(f / "transformer"), "text encoder gives 12 channels"),
    ],
)
def test_a_source_that_is_not_whole_is_one_line(
    break_it, message: str, source: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = tmp_path / "src"
    shutil.copytree(source, folder)
    if "write_wan" in break_it.__code__.co_names:
        shutil.rmtree(folder / "transformer")
    break_it(folder)
    assert cli.main(["import", "wan", str(folder), "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert line.startswith("error: ")
    assert re.search(message, line), line
    assert not (tmp_path / "out" / "model_index.json").exists()


def test_import_needs_to_know_what(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["import"]) == 2 and "videodit import wan" in capsys.readouterr().err
    assert cli.main(["import", "--out", "x"]) == 2 and "videodit import wan" in capsys.readouterr().err


@pytest.mark.slow
def test_the_disk_refuses(source: Path, tmp_path: Path) -> None:
    places = {name: str(tmp_path / name) for name in ("full", "read_only")}
    for place in places.values():
        Path(place).mkdir()
    setup = FULL_AND_READ_ONLY.format(**places)
    if not can_mount(setup):
        pytest.skip(NO_MOUNTS)
    commands = {name: ["import", "wan", str(source), "--out", f"{place}/model"] for name, place in places.items()}
    for name, (code, stdout, stderr) in run_all(commands, tmp_path, setup).items():
        said = {"full": "no space left while writing", "read_only": "no permission for"}[name]
        assert (code, stdout) == (2, ""), stderr
        (line,) = (line for line in stderr.splitlines() if line.startswith("error: "))
        assert f"{said} {places[name]}/model" in line
        assert "Traceback" not in stderr
