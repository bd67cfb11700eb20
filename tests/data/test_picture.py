"""Pictures: upright, on white, small enough; beside videos in one set, each in its own bucket."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.test_scores import moving, texture
from videodit.data import picture
from videodit.data.clip_reader import DataConfig
from videodit.data.filters import FilterConfig
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.ingest_record import read_rejects
from videodit.data.loader import ClipLoader
from videodit.data.mp4 import encode_mp4
from videodit.data.picture import read_picture
from videodit.data.shards import ShardSet
from videodit.data.video_io import VideoError


def encoded(pixels: np.ndarray, kind: str, **options: object) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_followed(orientation: int) -> None:
    upright = texture(0, 24, 40)
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = {2: np.fliplr, 3: lambda x: np.rot90(x, 2), 4: np.flipud, 5: lambda x: x.transpose(1, 0, 2)}
    turned |= {
        6: lambda x: np.rot90(x, 1),
        7: lambda x: np.rot90(x, 2).transpose(1, 0, 2),
        8: lambda x: np.rot90(x, -1),
    }
    stored = np.ascontiguousarray(turned.get(orientation, lambda x: x)(upright))
    assert (read_picture(encoded(stored, "PNG", exif=exif)) == upright).all()


def test_transparent_grey_and_palette_pictures() -> None:
    layer = np.zeros((4, 6, 4), np.uint8)
    layer[:, 3:] = (10, 20, 30, 255)
    seen = read_picture(encoded(layer, "PNG"))
    assert (seen[:, :3] == 255).all() and (seen[:, 3:] == (10, 20, 30)).all()
    assert (read_picture(encoded(np.full((4, 6), 77, np.uint8), "PNG")) == 77).all()
    out = io.BytesIO()
    Image.fromarray(texture(1, 8, 8)).convert("P").save(out, "PNG")
    assert read_picture(out.getvalue()).shape == (8, 8, 3)


@pytest.mark.parametrize(
    "data", [b"", b"nothing", encoded(texture(2, 32, 32), "JPEG")[:300], encoded(texture(2, 32, 32), "PPM")]
)
def test_damaged_pictures_are_one_reason(data: bytes) -> None:
    with pytest.raises(VideoError, match="does not decode"):
        read_picture(data)


def test_huge_pictures_are_refused_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picture, "MAX_PIXELS", 100)
    with pytest.raises(VideoError, match="20x10 is too large"):
        read_picture(encoded(np.zeros((10, 20, 3), np.uint8), "PNG"))


def test_pictures_and_videos_of_a_tar_share_a_set(tmp_path: Path) -> None:
    """Thresholds on time leave pictures alone; each kind goes to its bucket, with the picture's pixels."""
    pixels = np.maximum(texture(3, 96, 128), 40)
    members = {"a.mp4": encode_mp4(moving(4, 2, height=64, width=64), 8), "b.png": encoded(pixels, "PNG")}
    members |= {"b.txt": b"a picture", "c.mp4": encode_mp4(moving(5, 0, height=64, width=64), 8), "d.webp": b"nothing"}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    filters = FilterConfig(min_motion=0.01, max_static=0.5, min_duration_s=1.0)
    config = IngestConfig(workers=1, images=True, max_short_side=48, filters=filters)
    result = ingest(tmp_path / "0.tar", tmp_path / "out", config)
    assert (result.accepted, result.rejected, result.clips) == (3, 1, 2)
    reasons = [reject["reason"] for reject in read_rejects(tmp_path / "out")]
    assert [reason.split(" 0.")[0] for reason in reasons[1:]] == ["motion"] and "does not decode" in reasons[0]
    shards = ShardSet.open(tmp_path / "out")
    video, image = shards.entries
    assert (set(video.members), set(image.members)) == ({"mp4", "json"}, {"jpg", "json"})
    assert (image.meta["height"], image.meta["width"], image.meta["num_frames"]) == (48, 64, 1)
    assert shards.captions(1) == ["a picture"] and "fps" not in shards.read_json(1)

    data = DataConfig(shards=str(tmp_path / "out"), buckets=["1x48x64", "17x48x48"], random_crop=False)
    steps = ClipLoader(data, seed=0, global_batch_size=1, micro_batch_size=1).iterate()
    batches = [next(steps)[1][0] for _ in range(2)]
    assert {batch.bucket.name: batch.keys[0] for batch in batches} == {"17x48x48": video.key, "1x48x64": image.key}
    (batch,) = (batch for batch in batches if batch.bucket.frames == 1)
    small = np.asarray(Image.fromarray(pixels).resize((64, 48), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(batch.frames[0, 0].numpy() - small).mean() < 3
