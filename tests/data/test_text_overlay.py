"""Writing over clips: it is found where it was put, and not where there is none."""

from itertools import islice

import cv2
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from videodit.data.scores import score_clip
from videodit.data.shapes.render import render
from videodit.data.shapes.world import sample_spec
from videodit.data.text_overlay import TextCover, text_mask
from videodit.data.video_io import iter_frames, probe

LIMIT = 0.005  # filters.max_text of configs/ingest_base.yaml
SCENES = {  # of clips without writing, or with too little to matter; frames in between are fades
    "sintel_trailer_30s.mp4": [(0, 190), (286, 348), (348, 388)],
    "nasa_13013.mp4": [(0, 145), (155, 240), (240, 390)],
    "av1_video.mkv": [(0, 125)],
}


def stroke(frame: np.ndarray, text: str, outlined: bool = True) -> np.ndarray:
    """A subtitle in OpenCV's strokes."""
    scale, place = frame.shape[0] / 480, (int(0.15 * frame.shape[1]), int(0.85 * frame.shape[0]))
    for thickness, level in ((round(2 + 5 * scale), 0), (round(1 + 2 * scale), 255))[0 if outlined else 1 :]:
        cv2.putText(frame, text, place, cv2.FONT_HERSHEY_SIMPLEX, scale, (level,) * 3, thickness, cv2.LINE_AA)
    return frame


def printed(frame: np.ndarray, text: str, size: float, place: tuple[float, float]) -> np.ndarray:
    """Text in an outline font."""
    image = Image.fromarray(frame)
    at = place[0] * image.width, place[1] * image.height
    font = ImageFont.load_default(size * image.height)
    ImageDraw.Draw(image).text(at, text, font=font, fill="white", stroke_width=1, stroke_fill="black")
    return np.asarray(image)


def moving(seed: int, frames: int = 17, height: int = 256, width: int = 384) -> np.ndarray:
    noise = np.random.default_rng(seed).standard_normal((height, width)).astype(np.float32)
    soft = cv2.GaussianBlur(noise, (0, 0), 8)
    picture = np.clip(128 + 40 * soft / soft.std(), 0, 255).astype(np.uint8)
    return np.stack([np.roll(picture, 3 * number, axis=1) for number in range(frames)])[..., None].repeat(3, -1)


def cover(frames: np.ndarray, fps: float = 8) -> float:
    return score_clip(frames, fps).text_cover


def test_the_mask_lies_on_the_words() -> None:
    empty = moving(0, 1)[0]
    written = printed(empty, "WORDS IN A ROW", 0.1, (0.2, 0.6))
    truth = (
        cv2.morphologyEx((written != empty).any(-1).astype(np.uint8), cv2.MORPH_CLOSE, np.ones((3, 25), np.uint8)) > 0
    )
    mask = text_mask(cv2.cvtColor(written, cv2.COLOR_RGB2GRAY))
    assert (mask & truth).sum() / (mask | truth).sum() > 0.6
    assert not text_mask(cv2.cvtColor(empty, cv2.COLOR_RGB2GRAY)).any()


@pytest.mark.parametrize("seed", range(3))
def test_subtitles_titles_and_nothing(seed: int) -> None:
    clip = moving(seed)
    assert cover(clip) == 0
    assert cover(np.stack([stroke(frame.copy(), "nobody said a word") for frame in clip])) > LIMIT
    assert cover(np.stack([printed(frame, "- Where were you?", 0.07, (0.2, 0.8)) for frame in clip])) > LIMIT
    title = cover(np.stack([printed(frame, "THE LAST\nSUMMER", 0.2, (0.1, 0.2)) for frame in clip]))
    assert title > 4 * LIMIT


def test_writing_that_is_there_half_of_the_time_counts_half() -> None:
    clip = moving(3, 40)
    written = np.stack([stroke(frame.copy(), "nobody said a word") for frame in clip])
    half = np.concatenate([written[:20], clip[20:]])
    assert cover(half) == pytest.approx(cover(written) / 2, rel=0.2)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_not_looked_at_would_not_have_counted(seed: int) -> None:
    """Writing in some of the pictures: the share is that of the definition over all of their masks."""
    rng = np.random.default_rng(seed)
    empty = cv2.cvtColor(moving(6, 1)[0], cv2.COLOR_RGB2GRAY)
    written = cv2.cvtColor(printed(moving(6, 1)[0], "WORDS IN A ROW", 0.1, (0.2, 0.6)), cv2.COLOR_RGB2GRAY)
    pictures = [written if there else empty for there in rng.random(rng.integers(1, 9)) < 0.5]
    cover = TextCover()
    for picture in pictures:
        cover.push(picture)
    masks = [text_mask(picture) for picture in pictures]
    both = [
        (after & (cv2.dilate(before.astype(np.uint8), np.ones((5, 5), np.uint8)) > 0)).mean()
        for before, after in zip(masks, masks[1:])
    ]
    assert cover.share() == pytest.approx(np.mean(both) if both else masks[0].mean(), abs=1e-12)


def test_what_moves_is_no_overlay() -> None:
    """A sign that the camera passes by; and, a limit of the method, credits that roll."""
    written = printed(moving(4, 1)[0], "ROAD TO THE SEA", 0.08, (0.2, 0.1))
    assert text_mask(cv2.cvtColor(written, cv2.COLOR_RGB2GRAY)).mean() > LIMIT
    assert cover(np.stack([written] * 17)) > LIMIT
    assert cover(np.stack([np.roll(written, 10 * number, axis=0) for number in range(17)])) < LIMIT / 5


def test_the_shapes_world_has_no_writing() -> None:
    for number in range(40):
        spec = sample_spec(np.random.default_rng(number), num_objects=1 + number % 2)
        assert cover(render(spec, 17, 64), 8) == 0


def test_real_clips_with_and_without_subtitles(real_clips) -> None:
    found = written = scenes = 0
    for name, spans in SCENES.items():
        path, number = real_clips / name, 0
        fps, frames = probe(path).fps, list(islice(iter_frames(path), spans[-1][1]))
        for start, stop in spans:
            every = round(fps / 2)
            clip = [frame[58:-58] if "sintel" in name else frame for frame in frames[start:stop:every]]
            scenes += 1
            found += cover(np.stack(clip), 2) > LIMIT
            subtitle = [stroke(frame.copy(), "The quick brown fox jumps", outlined=number % 2 == 0) for frame in clip]
            written += cover(np.stack(subtitle), 2) > LIMIT
            number += 1
    assert (scenes, found, written) == (7, 0, 7)
