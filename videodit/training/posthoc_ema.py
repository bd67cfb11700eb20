"""Averages of any length from the two that a run stores in each of its checkpoints.

A stored average is a weighted sum of the weights after each step, with known weights: the profile. A profile of
another length is put together from those of all checkpoints by least squares; the same sum of the stored averages is
then its average.

Source: Karras et al. (2024), "Analyzing and Improving the Training Dynamics of Diffusion Models", arXiv:2312.02696,
section 3.2 and appendix C.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from videodit.errors import UserError
from videodit.training.checkpoint import FOLDER, Checkpoint, steps_in
from videodit.training.ema import gamma_of

MAX_ERROR = 0.1
"""Of a profile that is still taken for the wanted one: relative, in the root mean square over the steps."""
MAX_POINTS = 20_000
"""In which a run's steps are compared; more steps are put together, a profile is smooth."""


@dataclass(frozen=True)
class StoredAverage:
    """One average in one checkpoint.

    Attributes:
        step: of the checkpoint.
        sigma_rel: relative width of its profile.
        kind: its name in the checkpoint, ema0 or ema1 …
    """

    step: int
    sigma_rel: float
    kind: str


@dataclass(frozen=True)
class Mixture:
    """A sum of stored averages that stands for one of another length.

    Attributes:
        weights: of each stored average; they sum to 1.
        error: root mean square of the difference between its profile and the wanted one, over that of the wanted one.
    """

    weights: np.ndarray
    error: float


def profile(sigma_rel: float, step: int, edges: np.ndarray) -> np.ndarray:
    """Share that the weights of each interval of steps have in the average at a step.

    The average's recursion, beta_i = (1 - 1/i)^(gamma + 1), gives the weights after step i exactly the share
    (i^(gamma + 1) - (i - 1)^(gamma + 1)) / step^(gamma + 1).

    Args:
        sigma_rel: relative width.
        step: of the average.
        edges: (n + 1,) ascending step numbers from 0; interval k is that of the steps edges[k] + 1 … edges[k + 1].
    Returns:
        (n,), sums to 1.
    """
    return np.diff((np.minimum(edges, step) / step) ** (gamma_of(sigma_rel) + 1))


def mix(stored: Sequence[StoredAverage], sigma_rel: float, step: int) -> Mixture:
    """The sum of stored averages that is nearest to the average of the wanted width at a step.

    Args:
        stored: at least one, of that step or before.
        sigma_rel: wanted relative width.
        step: at which the average is wanted.
    Raises:
        ValueError: if sigma_rel is not in (0, 0.28].
    """
    grid = np.linspace(0, step, min(step, MAX_POINTS) + 1).round()
    edges = np.unique(np.concatenate([grid, [float(average.step) for average in stored]]))
    spread = np.sqrt(np.diff(edges))  # a density's norm over the steps, whatever the intervals are
    wanted = profile(sigma_rel, step, edges) / spread
    columns = np.stack([profile(average.sigma_rel, average.step, edges) / spread for average in stored], axis=1)
    # The nearest one, plus multiples of the differences to it: the weights sum to 1 whatever is solved.
    nearest = int(np.linalg.norm(columns - wanted[:, None], axis=0).argmin())
    differences = columns - columns[:, nearest : nearest + 1]
    scale = np.linalg.norm(differences, axis=0)
    scale[scale == 0] = 1.0
    rest = np.linalg.lstsq(differences / scale, wanted - columns[:, nearest], rcond=None)[0] / scale
    rest[nearest] = 0.0
    rest[nearest] = 1.0 - rest.sum()
    error = float(np.linalg.norm(columns @ rest - wanted) / np.linalg.norm(wanted))
    return Mixture(rest, error)


class PosthocEMA:
    """What all complete checkpoints of a run hold of its averages.

    Args:
        run_dir: the run.
        newest: its newest complete checkpoint, of whose step the average will be; parameters and buffers are its own.
    """

    def __init__(self, run_dir: str | Path, newest: Checkpoint) -> None:
        self._run_dir, self._newest = Path(run_dir), newest
        self._stored: list[tuple[Checkpoint, StoredAverage]] = []
        for step in steps_in(run_dir):
            if step > newest.step:
                continue  # damaged, else it would be the newest
            try:
                checkpoint = (
                    newest if step == newest.step else Checkpoint.open(Path(run_dir) / FOLDER / f"step-{step:08d}")
                )
            except UserError as error:
                warnings.warn(f"{error}; the average is made without it", stacklevel=2)
                continue
            for number, sigma_rel in enumerate(checkpoint.state["ema_profiles"]):
                self._stored.append((checkpoint, StoredAverage(step, sigma_rel, f"ema{number}")))

    @property
    def num_checkpoints(self) -> int:
        """How many are used."""
        return len({average.step for _, average in self._stored})

    def mix(self, sigma_rel: float) -> Mixture:
        """What comes nearest to an average of this relative width.

        Raises:
            UserError: if the width is none, or nothing comes near enough; names the widths that can be had.
        """
        stored = [average for _, average in self._stored]
        try:
            mixture = mix(stored, sigma_rel, self._newest.step)
        except ValueError as error:
            raise UserError(f"--ema_length {sigma_rel}: {error}") from None
        if mixture.error <= MAX_ERROR:
            return mixture
        lengths = np.geomspace(0.01, 0.28, 60).round(3).tolist()
        fitting = [length for length in lengths if mix(stored, length, self._newest.step).error <= MAX_ERROR]
        steps = sorted({average.step for average in stored})
        raise UserError(
            f"--ema_length {sigma_rel} cannot be made from the averages in {self._run_dir} (profiles "
            f"{self._newest.state['ema_profiles']} at {len(steps)} checkpoints, steps {steps[0]} to {steps[-1]}): the "
            f"nearest profile is off by {mixture.error:.0%}; from {min(fitting):g} to {max(fitting):g} can be made, "
            "more with more checkpoints kept"
        )

    def read(self, mixture: Mixture) -> dict[str, torch.Tensor]:
        """The mixture's whole tensors by parameter name, float32."""
        out = {}
        for name, shape in self._newest.state["shapes"].items():
            total = torch.zeros(torch.Size(shape).numel(), dtype=torch.float64)
            for weight, (checkpoint, average) in zip(mixture.weights.tolist(), self._stored, strict=True):
                if weight:
                    total += weight * checkpoint.read(average.kind, name, 0, total.numel()).double()
            out[name] = total.float().view(shape)
        return out
