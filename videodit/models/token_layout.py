"""Where a clip's tokens lie: all on this rank, or a part of them while other ranks hold the rest.

The DiT's forward pass is written once, over a `TokenLayout`; `videodit.parallel.sequence` has the one that spreads the
tokens over ranks. A layout never changes: `switch` gives the layout that the next block needs beside the tokens.

Legend: b batch, t latent frames, s tokens of a frame, d hidden size, h heads, e channels of a head.
"""

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor


class TokenLayout(Protocol):
    """The parts of a forward pass that depend on where tokens lie."""

    def take(self, tokens: Tensor) -> Tensor:
        """This rank's part of tokens that every rank has: (…, t, s, d) -> the same axes."""

    def switch(self, kind: str, tokens: Tensor) -> "tuple[TokenLayout, Tensor]":
        """Tokens (b, t, s, d) as attention of a kind needs them: whole frames for 's', all frames for 't'."""

    def frames(self, per_frame: Tensor) -> Tensor:
        """Of something for every frame, or for all at once, (b, t or 1, …): that for this rank's frames.

        A token may span several latent frames: what has t of these is split at the same places.
        """

    def neighbours(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """Of this rank's latent frames (b, t, …), while whole ones are here: the frames before them and those after.

        Returns:
            Each of the given shape: at i what is at i - 1, or at i + 1, of the clip; zeros beyond its ends.
        """

    def table(self, rope: Tensor) -> Tensor:
        """This rank's part of the RoPE table (2, t, s, e)."""

    def spread_heads(self, tokens: Tensor) -> Tensor:
        """For full attention: queries, keys or values (b, t, s, h, e) -> all tokens, this rank's heads."""

    def collect_heads(self, tokens: Tensor) -> Tensor:
        """The inverse of `spread_heads`, for its result (b, t, s, h, e)."""

    def join(self, tokens: Tensor) -> Tensor:
        """All tokens (b, t, s, d), on every rank; or all latent frames (b, t, …), while whole ones are here."""


class WholeTokens:
    """All tokens of the clip on this rank."""

    def take(self, tokens: Tensor) -> Tensor:
        return tokens

    def switch(self, kind: str, tokens: Tensor) -> tuple[TokenLayout, Tensor]:
        return self, tokens

    def frames(self, per_frame: Tensor) -> Tensor:
        return per_frame

    def neighbours(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        rest = (0, 0) * (frames.dim() - 2)
        return F.pad(frames[:, :-1], (*rest, 1, 0)), F.pad(frames[:, 1:], (*rest, 0, 1))

    def table(self, rope: Tensor) -> Tensor:
        return rope

    def spread_heads(self, tokens: Tensor) -> Tensor:
        return tokens

    def collect_heads(self, tokens: Tensor) -> Tensor:
        return tokens

    def join(self, tokens: Tensor) -> Tensor:
        return tokens


WHOLE = WholeTokens()
