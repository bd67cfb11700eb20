"""Samplers: plain functions over a callable that gives the velocity; they know no model.

Legend: x (b, c, t, h, w); sigmas (n + 1,) falling from 1 to 0.
"""

from collections.abc import Callable

from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(x, sigma (b,)) -> velocity, x's shape."""


def euler(velocity: VelocityFn, x: Tensor, sigmas: Tensor) -> Tensor:
    """First-order integration of dx/dsigma = velocity, one call a step.

    Source: Liu et al. (2022), arXiv:2209.03003, Algorithm 1.
    """
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        x = x + (after - now) * velocity(x, now.expand(x.shape[0]))
    return x


def heun(velocity: VelocityFn, x: Tensor, sigmas: Tensor) -> Tensor:
    """Second-order integration, two calls a step (one in the last, as sigma reaches 0).

    Source: Karras et al. (2022), EDM, arXiv:2206.00364, Algorithm 1.
    """
    for now, after in zip(sigmas[:-1], sigmas[1:]):
        slope = velocity(x, now.expand(x.shape[0]))
        guess = x + (after - now) * slope
        if after > 0:
            slope = 0.5 * (slope + velocity(guess, after.expand(x.shape[0])))
            guess = x + (after - now) * slope
        x = guess
    return x


SAMPLERS: dict[str, Callable[[VelocityFn, Tensor, Tensor], Tensor]] = {"euler": euler, "heun": heun}
