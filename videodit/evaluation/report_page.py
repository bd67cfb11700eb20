"""What every page that we write has in common: one HTML file that holds all it shows and may load nothing."""

import base64
import io
import os
from collections.abc import Iterable
from html import escape
from pathlib import Path

from PIL import Image

from videodit.data.video_io import VideoError, read_frames
from videodit.evaluation.report_style import SCRIPT, STYLE

POLICY = "default-src 'none'; media-src data:; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
LOGO = '<svg viewBox="0 0 24 24" aria-hidden="true"><path d="M3 9h12v12H3zM6 6h12v12M9 3h12v12"/></svg>'


def page(brand: str, title: str, lead: str, tiles: str, sections: Iterable[str]) -> str:
    """The page as text.

    Args:
        brand: what kind of page it is, above the title.
        title: its heading.
        lead: one line under it.
        tiles: key figures, as `tile_row` gives them.
        sections: as `section` gives them.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<div class="brand">{LOGO}{escape(brand)}</div>
<h1>{escape(title)}</h1>
<p class="verdict">{escape(lead)}</p>
{tiles}
</header>
<main>
{"".join(sections)}</main>
<footer>This file holds everything it shows and loads nothing.</footer>
<script>{SCRIPT}</script>
</body>
</html>
"""


def section(title: str, lead: str, body: str, button: str = "") -> str:
    """A part of the page: heading, a sentence that says how to read it, HTML."""
    return f'<section><div class="head"><h2>{title}</h2>{button}</div><p class="lead">{lead}</p>{body}</section>\n'


def tile_row(rows: Iterable[tuple[str, str, str]]) -> str:
    """Key figures: (name, value as HTML, what it is of) each; "" without any."""
    cards = "".join(
        f'<div class="card tile"><span>{escape(name)}</span><b>{value}</b><span>{escape(below)}</span></div>'
        for name, value, below in rows
    )
    return f'<div class="tiles">{cards}</div>' if cards else ""


def video(mp4: bytes, label: str) -> str:
    """A clip that plays silently over and over while it is in sight.

    Its first frame is the poster: builds of Chromium without H.264, and printers, show that.
    """
    label = escape(label, quote=True)
    poster = f' poster="{_data("image/jpeg", still)}"' if (still := _first_frame(mp4)) else ""
    return (
        f'<video src="{_data("video/mp4", mp4)}"{poster} aria-label="{label}" autoplay loop muted playsinline></video>'
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _first_frame(mp4: bytes) -> bytes:
    """JPEG; empty if the clip does not decode, as one from elsewhere may not."""
    try:
        frame = read_frames(mp4, 0, 1)[0]
    except VideoError:
        return b""
    jpeg = io.BytesIO()
    Image.fromarray(frame).save(jpeg, "JPEG", quality=85)
    return jpeg.getvalue()


def write_page(path: str | Path, text: str) -> None:
    """Writes a page, atomically; its folder is made if need be.

    Raises:
        OSError: if the file cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
