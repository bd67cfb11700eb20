"""TextToVideo: a row is a function of its prompt and seed, whatever the batch, the folder or the parameterization."""

import dataclasses
import json
import math
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.models.tiny import tiny_dit, tiny_text, tiny_vae
from videodit.errors import UserError
from videodit.flow.noise_level import sampling_levels
from videodit.flow.path import Parameterization, coefficients
from videodit.flow.samplers import SAMPLERS, euler, heun
from videodit.generation.pipeline import RowNoise, SamplingDefaults, TextToVideo, latent_shape, velocity_function
from videodit.models.dit import DiTConfig, TextContext
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.vae import VAEConfig, VideoVAE
from videodit.planning.footprint import LiveBytes

DEFAULTS = SamplingDefaults(num_frames=5, height=32, width=16, num_steps=3, guidance_scale=2.0, fps=8.0)
PROMPTS = ["a small red circle moves left", "blue", "an extraordinarily large green star"]
NO_TEXT = TextContext(None, [], None)


def tiny_pipeline(parameterization: Parameterization | None = None, **changes) -> TextToVideo:
    text = tiny_text()
    model = TextToVideoModel(tiny_dit(), text)
    return TextToVideo(model, tiny_vae(**changes), text, parameterization or Parameterization(), DEFAULTS)


PIPE = tiny_pipeline()


def test_clips_are_uint8_in_the_models_own_size() -> None:
    clips = PIPE(PROMPTS)
    assert clips.shape == (3, 5, 32, 16, 3) and clips.dtype == np.uint8 and clips.std() > 5
    assert PIPE(PROMPTS[:1], num_frames=1, height=16, width=48).shape == (1, 1, 16, 48, 3)
    assert PIPE.sample_latents(PROMPTS).shape == (3, 4, 2, 4, 2)


def test_a_long_clip_is_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = tiny_pipeline(channels=(64, 64, 64))
    clips, peaks = [], []
    for positions in (1 << 14, 1):
        monkeypatch.setattr(VideoVAE.decode_stream, "__defaults__", (positions,))
        with LiveBytes() as live:
            clips.append(pipe(PROMPTS[:1], num_frames=65, height=32, width=32, num_steps=1).astype(int))
        peaks.append(live.peak)
    assert abs(clips[1] - clips[0]).max() <= 1
    assert peaks[1] < 0.2 * peaks[0]


def test_keys_and_values_of_the_text_are_made_once_a_sampling() -> None:
    """Of both guidance branches at every step; the layers that make them are seen by hooks."""
    calls: list[str] = []
    layers = [
        (n, m) for n, m in PIPE.model.named_modules() if n.endswith(("cross_attention.key", "cross_attention.value"))
    ]
    hooks = [m.register_forward_hook(lambda *_, name=n: calls.append(name)) for n, m in layers]
    try:
        counts = []
        for num_steps in (2, 6):
            calls.clear()
            PIPE.sample_latents(PROMPTS, num_steps=num_steps)
            counts.append(sorted(calls))
    finally:
        for hook in hooks:
            hook.remove()
    assert counts[0] == counts[1] and set(counts[0]) == {name for name, _ in layers}
    assert len(counts[0]) <= 2 * len(layers)  # with the prompt, and without


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_row_depends_on_its_prompt_and_seed_alone(sampler: str) -> None:
    together = PIPE.sample_latents(PROMPTS, seed=5, sampler=sampler)
    for row, prompt in enumerate(PROMPTS):
        alone = PIPE.sample_latents([prompt], seed=5 + row, sampler=sampler)[0]
        torch.testing.assert_close(alone, together[row], rtol=1e-3, atol=1e-4)
    clips = PIPE(PROMPTS, seed=5, sampler=sampler).astype(int)
    assert np.abs(PIPE(PROMPTS[1:], seed=6, sampler=sampler) - clips[1:]).max() <= 1


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_same_call_gives_the_same_bytes_and_leaves_the_global_generator_alone(sampler: str) -> None:
    state = torch.get_rng_state()
    first = PIPE(PROMPTS, seed=3, sampler=sampler)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert np.array_equal(PIPE(PROMPTS, seed=3, sampler=sampler), first)


def test_seed_prompt_and_options_matter() -> None:
    base, shifted = PIPE.sample_latents(["red circle"]), tiny_pipeline()
    shifted.defaults = dataclasses.replace(DEFAULTS, shift=1.0)
    for changed in (
        PIPE.sample_latents(["red circle"], seed=1),
        PIPE.sample_latents(["circle red"]),
        PIPE.sample_latents(["red circle"], num_steps=4),
        PIPE.sample_latents(["red circle"], guidance_scale=5.0),
        PIPE.sample_latents(["red circle"], sampler="heun"),
        shifted.sample_latents(["red circle"]),
    ):
        assert (changed - base).abs().max() > 1e-3


def test_micro_conditions_are_the_sizes_own_unless_they_are_given() -> None:
    text = tiny_text()
    told = TextToVideoModel(tiny_dit(micro_conditioning=True), text)
    pipe = TextToVideo(told, tiny_vae(), text, Parameterization(), DEFAULTS)
    base = pipe.sample_latents(PROMPTS)
    whole = {"original_height": 32, "original_width": 16, "crop_top": 0, "crop_left": 0, "fps": 8.0}
    assert torch.equal(pipe.sample_latents(PROMPTS, conditions=whole), base)
    for name in whole:
        changed = pipe.sample_latents(PROMPTS, conditions={name: 40})
        assert (changed - base).abs().max() > 1e-3, name
        alone = pipe.sample_latents(PROMPTS[1:2], seed=1, conditions={name: 40})
        torch.testing.assert_close(alone[0], changed[1], rtol=1e-3, atol=1e-4)
    for conditions, message in (
        ({"zoom": 2}, "conditions 'zoom' is not one of original_height, .*, fps"),
        ({"crop_top": -1}, "sampling.crop_top -1 is below 0: give pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            pipe.sample_latents(PROMPTS, conditions=conditions)


def test_no_guidance_towards_anything_is_the_empty_prompt() -> None:
    torch.testing.assert_close(
        PIPE.sample_latents(["red circle"], guidance_scale=0.0), PIPE.sample_latents([""], guidance_scale=1.0)
    )


def test_guidance_of_one_is_continuous() -> None:
    without = PIPE.sample_latents(["red circle"], guidance_scale=1.0)
    torch.testing.assert_close(
        PIPE.sample_latents(["red circle"], guidance_scale=1.0 + 1e-6), without, rtol=1e-3, atol=1e-4
    )


def test_noise_is_the_seeds_in_frame_order() -> None:
    source = RowNoise([7, 8], (4, 3, 2, 5))
    noise, more = source(), source()
    assert noise.shape == (2, 4, 3, 2, 5) and noise.dtype == torch.float32
    generator = torch.Generator().manual_seed(8)
    for drawn in (noise, more):
        assert torch.equal(drawn[1].transpose(0, 1), torch.randn(3, 4, 2, 5, generator=generator))
    assert torch.equal(RowNoise([8], (4, 3, 2, 5))()[0], noise[1])


def test_noise_is_standard_normal_and_rows_are_independent() -> None:
    one, other = RowNoise([0, 1], (16, 8, 32, 32))()
    count = one.numel()
    for noise in (one, other):
        assert abs(noise.mean()) < 5 / math.sqrt(count) and abs(noise.var() - 1) < 8 / math.sqrt(count)
    assert abs((one * other).mean()) < 5 / math.sqrt(count)


def gaussian_oracle(parameterization: Parameterization, std: float):
    """The best prediction for data N(0, std^2): linear in the point of the model's own path."""

    def predict(x: Tensor, sigma: Tensor, text: TextContext) -> Tensor:
        alpha, beta = coefficients(parameterization.path, sigma.view(-1, 1, 1, 1, 1))
        variance = alpha**2 * std**2 + beta**2
        x0, noise = alpha * std**2 * x / variance, beta * x / variance
        if parameterization.prediction in ("noise", "x0"):
            return noise if parameterization.prediction == "noise" else x0
        return noise - x0 if parameterization.prediction == "velocity" else alpha * noise - beta * x0

    return predict


ALL = [("rectified", prediction) for prediction in ("velocity", "x0", "noise")]
ALL += [("variance_preserving", prediction) for prediction in ("velocity", "x0", "noise", "v")]


@pytest.mark.parametrize(("path", "prediction"), ALL)
@pytest.mark.parametrize("std", [0.5, 2.0])
def test_every_parameterization_flows_to_the_gaussian_of_the_data(path: str, prediction: str, std: float) -> None:
    parameterization = Parameterization(path, prediction)
    velocity = velocity_function(gaussian_oracle(parameterization, std), parameterization, NO_TEXT)
    source = RowNoise(range(4), (4, 5, 8, 8))
    noise = source()
    out = heun(velocity, noise, sampling_levels(100, 1.0), source)
    torch.testing.assert_close(out, std * noise, rtol=0.02, atol=0.02)
    assert float(out.var()) == pytest.approx(std**2, rel=0.05)


@pytest.mark.parametrize(("path", "prediction"), ALL)
def test_a_small_error_of_the_prediction_stays_small(path: str, prediction: str) -> None:
    """Also of noise predictions, which say nothing of the data at the level of pure noise, where sampling starts."""
    parameterization = Parameterization(path, prediction)
    exact = gaussian_oracle(parameterization, 1.0)

    def wrong(x: Tensor, sigma: Tensor, text: TextContext) -> Tensor:
        return exact(x, sigma, text) + 0.02 * torch.randn(x.shape)

    source = RowNoise(range(4), (4, 5, 8, 8))
    noise, levels = source(), sampling_levels(20, 3.0)
    right, off = (
        euler(velocity_function(predict, parameterization, NO_TEXT), noise, levels, source)
        for predict in (exact, wrong)
    )
    assert float((off - right).square().mean().sqrt()) < 0.1


def test_another_parameterization_runs_through_the_same_pipeline() -> None:
    pipe = tiny_pipeline(Parameterization("variance_preserving", "noise"))
    clips = pipe(PROMPTS[:2], num_steps=4)
    assert clips.shape == (2, 5, 32, 16, 3)
    latents = pipe.sample_latents(PROMPTS[:2], num_steps=4)
    assert latents.isfinite().all() and (latents - PIPE.sample_latents(PROMPTS[:2], num_steps=4)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "parameterization", [Parameterization(), Parameterization("variance_preserving", "v")], ids=str
)
def test_a_saved_model_makes_the_same_clips(parameterization: Parameterization, tmp_path: Path) -> None:
    pipe = tiny_pipeline(parameterization)
    pipe.vae.latent_mean.copy_(torch.randn(4))
    pipe.save_pretrained(tmp_path)
    loaded = TextToVideo.from_pretrained(tmp_path)
    assert loaded.defaults == DEFAULTS and loaded.parameterization == parameterization
    assert np.array_equal(loaded(PROMPTS, seed=2), pipe(PROMPTS, seed=2))
    assert loaded.model.text_encoder is loaded.text_encoder
    layout = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file())
    parts = [
        f"{part}/{name}" for part in ("dit", "text_encoder", "vae") for name in ("config.json", "model.safetensors")
    ]
    assert [name for name in layout if name != "README.md"] == sorted(["model_index.json", *parts])


def test_half_precision_stays_near(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    rough = TextToVideo.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert rough.model.dit.patch_out.weight.dtype == torch.bfloat16
    assert next(rough.vae.parameters()).dtype == torch.float32
    exact, near = PIPE.sample_latents(PROMPTS), rough.sample_latents(PROMPTS)
    assert near.dtype == torch.float32
    assert (near - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(
    "missing",
    ["model_index.json"]
    + [f"{part}/{name}" for part in ("dit", "vae", "text_encoder") for name in ("config.json", "model.safetensors")],
)
def test_a_folder_that_lacks_a_file(missing: str, tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=Path(missing).name):
        TextToVideo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "index",
    ["{", "[]", "{}", '{"parameterization": {}}', '{"parameterization": {"path": "x"}, "sampling": {}}']
    + ['{"parameterization": {}, "sampling": {"steps": 3}}', '{"parameterization": {}, "sampling": {"num_steps": 0}}'],
)
def test_a_damaged_index(index: str, tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(UserError, match=r"model_index.json is damaged \(.*\): export the run again"):
        TextToVideo.from_pretrained(tmp_path)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such model folder: .*nowhere; make one with videodit export"):
        TextToVideo.from_pretrained(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frames": 6}, "num_frames 6 is not 4k.1: the nearest is 5"),
        ({"height": 24}, "height 24 is not a multiple of 16 .VAE x patch.: the nearest is 32"),
        ({"width": 100}, "width 100 is not a multiple of 16 .VAE x patch.: the nearest is 96"),
        ({"sampler": "rk4"}, "sampling.sampler 'rk4' is not one of euler, heun, renoise"),
        ({"num_steps": 0}, "sampling.num_steps 0 is below 1"),
    ],
)
def test_options_that_do_not_fit_name_the_nearest_that_do(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PIPE(["red circle"], **options)


def test_latent_shape_counts_the_patch() -> None:
    dit = DiTConfig(patch_size=(2, 2, 2))
    assert latent_shape(VAEConfig(), dit, 13, 32, 48) == (16, 4, 4, 6)
    with pytest.raises(ValueError, match="num_frames 17 .*2.*"):
        latent_shape(VAEConfig(), dit, 17, 32, 48)
    with pytest.raises(ValueError, match="width 40 is not a multiple of 16"):
        latent_shape(VAEConfig(), dit, 13, 32, 40)


@pytest.mark.parametrize("changes", [{"sampler": "ddim"}, {"num_steps": 0}])
def test_defaults_that_cannot_be_are_refused(changes: dict) -> None:
    with pytest.raises(ValueError, match="sampling"):
        SamplingDefaults(**changes)


def test_the_index_is_plain_json(tmp_path: Path) -> None:
    PIPE.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["format"] == "videodit" and index["sampling"]["num_frames"] == 5
    assert index["parameterization"] == {"path": "rectified", "prediction": "velocity"}


@pytest.mark.parametrize("prompts", ["a red circle", []])
def test_prompts_that_are_no_list_of_prompts_are_refused(prompts: str | list[str]) -> None:
    with pytest.raises(ValueError, match="give a list of one or more prompts"):
        PIPE(prompts)


def test_a_clip_that_is_not_finite_is_said_to_be_so() -> None:
    options = {"num_frames": 5, "height": 32, "width": 16, "num_steps": 1}
    with pytest.warns(UserWarning, match="the clip of 'blue' has values that are not finite"):
        PIPE(["blue"], guidance_scale=1e38, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PIPE(["blue"], **options)
