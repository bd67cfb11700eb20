import hashlib
import math

import pytest
import torch

from videodit.data.randomness import batch_digest, sample_noise, sample_rng, sample_uniform, stable_hash

KEYS = [f"clip_{number:05d}" for number in range(2000)]


def test_hash_separates_all_of_its_arguments():
    arguments = [
        (seed, epoch, key, stream) for seed in (0, 1) for epoch in (0, 1) for key in ("a", "b") for stream in ("a", "b")
    ]
    assert len({stable_hash(*each) for each in arguments}) == len(arguments)
    assert stable_hash(0, 11, "a", "s") != stable_hash(0, 1, "1a", "s")


def test_hash_is_pinned():
    text = b"3\n2\nnoise\nclip"
    assert stable_hash(3, 2, "clip", "noise") == int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def test_noise_of_a_sample_does_not_depend_on_its_batch():
    together = sample_noise(7, 1, KEYS[:5], (4, 3, 4, 4), "noise")
    alone = torch.cat([sample_noise(7, 1, [key], (4, 3, 4, 4), "noise") for key in KEYS[:5]])
    assert together.shape == (5, 4, 3, 4, 4) and together.is_contiguous() and together.dtype == torch.float32
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], sample_noise(7, 2, KEYS[:1], (4, 3, 4, 4), "noise")[0])
    assert not torch.equal(together[0], sample_noise(7, 1, KEYS[:1], (4, 3, 4, 4), "posterior")[0])


def test_noise_is_drawn_frames_first_so_that_a_longer_clip_begins_the_same():
    short = sample_noise(0, 0, ["a"], (16, 2, 4, 4), "noise")
    long = sample_noise(0, 0, ["a"], (16, 5, 4, 4), "noise")
    assert torch.equal(long[:, :, :2], short)
    generator = torch.Generator().manual_seed(stable_hash(0, 0, "a", "noise"))
    assert torch.equal(short[0], torch.randn(2, 16, 4, 4, generator=generator).permute(1, 0, 2, 3))


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sample_noise(0, 0, KEYS[:3], (4, 1, 4, 4), "noise")
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_is_standard_normal_within_and_across_samples():
    noise = sample_noise(0, 0, KEYS, (2, 1, 4, 4), "noise")
    n = noise.numel()
    assert abs(noise.mean().item()) < 5 / math.sqrt(n)
    assert abs(noise.var().item() - 1) < 5 * math.sqrt(2 / n)
    first = noise[:, 0, 0, 0, 0]
    assert abs((first[1:] * first[:-1]).mean().item()) < 5 / math.sqrt(len(KEYS))  # neighbours share nothing


def test_uniform_is_uniform_and_open():
    values = sample_uniform(0, 0, KEYS, "sigma")
    assert values.dtype == torch.float32 and values.min() > 0 and values.max() < 1
    counts = torch.histc(values, bins=10, min=0, max=1)
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # chi-squared, 9 degrees of freedom, 1e-4
    assert torch.equal(values[5:6], sample_uniform(0, 0, KEYS[5:6], "sigma"))


def test_sample_rng_repeats_and_streams_differ():
    assert sample_rng(1, 2, "a", "crop").integers(1 << 30) == sample_rng(1, 2, "a", "crop").integers(1 << 30)
    assert sample_rng(1, 2, "a", "crop").integers(1 << 30) != sample_rng(1, 2, "a", "mask").integers(1 << 30)


@pytest.mark.parametrize("keys", [["a", "b"], ["b", "a"], []])
def test_digest_is_the_sha256_of_the_joined_keys(keys):
    assert batch_digest(keys) == hashlib.sha256("\n".join(keys).encode()).hexdigest()


def test_each_sample_may_have_an_epoch_of_its_own() -> None:
    """A clip that is seen again in an epoch gets other noise, by how often it was seen."""
    keys, epochs, shape = ["a", "b", "a"], [2, 0, 3], (2, 1, 4, 4)
    together, sigma = sample_noise(7, epochs, keys, shape, "noise"), sample_uniform(7, epochs, keys, "sigma")
    for row, (epoch, key) in enumerate(zip(epochs, keys)):
        assert torch.equal(together[row : row + 1], sample_noise(7, epoch, [key], shape, "noise"))
        assert sigma[row] == sample_uniform(7, epoch, [key], "sigma")[0]
    assert not torch.equal(together[0], together[2]) and sigma[0] != sigma[2]
