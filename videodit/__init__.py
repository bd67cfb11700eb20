"""Train text-to-video models: raw videos to shards, a video VAE, a space-time DiT, and clips from prompts."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from videodit.generation.pipeline import TextToVideo
    from videodit.models.dit import VideoDiT
    from videodit.models.vae import VideoVAE

__version__ = "0.1.0"
__all__ = ["TextToVideo", "VideoDiT", "VideoVAE", "__version__"]

_HOMES = {
    "TextToVideo": "videodit.generation.pipeline",
    "VideoDiT": "videodit.models.dit",
    "VideoVAE": "videodit.models.vae",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import videodit` and `videodit --help` don't load torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'videodit' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
