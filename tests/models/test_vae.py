"""The video VAE: causal, streamable, and honest about sizes, statistics and the Gaussian it gives."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from tests.models.tiny import tiny_vae
from videodit.models.causal_conv import StreamCache, fold
from videodit.models.vae import INITIAL_LOGVAR, Posterior, VAEConfig, VideoVAE, gaussian_kl
from videodit.planning.footprint import LiveBytes

SHAPES = {
    "4x8x8": {},
    "4x8x8 by patches": {"patch_size": (1, 4, 4), "downsample": ("st", "t")},
    "4x4x4": {"patch_size": (2, 2, 2), "downsample": ("t", "s")},
    "2x8x8 pointwise": {"patch_size": (1, 4, 4), "channels": (8, 8), "downsample": ("st",)}
    | {"encoder_blocks": ("p", "pc"), "decoder_blocks": ("c", "")},
    "4x8x8 in one level": {"patch_size": (4, 8, 8), "channels": (16,), "downsample": ()}
    | {"encoder_blocks": ("cc",), "decoder_blocks": ("cc",)},
}
MODELS = {name: tiny_vae(**shape) for name, shape in SHAPES.items()}
every_shape = pytest.mark.parametrize("vae", MODELS.values(), ids=list(MODELS))


def clip_for(vae: VideoVAE, blocks: int, b: int = 1) -> Tensor:
    """A clip of `blocks` + 1 latent frames, 2x3 latent positions."""
    space = vae.config.spatial_compression
    return torch.rand(b, 3, blocks * vae.config.temporal_compression + 1, 2 * space, 3 * space) * 2 - 1


@every_shape
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_shapes(vae: VideoVAE, blocks: int) -> None:
    clip = clip_for(vae, blocks, b=2)
    latents = vae.encode(clip)
    assert latents.shape == (2, 4, blocks + 1, 2, 3) == (2, *vae.config.latent_shape(*clip.shape[2:]))
    assert vae.decode(latents).shape == clip.shape
    posterior = vae.posterior(clip)
    assert posterior.mean.shape == posterior.logvar.shape == latents.shape
    assert torch.equal(posterior.mean, latents)


def test_the_default_is_4x8x8_with_16_channels() -> None:
    assert VAEConfig().latent_shape(17, 64, 96) == (16, 5, 8, 12)
    assert VAEConfig().latent_shape(1, 8, 8) == (16, 1, 1, 1)


@every_shape
def test_a_frame_changes_no_earlier_latent(vae: VideoVAE) -> None:
    clip = clip_for(vae, 3)
    latents = vae.encode(clip)
    time = vae.config.temporal_compression
    for frame in range(clip.shape[2]):
        changed = clip.clone()
        changed[:, :, frame] = torch.rand_like(changed[:, :, frame])
        difference = (vae.encode(changed) - latents).abs().amax(dim=(0, 1, 3, 4))
        first = -(-frame // time)  # latent k holds frames time * (k - 1) + 1 ... time * k
        assert difference[first] > 1e-4, frame
        assert (difference[:first] == 0).all(), frame


@every_shape
def test_a_latent_changes_no_earlier_frame(vae: VideoVAE) -> None:
    latents = torch.randn(1, 4, 4, 2, 3)
    clip = vae.decode(latents)
    time = vae.config.temporal_compression
    for index in range(4):
        changed = latents.clone()
        changed[:, :, index] += 1.0
        difference = (vae.decode(changed) - clip).abs().amax(dim=(0, 1, 3, 4))
        first = max(time * (index - 1) + 1, 0)
        assert difference[first] > 1e-4, index
        assert (difference[:first] == 0).all(), index


@every_shape
def test_the_beginning_of_a_clip_is_coded_alike_whatever_follows(vae: VideoVAE) -> None:
    clip = clip_for(vae, 2)
    image = vae.encode(clip[:, :, :1])
    torch.testing.assert_close(vae.encode(clip)[:, :, :1], image, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(vae.decode(vae.encode(clip))[:, :, :1], vae.decode(image), rtol=1e-4, atol=1e-4)


@every_shape
def test_streams(vae: VideoVAE) -> None:
    clip = clip_for(vae, 3, b=2)
    latents = vae.encode(clip)
    torch.testing.assert_close(vae.encode_stream(clip), latents, rtol=1e-4, atol=1e-4)
    for positions in (1, 24, 1 << 14):  # of which a frame of both clips has 12
        torch.testing.assert_close(vae.decode_stream(latents, positions), vae.decode(latents), rtol=1e-4, atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(list(MODELS)), sizes=st.lists(st.integers(1, 3), min_size=1, max_size=4))
def test_any_cut_into_chunks_gives_the_same(name: str, sizes: list[int]) -> None:
    vae = MODELS[name]
    blocks = sum(sizes) - 1
    clip, time = clip_for(vae, blocks), vae.config.temporal_compression
    frames = [time * size - (time - 1) * (index == 0) for index, size in enumerate(sizes)]
    encode_cache, decode_cache = StreamCache(), StreamCache()
    latents, decoded = [], []
    for chunk in clip.split(frames, dim=2):
        latents.append(vae.posterior(chunk, encode_cache).mean)
        decoded.append(vae.decode(latents[-1], decode_cache))
        encode_cache.first_chunk = decode_cache.first_chunk = False
    whole = vae.encode(clip)
    torch.testing.assert_close(torch.cat(latents, dim=2), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.cat(decoded, dim=2), vae.decode(whole), rtol=1e-4, atol=1e-4)


@every_shape
def test_rows_of_a_batch_do_not_touch(vae: VideoVAE) -> None:
    clip = clip_for(vae, 1, b=2)
    latents = vae.encode(clip)
    for row in range(2):
        torch.testing.assert_close(vae.encode(clip[row : row + 1])[0], latents[row], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            vae.decode(latents[row : row + 1])[0], vae.decode(latents)[row], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((16, 64, 64), "num_frames 16 is not 4k.1: the nearest is 17"),
        ((2, 64, 64), "num_frames 2 is not 4k.1: the nearest is 1"),
        ((0, 64, 64), "num_frames 0 is not 4k.1: the nearest is 1"),
        ((17, 60, 64), "height 60 is not a multiple of 8: the nearest is 64"),
        ((17, 64, 3), "width 3 is not a multiple of 8: the nearest is 8"),
        ((17, 0, 64), "height 0 is not a multiple of 8: the nearest is 8"),
    ],
)
def test_sizes_that_do_not_fit_name_the_nearest_that_do(size: tuple[int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig().latent_shape(*size)
    if min(size) > 0:
        for encode in (MODELS["4x8x8"].encode, MODELS["4x8x8"].encode_stream):
            with pytest.raises(ValueError, match=message):
                encode(torch.zeros(1, 3, *size))


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 100), st.integers(1, 100))
def test_the_named_size_fits_and_none_is_nearer(frames: int, height: int, width: int) -> None:
    config = VAEConfig()
    size = [frames, height, width]
    for axis, unit in enumerate((4, 8, 8)):
        for _ in range(2):
            try:
                config.latent_shape(*size)
                break
            except ValueError as error:
                if ("num_frames", "height", "width")[axis] not in str(error):
                    break
                nearest = int(str(error).rsplit(" ", 1)[1])
                assert abs(nearest - size[axis]) <= unit / 2 or nearest in (1, unit)
                size[axis] = nearest
    assert config.latent_shape(*size)


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar = torch.randn(3, 2, 2, 3, 3), torch.randn(3, 2, 2, 3, 3)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).flatten(1).sum(dim=1)
    torch.testing.assert_close(gaussian_kl(mean, logvar), expected)
    assert gaussian_kl(torch.zeros(2, 5), torch.zeros(2, 5)).tolist() == [0.0, 0.0]


def test_samples_have_the_posteriors_mean_and_variance() -> None:
    posterior = Posterior(torch.full((1,), 3.0), torch.full((1,), 2.0 * torch.log(torch.tensor(0.5)).item()))
    samples = posterior.sample(torch.randn(200_000))
    assert abs(samples.mean() - 3.0) < 0.01 and abs(samples.std() - 0.5) < 0.01
    assert torch.equal(posterior.sample(torch.zeros(1)), posterior.mean)


def test_a_log_variance_that_runs_away_leaves_everything_finite() -> None:
    vae, clip = tiny_vae(), torch.zeros(1, 3, 5, 16, 16)
    for far, kept in ((1e4, 10.0), (-1e4, -20.0)):
        torch.nn.init.constant_(vae.encoder.conv_out.bias[4:], far)
        posterior = vae.posterior(clip)
        assert (posterior.logvar == kept).all()
        assert posterior.sample(torch.ones(1)).isfinite().all() and gaussian_kl(posterior.mean, posterior.logvar) > 0


def test_statistics_normalise_the_latents_and_nothing_else() -> None:
    plain, normalised = tiny_vae(), tiny_vae()
    clip = clip_for(plain, 2, b=2)
    raw = plain.posterior(clip)
    normalised.latent_mean.copy_(raw.mean.mean(dim=(0, 2, 3, 4)))
    normalised.latent_std.copy_(raw.mean.std(dim=(0, 2, 3, 4)))
    posterior = normalised.posterior(clip)
    torch.testing.assert_close(posterior.mean.mean(dim=(0, 2, 3, 4)), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(posterior.mean.std(dim=(0, 2, 3, 4)), torch.ones(4), rtol=1e-3, atol=1e-3)
    ratio = (0.5 * posterior.logvar).exp() / (0.5 * raw.logvar).exp()
    torch.testing.assert_close(ratio, (1 / normalised.latent_std).view(1, 4, 1, 1, 1).expand_as(ratio))
    torch.testing.assert_close(normalised.decode(posterior.mean), plain.decode(raw.mean), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("limit", [3.0, 6.0, 200.0])
@pytest.mark.parametrize("spectrum", [0.0, 0.5, 1.0])
def test_channels_spread_as_they_move_the_pixels_to_the_power_of_the_spectrum(spectrum: float, limit: float) -> None:
    vae = tiny_vae(latent_spectrum=spectrum, latent_contrast_limit=limit)
    contrast = torch.tensor([100.0, 2.0, 1.0, 0.5])  # median 1 (torch takes the lower middle)
    raw_std = torch.tensor([2.0, 1.0, 0.5, 4.0])
    vae.code_synthesis.copy_(torch.nn.functional.normalize(torch.randn(768, 4), dim=0) * contrast / raw_std)
    vae.set_latent_statistics(torch.zeros(4), raw_std)
    spread = raw_std / vae.latent_std
    limited = torch.tensor([min(limit, 100.0), 2.0, 1.0, 0.5]) ** spectrum
    torch.testing.assert_close(spread / spread[2], limited)
    torch.testing.assert_close(spread.square().mean(), torch.tensor(1.0))


def test_bf16_weights_take_and_give_float32_and_stay_close() -> None:
    vae = tiny_vae()
    vae.fit_shortcut(clip_for(vae, 2, b=16))
    clip = clip_for(vae, 2, b=2)
    latents = vae.encode(clip)
    pixels = vae.decode(latents)
    rounded = vae.bfloat16()
    assert rounded.encode(clip).dtype == rounded.decode(latents).dtype == torch.float32
    assert (rounded.encode(clip) - latents).std() < 0.02 * latents.std()
    assert (rounded.decode(latents) - pixels).std() < 0.02 * pixels.std()


def test_statistics_are_saved(tmp_path) -> None:
    vae = tiny_vae()
    vae.latent_mean.copy_(torch.randn(4))
    vae.latent_std.copy_(torch.rand(4) + 0.5)
    vae.save_pretrained(tmp_path)
    loaded = VideoVAE.from_pretrained(tmp_path)
    clip = clip_for(vae, 1)
    assert torch.equal(loaded.encode(clip), vae.encode(clip))
    assert torch.equal(loaded.decode_stream(vae.encode(clip)), vae.decode_stream(vae.encode(clip)))


def fresh_vae() -> VideoVAE:
    return VideoVAE(VAEConfig(latent_channels=6, channels=(8, 16, 16)))


def test_a_fresh_posterior_is_narrow() -> None:
    vae = fresh_vae()
    logvar = vae.posterior(clip_for(vae, 1)).logvar
    assert abs(logvar.mean() - INITIAL_LOGVAR) < 1.0 and logvar.max() < 0


def test_the_fitted_shortcut_is_the_best_linear_code() -> None:
    vae = fresh_vae()
    torch.nn.init.zeros_(vae.encoder.conv_out.weight)  # the shortcut alone
    clips = clip_for(vae, 2, b=16)
    blocks = fold(clips, (4, 8, 8)).movedim(1, -1).flatten(0, -2).double()
    vae.fit_shortcut(clips)
    latents = vae.encode(clips)
    torch.testing.assert_close(latents.mean(dim=(0, 2, 3, 4)), torch.zeros(6), rtol=0, atol=1e-4)
    flat = latents.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(flat @ flat.T / flat.shape[1], torch.eye(6), rtol=1e-3, atol=1e-3)
    variances = torch.linalg.eigvalsh(torch.cov(blocks.T, correction=0))  # ascending
    axes, center = principal(blocks, 6), blocks.mean(dim=0)
    best = (blocks - center) @ axes @ axes.T + center
    torch.testing.assert_close((best - blocks).square().sum(dim=1).mean(), variances[:-6].sum())
    # fold repeats the first frame, and its rebuilt copies need not agree: compare the later blocks.
    rebuilt, best = (x.view(16, 3, 2, 3, -1)[:, 1:] for x in (decoded_blocks(vae, latents), best))
    torch.testing.assert_close(rebuilt, best, rtol=1e-3, atol=1e-3)


def test_fitting_the_shortcut_takes_little_memory_beside_the_clips() -> None:
    clips = torch.rand(96, 3, 17, 64, 64)
    with LiveBytes() as live:
        fresh_vae().fit_shortcut(clips)
    assert live.peak < 1.5 * clips.nbytes  # the clips count once


def decoded_blocks(vae: VideoVAE, latents: Tensor) -> Tensor:
    return fold(vae.decode(latents), (4, 8, 8)).movedim(1, -1).flatten(0, -2).double()


def principal(rows: Tensor, count: int) -> Tensor:
    """(features, count) directions of largest variance."""
    return torch.linalg.svd(rows - rows.mean(0), full_matrices=False).Vh[:count].T


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"downsample": ("st",)}, "model.downsample has 1 entries for 3 levels: give 2"),
        ({"downsample": ("st", "x")}, "model.downsample entry 'x' is not one of s, t, st"),
        ({"latent_contrast_limit": 0.5}, "model.latent_contrast_limit 0.5 is below 1: use for example 6"),
        ({"latent_spectrum": 2.0}, r"model.latent_spectrum 2.0 is not in \[0, 1\]"),
        ({"encoder_blocks": ("c",)}, r"model.encoder_blocks \['c'\] does not fit 3 levels"),
        ({"decoder_blocks": ("c", "c", "z")}, "model.decoder_blocks .*z.* letters other than"),
        ({"patch_size": (1, 2, 4)}, r"model.patch_size \[1, 2, 4\] is not square"),
    ],
)
def test_impossible_shapes_name_value_and_fix(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VAEConfig(**changes)


def test_learns_one_clip() -> None:
    vae = fresh_vae()
    clip = clip_for(vae, 1)
    clip = torch.nn.functional.avg_pool3d(clip, (1, 4, 4)).repeat_interleave(4, -1).repeat_interleave(4, -2)
    optimizer = torch.optim.Adam(vae.parameters(), 3e-3)
    losses = []
    for _ in range(40):
        posterior = vae.posterior(clip)
        reconstruction = vae.decode(posterior.sample(torch.randn_like(posterior.mean)))
        loss = (reconstruction - clip).square().mean() + 1e-6 * gaussian_kl(posterior.mean, posterior.logvar).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in vae.parameters())
