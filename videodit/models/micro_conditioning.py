"""Micro-conditioning: the DiT is told how big a clip was, how it was cropped and how fast it runs.

A set of clips then needs no filter for size: the model learns what a small or cropped original looks like, and is asked
for a large whole one.

Legend: b batch, d hidden size, f channels of each sinusoidal embedding.
Source: Podell et al. (2023), SDXL, arXiv:2307.01952, Sec. 2.2; fps as one more condition is ours.
"""

from torch import Tensor, nn

from videodit.models.layers import sinusoidal_embedding

MICRO_CONDITIONS = ("original_height", "original_width", "crop_top", "crop_left", "fps")
"""In this order in tensors (b, 5). Height and width in pixels before the resize, the crop's corner in pixels after it,
frames per second after every n-th was taken; 0 is a rate that nobody knows."""


class MicroEmbedding(nn.Module):
    """Micro-conditions to what is added to the noise-level embedding.

    Args:
        frequency_dim: f, even.
        dim: hidden size d.
    """

    muon_exclude = ("hidden", "out")

    def __init__(self, frequency_dim: int, dim: int) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.hidden = nn.Linear(len(MICRO_CONDITIONS) * frequency_dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, conditions: Tensor | None, like: Tensor) -> Tensor:
        """(b, 5) of MICRO_CONDITIONS -> (b, 1, d), of the dtype and on the device of `like`.

        Raises:
            ValueError: if they are None, or not five of each row of `like`.
        """
        if conditions is None or conditions.shape != (len(like), len(MICRO_CONDITIONS)):
            found = "are missing" if conditions is None else f"have shape {tuple(conditions.shape)}"
            raise ValueError(
                f"micro_conditions {found}: this model has micro_conditioning and needs ({len(like)}, "
                f"{len(MICRO_CONDITIONS)}), the {', '.join(MICRO_CONDITIONS)} of each clip"
            )
        embedded = sinusoidal_embedding(conditions.to(like.device), self.frequency_dim)  # b 5 f
        hidden = nn.functional.silu(self.hidden(embedded.flatten(1).to(like.dtype)))
        return self.out(hidden)[:, None]
