"""Where a clip's tokens lie: all on this rank, or a part of them while other ranks hold the rest.

The DiT's forward pass is written once, over a `TokenLayout`; `videodit.parallel.sequence` has the one that spreads the
tokens over ranks. A layout never changes: `switch` gives the layout that the next block needs beside the tokens.

Legend: b batch, t latent frames, s tokens of a frame, d hidden size, h heads, e channels of a head.
"""

from typing import Protocol

from torch import Tensor


class TokenLayout(Protocol):
    """The parts of a forward pass that depend on where tokens lie."""

    def take(self, tokens: Tensor) -> Tensor:
        """This rank's part of tokens that every rank has: (…, t, s, d) -> the same axes."""

    def switch(self, kind: str, tokens: Tensor) -> "tuple[TokenLayout, Tensor]":
        """Tokens (b, t, s, d) as attention of a kind needs them: whole frames for 's', all frames for 't'."""

    def frames(self, per_frame: Tensor) -> Tensor:
        """Of something for every frame, or for all at once, (b, t or 1, …): that for this rank's frames."""

    def table(self, rope: Tensor) -> Tensor:
        """This rank's part of the RoPE table (2, t, s, e)."""

    def spread_heads(self, tokens: Tensor) -> Tensor:
        """For full attention: queries, keys or values (b, t, s, h, e) -> all tokens, this rank's heads."""

    def collect_heads(self, tokens: Tensor) -> Tensor:
        """The inverse of `spread_heads`, for its result (b, t, s, h, e)."""

    def join(self, tokens: Tensor) -> Tensor:
        """All tokens (b, t, s, d), on every rank."""


class WholeTokens:
    """All tokens of the clip on this rank."""

    def take(self, tokens: Tensor) -> Tensor:
        return tokens

    def switch(self, kind: str, tokens: Tensor) -> tuple[TokenLayout, Tensor]:
        return self, tokens

    def frames(self, per_frame: Tensor) -> Tensor:
        return per_frame

    def table(self, rope: Tensor) -> Tensor:
        return rope

    def spread_heads(self, tokens: Tensor) -> Tensor:
        return tokens

    def collect_heads(self, tokens: Tensor) -> Tensor:
        return tokens

    def join(self, tokens: Tensor) -> Tensor:
        return tokens


WHOLE = WholeTokens()
