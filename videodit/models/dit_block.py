"""One block of the DiT.

Legend: b batch, t latent frames, s tokens of a frame, d hidden size, h heads, e channels of a head, l text tokens.
"""

import torch
from torch import Tensor, nn

from videodit.models.attention import CrossAttention, SelfAttention
from videodit.models.layers import MLP, Modulation, add_and_norm, modulate
from videodit.models.token_layout import WHOLE, TokenLayout


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to the text (if any) and MLP, the first and last modulated by adaLN.

    Args:
        kind: of its self-attention: s, t or f.
        dim: hidden size d.
        num_heads: of both attentions.
        mlp_dim: hidden width of the MLP.
        qk_norm: see `QKNorm`.
        activation: of the MLP.
        reads_text: whether it has the cross-attention.

    The six modulations are the shared ones plus this block's bias. Source: Wan Team (2025), arXiv:2503.20314, Sec. 4.2
    (shared MLP, bias per block); Peebles & Xie (2022), arXiv:2212.09748 (adaLN-Zero).
    """

    muon_exclude = ("modulation_bias",)

    def __init__(
        self, kind: str, dim: int, num_heads: int, mlp_dim: int, *, qk_norm: str, activation: str, reads_text: bool
    ) -> None:
        super().__init__()
        self.kind = kind
        self.modulation_bias = nn.Parameter(torch.zeros(6, dim))
        self.attention = SelfAttention(dim, num_heads, qk_norm)
        self.cross_norm: nn.LayerNorm | None = None
        self.cross_attention: CrossAttention | None = None
        if reads_text:
            self.cross_norm = nn.LayerNorm(dim, eps=1e-6)
            self.cross_attention = CrossAttention(dim, num_heads, qk_norm)
        self.mlp = MLP(dim, mlp_dim, activation=activation)

    def forward(
        self,
        x: Tensor,
        shared: Tensor,
        rope: Tensor,
        keys_values: tuple[Tensor, Tensor] | None,
        text_mask: Tensor | None,
        layout: TokenLayout = WHOLE,
    ) -> Tensor:
        """One block.

        Args:
            x: (b, t, s, d) tokens.
            shared: (b, t or 1, 1, 6, d) modulations shared by all blocks.
            rope: (2, t, s, e), see `rope_table`.
            keys_values: of the text for this block, or None.
            text_mask: (b, 1, 1, l) or None.
            layout: where the other tokens lie.
        Returns:
            (b, t, s, d).
        """
        six = (shared + self.modulation_bias).unbind(-2)  # each b t 1 d
        attention, mlp = Modulation(*six[:3]), Modulation(*six[3:])
        branch, gate = self.attention(modulate(x, attention), self.kind, rope, layout), attention.gate
        if self.cross_attention is None or self.cross_norm is None or keys_values is None:
            x, normed = add_and_norm(x, branch, gate, mlp)
        else:
            x, normed = add_and_norm(x, branch, gate, self.cross_norm)
            x, normed = add_and_norm(x, self.cross_attention(normed, keys_values, text_mask), None, mlp)
        return torch.addcmul(x, mlp.gate, self.mlp(normed))
