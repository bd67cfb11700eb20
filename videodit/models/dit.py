"""VideoDiT: a transformer over 3D patches of video latents, factorized over space and time by a pattern string.

Legend: b batch, c latent channels, t latent frames, s tokens of a frame, d hidden size, l text tokens.
Tokens stay in one contiguous (b t s d) buffer through all blocks.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from videodit.models.attention import CrossAttention, text_attention_mask
from videodit.models.checkpointing import run_block
from videodit.models.dit_block import DiTBlock
from videodit.models.folder import load_model, save_model
from videodit.models.initialise import init_norm, whole
from videodit.models.layers import ACTIVATIONS, MLP, FinalBias, Modulation, RMSNorm, modulate, sinusoidal_embedding
from videodit.models.local import FrameConv, LocalBlock, LocalLayers
from videodit.models.micro_conditioning import MicroEmbedding
from videodit.models.patchify import PatchIn, PatchOut, patchify, patchify_last, unpatchify, unpatchify_last
from videodit.models.rope import absolute_embedding, rope_table
from videodit.models.token_layout import WHOLE, TokenLayout


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the VideoDiT."""

    in_channels: int = 16
    """channels of the latents"""
    hidden_size: int = 1152
    """width of the tokens"""
    depth: int = 28
    """number of blocks, each with its own MLP"""
    num_heads: int = 16
    """attention heads; hidden_size / num_heads is even"""
    patch_size: tuple[int, int, int] = (1, 2, 2)
    """latent frames, rows and columns of one token"""
    pattern: str = "st"
    """attention of the blocks, repeated to the depth: s spatial, t temporal, f full"""
    cross_attention: str = "sf"
    """letters of the pattern whose blocks attend to the text"""
    text_dim: int = 512
    """channels of the text encoder's output"""
    text_length: int = 0
    """padding is zeros, up to this many tokens for shorter texts, as imported models were trained; 0: as it comes"""
    pooled_text: bool = True
    """add the mean text embedding to the noise-level embedding, so that adaLN sees the prompt too"""
    mask_text: bool = True
    """hide padding from cross-attention (off for imported models that were trained without)"""
    mlp_ratio: float = 4.0
    """hidden width of the MLPs in units of hidden_size"""
    activation: str = "gelu_tanh"
    """in the MLPs: gelu_tanh, or gelu without the approximation, which CPUs compute several times faster"""
    qk_norm: str = "head"
    """RMS norm of queries and keys: head, all or none"""
    absolute_position: bool = False
    """add sines and cosines of each token's place: RoPE alone tells distances, not where in the frame a token is"""
    micro_conditioning: bool = False
    """tell the model each clip's original size, crop and fps, as the latents record them, see docs/training.md"""
    final_modulation: str = "linear"
    """of the last norm: linear, a layer of its own as in DiT; or bias, the embedding and a bias as in Wan"""
    frequency_dim: int = 256
    """channels of the sinusoidal noise-level embedding"""
    rope_theta: float = 10000.0
    """base of the RoPE frequencies"""
    local_width: int = 0
    """channels of convolutional blocks at the latents' resolution, before and after the patches; 0 for none"""
    local_depth: int = 2
    """how many of them before the patches, and how many after"""

    def __post_init__(self) -> None:
        for name in ("in_channels", "hidden_size", "depth", "num_heads", "text_dim", "frequency_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name} {getattr(self, name)} is not positive: use 1 or more")
        if not round(self.hidden_size * self.mlp_ratio) > 0:
            raise ValueError(f"model.mlp_ratio {self.mlp_ratio:g} leaves the MLPs no channel: use for example 4")
        if not self.rope_theta > 0:
            raise ValueError(f"model.rope_theta {self.rope_theta:g} is not positive: use for example 10000")
        for name in ("text_length", "local_width", "local_depth"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name} {getattr(self, name)} is negative: use 0 for none")
        if len(self.patch_size) != 3 or min(self.patch_size) < 1:
            raise ValueError(
                f"model.patch_size {list(self.patch_size)} is not 3 positive numbers: use for example [1, 2, 2]"
            )
        if self.frequency_dim % 2:
            raise ValueError(f"model.frequency_dim {self.frequency_dim} is odd: use {self.frequency_dim + 1}")
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % 2:
            raise ValueError(
                f"model.hidden_size {self.hidden_size} over model.num_heads {self.num_heads} is not an even head size: "
                f"choose a hidden_size that is a multiple of {2 * self.num_heads}"
            )
        if not self.pattern or set(self.pattern) - set("stf"):
            raise ValueError(f"model.pattern {self.pattern!r} has letters other than s, t, f: use for example 'st'")
        if self.depth % len(self.pattern):
            raise ValueError(
                f"model.depth {self.depth} is not a multiple of the {len(self.pattern)} letters of model.pattern "
                f"{self.pattern!r}: choose {max(self.depth // len(self.pattern), 1) * len(self.pattern)}"
            )
        if set(self.cross_attention) - set("stf"):
            raise ValueError(
                f"model.cross_attention {self.cross_attention!r} has letters other than s, t, f: use for example 's'"
            )
        if not set(self.cross_attention) & set(self.pattern):
            raise ValueError(
                f"model.cross_attention {self.cross_attention!r} matches no block of model.pattern {self.pattern!r}: "
                f"the prompt would never reach the tokens; use {self.pattern[0]!r}"
            )
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"model.activation {self.activation!r} is not one of {', '.join(ACTIVATIONS)}")
        if self.final_modulation not in ("linear", "bias"):
            raise ValueError(f"model.final_modulation {self.final_modulation!r} is not one of linear, bias")
        if self.qk_norm not in ("head", "all", "none"):
            raise ValueError(f"model.qk_norm {self.qk_norm!r} is not one of head, all, none")

    @property
    def block_kinds(self) -> str:
        """One letter a block."""
        return self.pattern * (self.depth // len(self.pattern))


@dataclass
class TextContext:
    """A prompt as the blocks use it: computed once per sampling, used at every step.

    Attributes:
        pooled: (b, d) mean text embedding, or None.
        keys_values: for each block that attends to text, its keys and values (b, h, l, e).
        mask: (b, 1, 1, l) bool, or None.
    """

    pooled: Tensor | None
    keys_values: list[tuple[Tensor, Tensor] | None]
    mask: Tensor | None


class VideoDiT(nn.Module):
    """Predicts the velocity of noisy video latents.

    Args:
        config: its shape.
    """

    # Input and output layers, embeddings and modulations: Muon is meant for the hidden matrices only.
    muon_exclude: tuple[str, ...] = (
        "patch_in",
        "patch_out",
        "sigma_embedding",
        "modulation",
        "final_modulation",
        "text_projection",
    )

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.config = config
        d = config.hidden_size
        self.local: LocalLayers | None = None
        if config.local_width:
            self.local = LocalLayers(config.in_channels, config.local_width, config.local_depth, d, config.activation)
            # Between local layers, the patches' matrices are hidden ones.
            self.muon_exclude = tuple(name for name in self.muon_exclude if name not in ("patch_in", "patch_out"))
        patch_channels = config.in_channels * math.prod(config.patch_size)
        self.patch_in = (
            PatchIn(config.local_width, config.patch_size, d) if config.local_width else nn.Linear(patch_channels, d)
        )
        self.sigma_embedding = nn.Sequential(nn.Linear(config.frequency_dim, d), nn.SiLU(), nn.Linear(d, d))
        self.micro_embedding = MicroEmbedding(config.frequency_dim, d) if config.micro_conditioning else None
        self.modulation = nn.Linear(d, 6 * d)
        self.text_projection = MLP(config.text_dim, d, d, activation=config.activation)
        self.blocks = nn.ModuleList(
            DiTBlock(
                kind,
                d,
                config.num_heads,
                round(d * config.mlp_ratio),
                qk_norm=config.qk_norm,
                activation=config.activation,
                reads_text=kind in config.cross_attention,
            )
            for kind in config.block_kinds
        )
        self.final_modulation = nn.Linear(d, 2 * d) if config.final_modulation == "linear" else FinalBias(d)
        self.patch_out = (
            PatchOut(d, config.local_width, config.patch_size) if config.local_width else nn.Linear(d, patch_channels)
        )
        self.checkpointing = "none"
        """which activations of the blocks training keeps, one of `checkpointing.POLICIES`"""
        self._rope: dict[tuple[int, int, int], Tensor] = {}
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every initialisation of the DiT.

        Linear layers: Xavier uniform, biases zero. Convolutions: normal 1/sqrt(fan_in), biases zero. Noise-level
        embedding: normal 0.02. Zero: the modulations with each block's bias (so that every gate starts closed and each
        block is the identity, adaLN-Zero), the cross-attention's output, the last layer (so that the first prediction
        is zero) and that of the micro-conditions (so that they change nothing before they are learned). Norms: weight
        one, bias zero.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, FrameConv)):
                with whole(module.weight, module.bias):
                    if isinstance(module, nn.Linear):
                        nn.init.xavier_uniform_(module.weight)
                    else:
                        nn.init.normal_(module.weight, std=module.weight.shape[1] ** -0.5)
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (nn.LayerNorm, RMSNorm)):
                init_norm(module)
        for module in self.sigma_embedding:
            if isinstance(module, nn.Linear):
                with whole(module.weight):
                    nn.init.normal_(module.weight, std=0.02)
        zero = [self.modulation, self.patch_out]
        if self.local is not None:  # then patch_out is a hidden layer, and conv_out and latent_gate are the last
            local = self.local
            zero[-1:] = [local.modulation, local.final_modulation, local.conv_out, local.latent_gate]
        if self.micro_embedding is not None:
            zero.append(self.micro_embedding.out)
        weights = [layer.weight for layer in zero]
        weights.append(getattr(self.final_modulation, "weight", self.final_modulation.bias))
        for module in self.modules():
            if isinstance(module, (DiTBlock, LocalBlock)):
                weights.append(module.modulation_bias)
            if isinstance(module, CrossAttention):
                weights.append(module.proj.weight)
        for weight in weights:
            with whole(weight):
                nn.init.zeros_(weight)

    def text_context(self, text: Tensor, text_mask: Tensor) -> TextContext:
        """Text keys and values of every block and the pooled prompt.

        Args:
            text: (b, l, text_dim) from a text encoder.
            text_mask: (b, l) bool, true where there is text; at least one token each.
        """
        if self.config.text_length:
            missing = max(self.config.text_length - text.shape[1], 0)
            text = nn.functional.pad(text * text_mask[..., None].to(text), (0, 0, 0, missing))
            text_mask = nn.functional.pad(text_mask, (0, missing))
        text = self.text_projection(text)  # b l d
        pooled = None
        if self.config.pooled_text:
            weight = text_mask.to(text.dtype)[..., None]
            pooled = (text * weight).sum(dim=1) / weight.sum(dim=1).clamp(min=1.0)
        attentions = [block.cross_attention for block in cast("Iterable[DiTBlock]", self.blocks)]
        keys_values = [None if attention is None else attention.keys_values(text) for attention in attentions]
        return TextContext(pooled, keys_values, text_attention_mask(text_mask) if self.config.mask_text else None)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor | TextContext,
        text_mask: Tensor | None = None,
        *,
        origin: Tensor | None = None,
        micro_conditions: Tensor | None = None,
        layout: TokenLayout = WHOLE,
    ) -> Tensor:
        """Velocity noise - x0 at the given noise level.

        Args:
            latents: (b, c, t, h, w) noisy latents.
            sigma: (b,) or (b, t) noise level in [0, 1] of the clip or of each latent frame.
            text: (b, l, text_dim), or a `TextContext` from `text_context`.
            text_mask: (b, l) bool; needed unless text is a `TextContext`.
            origin: (b, 2) first row and column of each clip in the latents that it is a crop of, multiples of the
                patch; with `absolute_position` the model sees them.
            micro_conditions: (b, 5) of `MICRO_CONDITIONS`; needed with `micro_conditioning`, else not looked at.
            layout: where the tokens lie; every rank that shares them gives the same latents and gets the same result.
        Returns:
            The latents' shape and dtype.
        Raises:
            ValueError: if the patch does not divide the latents, sigma does not fit, or micro_conditions are missing.
        """
        b, _, t, h, w = latents.shape
        pt, ph, pw = self.config.patch_size
        if t % pt or h % ph or w % pw:
            raise ValueError(f"latents of {t}x{h}x{w} are not divided by the patch {pt}x{ph}x{pw}")
        if sigma.shape not in ((b,), (b, t)):
            raise ValueError(f"sigma has shape {tuple(sigma.shape)}: give ({b},) or ({b}, {t})")
        if not isinstance(text, TextContext):
            if text_mask is None:
                raise ValueError("text without text_mask: give the (b, l) mask of the tokens that are text")
            text = self.text_context(text, text_mask)

        per_token_frame = sigma[:, None] if sigma.dim() == 1 else sigma[:, ::pt]  # b 1 or b t
        embedded = sinusoidal_embedding(1000.0 * per_token_frame, self.config.frequency_dim)
        condition = self.sigma_embedding(embedded.to(latents.dtype))  # b t d
        if text.pooled is not None:
            condition = condition + text.pooled[:, None]
        if self.micro_embedding is not None:
            condition = condition + self.micro_embedding(micro_conditions, condition)
        embedding, condition = condition, nn.functional.silu(condition)
        if self.local is None:
            patches = layout.take(patchify(latents, self.config.patch_size))
        else:  # each rank its own frames
            mine = layout.frames(latents.permute(0, 2, 3, 4, 1)).contiguous()  # b t h w c; read twice in that order
            per_frame = layout.frames(condition)
            per_frame = per_frame if sigma.dim() == 1 else per_frame.repeat_interleave(pt, dim=1)
            features = self.local.read(mine, per_frame, layout)  # b t h w f
            patches = patchify_last(features, self.config.patch_size)
        x = self.patch_in(patches)  # b t s d
        if self.config.absolute_position:
            if origin is not None:
                rows, columns = origin.to(x.device).unbind(1)
                origin = torch.stack([rows // ph, columns // pw], dim=1)  # in tokens
            size = (t // pt, h // ph, w // pw)
            x = x + layout.take(absolute_embedding(*size, self.config.hidden_size, origin, x.device)).to(x)
        shared = self.modulation(condition).unflatten(-1, (6, -1))[:, :, None]  # b t 1 6 d
        rope = self._rope_table(t // pt, h // ph, w // pw, x.device)
        for block, keys_values in zip(cast("Iterable[DiTBlock]", self.blocks), text.keys_values):
            layout, x = layout.switch(block.kind, x)
            inputs = (x, layout.frames(shared), layout.table(rope), keys_values, text.mask, layout)
            x = run_block(self.checkpointing, block, *inputs)
        if self.local is not None:
            layout, x = layout.switch("s", x)
        final = self.final_modulation(embedding if self.config.final_modulation == "bias" else condition)
        shift, scale = layout.frames(final)[:, :, None].chunk(2, dim=-1)  # each b t 1 d
        x = self.patch_out(modulate(x, Modulation(shift, scale, gate=scale)))
        if self.local is None:
            return unpatchify(layout.join(x), self.config.patch_size, h // ph, w // pw)
        features = features + unpatchify_last(x, self.config.patch_size, h // ph, w // pw)
        return layout.join(self.local.write(features, mine, per_frame, layout)).permute(0, 4, 1, 2, 3)

    def _rope_table(self, t: int, h: int, w: int, device: torch.device) -> Tensor:
        table = self._rope.get((t, h, w))
        if table is None or table.device != device:
            head_dim = self.config.hidden_size // self.config.num_heads
            with torch.inference_mode(False):  # kept, and training cannot use what was made in inference mode
                table = rope_table(t, h, w, head_dim, self.config.rope_theta).to(device)
            self._rope = {(t, h, w): table}
        return table

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors."""
        save_model(self, self.config, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VideoDiT":
        """Loads what `save_pretrained` wrote, in evaluation mode; raises UserError if the folder is not whole."""
        return load_model(cls, DiTConfig, folder)
