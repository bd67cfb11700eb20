"""The module that is trained and averaged as one: the DiT and what is trained jointly with it."""

from torch import Tensor, nn

from videodit.models.dit import TextContext, VideoDiT
from videodit.models.level_error import LevelError
from videodit.models.text import ByteTextEncoder, TextFeatures
from videodit.models.token_layout import WHOLE, TokenLayout


class TextToVideoModel(nn.Module):
    """{dit, text_encoder, level_error}.

    Args:
        dit: the denoiser.
        text_encoder: the encoder that is trained with it, or None when embeddings of a frozen encoder come in.
        level_error: weights the loss; not needed to sample.
    """

    def __init__(
        self, dit: VideoDiT, text_encoder: ByteTextEncoder | None, level_error: LevelError | None = None
    ) -> None:
        super().__init__()
        self.dit = dit
        self.text_encoder = text_encoder
        self.level_error = level_error
        self.muon_exclude = tuple(f"dit.{name}" for name in dit.muon_exclude)
        if text_encoder is not None:
            self.muon_exclude += tuple(f"text_encoder.{name}" for name in text_encoder.muon_exclude)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: list[str] | TextFeatures | TextContext,
        *,
        origin: Tensor | None = None,
        micro_conditions: Tensor | None = None,
        layout: TokenLayout = WHOLE,
        with_level_error: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity of noisy latents.

        Args:
            latents: (b, c, t, h, w).
            sigma: (b,) or (b, t).
            text: b captions for the joint encoder, features of a frozen one, or a context made by `text_context`.
            origin: (b, 2) where crops lie, as `VideoDiT.forward` takes it.
            micro_conditions: (b, 5), as `VideoDiT.forward` takes them.
            layout: where the tokens lie, as `VideoDiT.forward` takes it.
            with_level_error: gives sigma's log error as well, in sigma's shape; the loss asks here and not at
                `level_error` itself because ZeRO-3 has a module's weights in its forward call only.
        """
        context = text if isinstance(text, TextContext) else self.text_context(text)
        velocity = self.dit(latents, sigma, context, origin=origin, micro_conditions=micro_conditions, layout=layout)
        if not with_level_error:
            return velocity
        if self.level_error is None:
            raise ValueError("with_level_error asked of a model without level_error")
        return velocity, self.level_error(sigma)

    def text_context(self, text: list[str] | TextFeatures) -> TextContext:
        """Captions or features -> what the blocks use."""
        if isinstance(text, list):
            if self.text_encoder is None:
                raise ValueError("captions given to a model without a text encoder: give TextFeatures")
            text = self.text_encoder.encode(text)
        return self.dit.text_context(text.embeddings, text.mask)
