"""Samplers: plain functions over a callable that gives the velocity; they know no model.

Legend: x (b, c, t, h, w); sigmas (n + 1,) falling from 1 to 0; noise() a fresh standard normal tensor of x's shape.
"""

from collections.abc import Callable

from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma (b,)) -> velocity, x's shape."""
NoiseFn = Callable[[], Tensor]
"""() -> standard normal noise of x's shape, new at every call."""

RENOISE_ABOVE = 0.8
"""`renoise` draws new noise above this noise level; below it, where only detail is open, it is Euler."""


def euler(velocity: VelocityFn, x: Tensor, sigmas: Tensor, noise: NoiseFn) -> Tensor:
    """First-order integration of dx/dsigma = velocity, one call a step.

    Source: Liu et al. (2022), arXiv:2209.03003, Algorithm 1.
    """
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        x = x + (after - now) * velocity(x, now.expand(x.shape[0]))
    return x


def renoise(velocity: VelocityFn, x: Tensor, sigmas: Tensor, noise: NoiseFn) -> Tensor:
    """Euler, but while the noise level is high each step keeps only the clean prediction and draws all noise anew.

    What a young model gets wrong at one step (an object in two places) is then seen afresh by the next one instead of
    being carried on in the noise. Predictions are means, so their repetition also leans towards what is most typical.

    Source: Song et al. (2020), DDIM, arXiv:2010.02502, Eq. 12 with the largest variance it admits.
    """
    anew = ((sigmas[:-1] > RENOISE_ABOVE) & (sigmas[1:] > 0)).tolist()  # asked once: Python waits for a GPU's answer
    for now, after, renewed in zip(sigmas[:-1], sigmas[1:], anew):
        slope = velocity(x, now.expand(x.shape[0]))
        if renewed:
            x = (1 - after) * (x - now * slope) + after * noise()
        else:
            x = x + (after - now) * slope
    return x


def heun(velocity: VelocityFn, x: Tensor, sigmas: Tensor, noise: NoiseFn) -> Tensor:
    """Second-order integration, two calls a step (one in the last, as sigma reaches 0).

    Source: Karras et al. (2022), EDM, arXiv:2206.00364, Algorithm 1.
    """
    noisy_after = (sigmas[1:] > 0).tolist()  # asked once: Python waits for a GPU's answer
    for now, after, noisy in zip(sigmas[:-1], sigmas[1:], noisy_after):
        slope = velocity(x, now.expand(x.shape[0]))
        guess = x + (after - now) * slope
        if noisy:
            slope = 0.5 * (slope + velocity(guess, after.expand(x.shape[0])))
            guess = x + (after - now) * slope
        x = guess
    return x


Sampler = Callable[[VelocityFn, Tensor, Tensor, NoiseFn], Tensor]
SAMPLERS: dict[str, Sampler] = {"euler": euler, "heun": heun, "renoise": renoise}
