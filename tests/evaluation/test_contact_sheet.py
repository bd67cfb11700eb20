"""Which frames a sheet shows, where, and at what size."""

import numpy as np
import pytest
from PIL import Image

from videodit.evaluation.contact_sheet import BACKGROUND, GAP, MARGIN, contact_sheet, frame_indices, strip


def numbered(t: int, h: int = 64, w: int = 64) -> np.ndarray:
    """A clip whose frame i has level i."""
    return np.broadcast_to(np.arange(t, dtype=np.uint8)[:, None, None, None], (t, h, w, 3)).copy()


def test_frames_are_spread_from_the_first_to_the_last():
    assert frame_indices(17, 5) == [0, 4, 8, 12, 16]
    assert frame_indices(3, 6) == [0, 1, 2]
    assert frame_indices(9, 1) == [0]


def test_a_strip_holds_its_frames_side_by_side():
    row = strip(numbered(17, 4, 5), 5, scale=2, gap=3)
    assert row.shape == (8, 5 * 10 + 4 * 3, 3)
    assert [int(row[0, i * 13, 0]) for i in range(5)] == [0, 4, 8, 12, 16]
    assert tuple(row[0, 10]) == BACKGROUND


@pytest.mark.parametrize(
    "clip", [np.zeros((2, 4, 4, 3)), np.zeros((4, 4, 3), np.uint8), np.zeros((0, 4, 4, 3), np.uint8)]
)
def test_what_is_no_clip_is_refused(clip: np.ndarray):
    with pytest.raises(ValueError, match="uint8 with t >= 1"):
        strip(clip)


def test_small_clips_are_enlarged_by_whole_pixels_and_sizes_may_mix(tmp_path):
    path = tmp_path / "new" / "sheet.png"
    sheet = contact_sheet([numbered(5), numbered(3, 128, 96)], frames=3, path=path)
    assert sheet.width == 2 * MARGIN + 3 * 128 + 2 * GAP  # 64 enlarged twice
    pixels = np.asarray(sheet)
    assert (pixels[MARGIN : MARGIN + 128, MARGIN : MARGIN + 128] == 0).all()
    assert (pixels[MARGIN, MARGIN + 128 + GAP] == 2).all()
    assert np.array_equal(np.asarray(Image.open(path)), pixels)
    assert [file.name for file in path.parent.iterdir()] == ["sheet.png"]


def test_captions_are_drawn_above_their_clip_and_long_ones_take_more_lines():
    clip = np.full((1, 96, 96, 3), 7, np.uint8)
    plain = contact_sheet([clip])
    short = contact_sheet([clip], ["a star"])
    long = contact_sheet([clip], ["a small red circle moves left over a dark background " + "x" * 60])
    assert plain.height < short.height < long.height and plain.width == short.width == long.width
    above = np.asarray(short)[MARGIN : MARGIN + short.height - plain.height]
    assert (above < 120).any()  # ink
    for sheet in (short, long):  # the clip itself is whole and nothing reaches into the margin
        pixels = np.asarray(sheet)
        assert (pixels[-MARGIN - 96 : -MARGIN, MARGIN:-MARGIN] == 7).all()
        assert (pixels[:, -MARGIN + 2 :] == BACKGROUND).all()


def test_captions_must_match_and_clips_must_be_there():
    with pytest.raises(ValueError, match="2 captions for 1"):
        contact_sheet([numbered(2)], ["a", "b"])
    with pytest.raises(ValueError, match="no clips"):
        contact_sheet([])
