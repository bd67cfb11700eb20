"""`videodit inspect`: crops are those of the loader, and the page tells what filters and ingest left out."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.data.test_ingest import scene
from videodit.data.clip_reader import DataConfig
from videodit.data.filters import FilterConfig
from videodit.data.ingest import IngestConfig, ingest
from videodit.data.loader import ClipLoader
from videodit.data.mp4 import write_mp4
from videodit.data.shards import ShardSet
from videodit.data.video_io import read_frames
from videodit.errors import UserError
from videodit.evaluation import inspect_shards as module
from videodit.evaluation.histogram import histogram
from videodit.evaluation.inspect_shards import InspectConfig, inspect_shards

DATA = DataConfig(buckets=["5x32x32", "9x32x64"])


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six clips in two shapes, two of them too short in seconds, and one file that does not decode."""
    folder = tmp_path_factory.mktemp("videos")
    for i in range(6):
        height, width = ((48, 64), (48, 96))[i % 2]
        write_mp4(folder / f"clip_{i}.mp4", scene(i, 17 if i < 2 else 33, height, width), 8)
    (folder / "clip_4.txt").write_text("a <b>caption</b> & more")
    (folder / "broken.mp4").write_bytes(b"nothing")
    config = IngestConfig(workers=1, scene_cuts=False, filters=FilterConfig(min_duration_s=3.0))
    ingest(folder, folder / "shards", config)
    return folder / "shards"


def test_crops_are_the_loaders(shards: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shown: dict[str, tuple[str, np.ndarray, str]] = {}
    render = module.render_shards_report

    def kept(report: module.ShardsReport) -> str:
        shown.update({c.entry.key: (c.bucket, read_frames(c.mp4), c.caption) for c in report.crops})
        return render(report)

    monkeypatch.setattr(module, "render_shards_report", kept)
    for epoch in (0, 3):
        config = InspectConfig(data=DATA, seed=7, epoch=epoch, clips=40, out=str(tmp_path / "page.html"))
        inspect_shards(str(shards), config)
        assert len(shown) == 4
        data = replace(DATA, shards=str(shards))
        loader = ClipLoader(data, seed=7, global_batch_size=1, micro_batch_size=1, multiple=1)
        steps = loader.iterate(4 * epoch + 1)
        for _ in range(4):
            (batch,) = next(steps)[1]
            bucket, frames, caption = shown[batch.keys[0]]
            assert (bucket, caption) == (batch.bucket.name, batch.captions[0])
            factor = module.SMALLEST // 32
            pixels = batch.pixels()[0].numpy().repeat(factor, axis=1).repeat(factor, axis=2)
            assert frames.shape == pixels.shape
            assert np.abs(frames.astype(int) - pixels).mean() < 8  # H.264; one pixel beside it is 16


@pytest.mark.parametrize("clips", [0, 1, 3])
def test_few_clips_are_dealt_to_the_buckets(shards: Path, tmp_path: Path, clips: int) -> None:
    page = inspect_shards(str(shards), InspectConfig(data=DATA, clips=clips, out=str(tmp_path / "page.html")))
    assert page.read_text().count("<video") == clips


def test_the_page_says_what_there_is(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = inspect_shards(str(shards), InspectConfig(data=DATA))
    page, printed = path.read_text(), capsys.readouterr().out
    assert path == shards / "inspect.html"
    for text in (page, printed):
        assert "5x32x32" in text and "9x32x64" in text and "min_duration_s" in text
    assert "Filters leave 2 of 6 clips out." in page
    assert "4 (−2)" in page  # the funnel
    assert "cannot be opened" in page and "broken.mp4" in page
    assert "duration_s 2.125 is below min_duration_s 3" in page
    assert "a &lt;b&gt;caption&lt;/b&gt; &amp; more" in page and "<b>caption</b>" not in page
    assert page.count('<svg class="chart"') == 7
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert len(ShardSet.open(shards)) == 4  # the page beside the shards is none of them


def test_brackets_in_a_folders_name_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    lists: dict[str, Any] = dict.fromkeys(("entries", "buckets", "crops", "left_out", "rejects"), ())
    counts = dict.fromkeys(("sources", "rejected", "too_short"), 0)
    module._print(module.ShardsReport(name="runs/[old]", filters=FilterConfig(), stages={}, **lists, **counts))
    assert "runs/[old]" in capsys.readouterr().out


def test_shards_from_elsewhere_have_no_scores(shards: Path, tmp_path: Path) -> None:
    for tar in shards.glob("*.tar"):
        (tmp_path / tar.name).write_bytes(tar.read_bytes())
    page = inspect_shards(str(tmp_path), InspectConfig(data=DATA, clips=0)).read_text()
    assert "No clip is filtered out." in page and "Sources" not in page


def test_settings_of_a_run_are_followed(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text("run_dir: x\nseed: 5\ndata:\n  buckets: [13x16x48]\n  shards: elsewhere\n")
    for like in (tmp_path, tmp_path / "config.yaml"):
        inspect_shards(str(shards), InspectConfig(like=str(like), out=str(tmp_path / "page.html"), clips=4))
        assert "13x16x48" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("like", "words"),
    [("none.yaml", "no config of a run"), ("dit.yaml", "only those cut clips"), ("list.yaml", "no config of a train")],
)
def test_bad_settings(shards: Path, tmp_path: Path, like: str, words: str) -> None:
    (tmp_path / "dit.yaml").write_text("data: {caption_drop: 0.1}\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=words):
        inspect_shards(str(shards), InspectConfig(like=str(tmp_path / like)))
    with pytest.raises(UserError, match="no such folder of shards"):
        inspect_shards(str(tmp_path / "none"), InspectConfig())
    with pytest.raises(UserError, match="longest clip has 33 frames"):
        inspect_shards(str(shards), InspectConfig(data=DataConfig(buckets=["37x16x16"])))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="not a folder"):
        inspect_shards(str(shards), InspectConfig(data=DATA, clips=0, out=str(tmp_path / "file" / "page.html")))


def test_histogram_counts_each_value_once_and_pales_what_is_out() -> None:
    svg = histogram([0.0] * 5 + [1.0] * 3 + [2.0], "x", low=0.5)
    heights = [float(h) for h in re.findall(r'class="bin[^"]*".*?height="([0-9.]+)"', svg)]
    assert sum(round(5 * h / max(heights)) for h in heights) == 9
    assert svg.count('class="bin out"') == 1 and svg.count('class="limit"') == 1
    assert "No values" in histogram([], "x")
    assert histogram([2.0, 2.0], "x").count("<rect") == 1
