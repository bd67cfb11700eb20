"""How large the error at a noise level is expected to be, learned beside the DiT: each level then counts the same."""

import torch
from torch import Tensor, nn

KNOTS = 33
MAX_LOGIT = 8.0
"""knots lie evenly over logit(sigma) in [-MAX_LOGIT, MAX_LOGIT]"""
GAIN = 8.0
"""what is learned is log error / GAIN: Adam moves a weight by its learning rate a step, and log errors by units"""


class LevelError(nn.Module):
    """Logarithm of the expected squared error as a piecewise linear function of logit(sigma); zero at first.

    Trained by the likelihood loss of `videodit.flow.loss.likelihood_loss`, whose minimum it is.
    Source: Karras et al. (2024), EDM2, arXiv:2312.02696 (there one linear layer on Fourier features).
    """

    def __init__(self) -> None:
        super().__init__()
        self.knots = nn.Parameter(torch.zeros(KNOTS))

    def forward(self, sigma: Tensor) -> Tensor:
        """Noise levels in [0, 1], of any shape -> log error, the same shape, float32."""
        position = (torch.logit(sigma.float(), eps=1e-6) / MAX_LOGIT).clamp(-1.0, 1.0)  # -1 … 1
        position = (position + 1.0) * (KNOTS - 1) / 2
        below = position.floor().long().clamp(max=KNOTS - 2)
        knots = GAIN * self.knots.float()
        return torch.lerp(knots[below], knots[below + 1], position - below)
