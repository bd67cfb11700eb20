"""The module that is trained, averaged and exported as one: the DiT and, if it is trained jointly, its text encoder."""

from torch import Tensor, nn

from videodit.models.dit import TextContext, VideoDiT
from videodit.models.text import ByteTextEncoder, TextFeatures


class TextToVideoModel(nn.Module):
    """{dit, text_encoder}.

    Args:
        dit: the denoiser.
        text_encoder: the encoder that is trained with it, or None when embeddings of a frozen encoder come in.
    """

    def __init__(self, dit: VideoDiT, text_encoder: ByteTextEncoder | None) -> None:
        super().__init__()
        self.dit = dit
        self.text_encoder = text_encoder
        self.muon_exclude = tuple(f"dit.{name}" for name in dit.muon_exclude)
        if text_encoder is not None:
            self.muon_exclude += tuple(f"text_encoder.{name}" for name in text_encoder.muon_exclude)

    def forward(self, latents: Tensor, sigma: Tensor, text: list[str] | TextFeatures | TextContext) -> Tensor:
        """Velocity of noisy latents.

        Args:
            latents: (b, c, t, h, w).
            sigma: (b,) or (b, t).
            text: b captions for the joint encoder, features of a frozen one, or a context made by `text_context`.
        """
        return self.dit(latents, sigma, text if isinstance(text, TextContext) else self.text_context(text))

    def text_context(self, text: list[str] | TextFeatures) -> TextContext:
        """Captions or features -> what the blocks use."""
        if isinstance(text, list):
            if self.text_encoder is None:
                raise ValueError("captions given to a model without a text encoder: give TextFeatures")
            text = self.text_encoder.encode(text)
        return self.dit.text_context(text.embeddings, text.mask)
