"""The VAE's loss is the sum of its terms, each a mean over values, by their weights."""

import torch
from torch.distributions import Normal, kl_divergence

from tests.models.tiny import tiny_vae
from videodit.training.vae_objective import VAELossConfig, VAEObjective


def test_each_term_counts_by_its_weight() -> None:
    vae = tiny_vae()
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(2, 3, 5, 16, 16, generator=generator) * 2 - 1
    noise = torch.randn(2, 4, 2, 2, 2, generator=generator)
    posterior = vae.posterior(clip)
    std = (0.5 * posterior.logvar).exp()
    off = (vae.decode(posterior.mean + std * noise) - clip).flatten(1)
    kl = kl_divergence(Normal(posterior.mean, std), Normal(0.0, 1.0)).flatten(1).mean(dim=1)
    assert kl.min() > 0.1
    for l1, mse, weight in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (2.0, 3.0, 0.7)):
        loss, squared = VAEObjective(vae, VAELossConfig(l1=l1, mse=mse, kl=weight))(clip, noise)
        torch.testing.assert_close(squared, off.square().mean(dim=1))
        torch.testing.assert_close(loss, l1 * off.abs().mean(dim=1) + mse * squared + weight * kl)
