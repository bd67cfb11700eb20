"""A picture as a clip of one frame: decoded, turned upright, made smaller, written as JPEG."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from videodit.data.clip_cutter import Clip, CutResult, CutRules
from videodit.data.letterbox import Bars, find_bars
from videodit.data.scores import score_clip
from videodit.data.shards import sha256_hex
from videodit.data.video_io import MAX_PIXELS, VideoError
from videodit.errors import user_error

_QUALITY = 95
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # Pillow tells by content, and runs Ghostscript for EPS


def read_picture(source: str | bytes) -> np.ndarray:
    """Decodes a picture: (h, w, 3) uint8 RGB, upright, on white where it is transparent.

    Raises:
        VideoError: if it does not decode, or is larger than a damaged header would be believed.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise VideoError(f"a picture of {image.width}x{image.height} is too large")
            upright = ImageOps.exif_transpose(image)
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
            return np.asarray(upright.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise VideoError(f"does not decode: {error}") from error


def cut_picture(source: str | bytes, spool: Path, rules: CutRules) -> CutResult:
    """One picture into one clip, or what is wrong with it; as `cut_source` does for videos.

    Raises:
        UserError: if the spool cannot be written.
    """
    try:
        pixels = read_picture(source)
    except VideoError as error:
        return CutResult(problem=str(error))
    bars = find_bars([pixels]) if rules.crop_bars else Bars()
    pixels = pixels[bars.top : len(pixels) - bars.bottom, bars.left : pixels.shape[1] - bars.right]
    image = Image.fromarray(pixels)
    scale = rules.max_short_side / min(image.size) if rules.max_short_side else 1.0
    if scale < 1:
        image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    out = io.BytesIO()
    image.save(out, "JPEG", quality=_QUALITY, subsampling=0)
    data = out.getvalue()
    try:
        spool.write_bytes(data)
    except OSError as error:
        raise user_error(error, spool) from error
    scores = score_clip(np.asarray(image)[None], fps=1.0)
    clip = Clip(0, 1, image.height, image.width, 0.0, 0, len(data), sha256_hex(data), scores, bars, extension="jpg")
    return CutResult([clip])
