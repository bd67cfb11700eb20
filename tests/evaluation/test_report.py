"""The page: whole, closed to the network, safe against its contents, and true to its figures."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from videodit.data.mp4 import encode_mp4
from videodit.data.video_io import read_frames
from videodit.evaluation.charts import Curve
from videodit.evaluation.machine import machine_facts
from videodit.evaluation.report import ClipCard, Reconstruction, RunReport, render_report, write_report
from videodit.evaluation.report_page import video
from videodit.evaluation.report_summary import verdict
from videodit.evaluation.report_tables import confusion_table, duration, listed, measured_table, percent, stage_table

VOID = {"meta", "br", "img", "input", "link", "hr"}


class Structure(HTMLParser):
    """Checks that tags close in order, and collects addresses and text."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.tags: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "action", "poster")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def report(frames) -> RunReport:
    mp4 = encode_mp4(frames, 8.0)
    red = {"color": "red", "shape": "star", "motion": "left"}
    return RunReport(
        title="A run & its <figures>",
        result={
            "seconds": {"total": 800.0, "vae": 300.0, "dit": 500.0},
            "vae_psnr_db": 31.27,
            "oracle_on_real": {"color": 1.0, "shape": 1.0, "motion": 0.5, "all": 0.5, "n": 2},
            "accuracy": {"color": 0.97, "shape": 0.9, "motion": 0.71, "all": 0.66, "n": 256},
            "held_out_accuracy": {"color": 0.96, "shape": 0.88, "motion": 0.5, "all": 0.4, "n": 64},
            "dit_steps": 1234,
            "device": "cpu",
        },
        clips=[
            ClipCard("a red star <script>alert(1)</script>", mp4, read=red, asked=red),
            ClipCard('a "red" star', mp4, read={**red, "motion": "unclear"}, asked=red, held_out=True),
        ],
        reconstructions=[Reconstruction(mp4, mp4, 31.27), (mp4, mp4, 29.0)],
        curves=[Curve("VAE loss", "loss", range(50), np.linspace(1, 0.1, 50), smooth=True, log=True)],
        stages={"vae": 300.0, "dit": 500.0},
        machine=machine_facts(),
        notes=["Seeds: 0 & 1."],
        configs={"vae.yaml": "width: 32  # <b>"},
        confusion={"motion": {"left": {"left": 3, "unclear": 1}, "orbit": {"left": 2}}},
    )


def test_the_page_is_well_formed_and_loads_nothing(report):
    page = render_report(report)
    structure = Structure(page)
    assert structure.open == []
    own = ("data:video/mp4;base64,", "data:image/jpeg;base64,")
    assert structure.addresses and all(address.startswith(own) for address in structure.addresses)
    assert not re.search(r"https?://|url\(|@import", page)
    assert "default-src 'none'" in page
    assert structure.tags.count("script") == 1


def test_every_clip_is_in_the_page_and_decodes(report, frames):
    contents = [base64.b64decode(address.split(",", 1)[1]) for address in Structure(render_report(report)).addresses]
    videos, posters = contents[::2], contents[1::2]
    assert len(videos) == len(posters) == 2 + 2 * 2
    decoded = read_frames(videos[0])
    assert decoded.shape == frames.shape
    poster = np.asarray(Image.open(io.BytesIO(posters[0])), np.int32)
    assert (
        np.abs(poster - decoded[0]).mean() < 30 < np.abs(poster - decoded[1]).mean()
    )  # noise, of which JPEG loses some


def test_a_clip_that_does_not_decode_has_no_poster_and_breaks_no_page():
    assert "poster" not in video(b"no mp4", "a clip") and 'aria-label="a clip"' in video(b"no mp4", "a clip")


def test_text_from_outside_stays_text(report):
    text = Structure(render_report(report)).text
    for words in ("A run & its <figures>", "a red star <script>alert(1)</script>", "Seeds: 0 & 1.", "width: 32  # <b>"):
        assert words in text


def test_notes_come_before_every_figure(report):
    page = render_report(report)
    assert page.index("Seeds: 0 &amp; 1.") < page.index("97.0%") < page.index("<main>")


def test_marks_follow_the_oracle_and_held_out_clips_are_tagged(report):
    page = render_report(report)
    assert page.count("✓ colour") == 2 and page.count("✓ motion") == 1
    assert page.count("✗ motion: unclear") == 1
    assert page.count('<span class="mark tag">held out</span>') == 1


def test_figures_reach_the_page(report):
    text = Structure(render_report(report)).text
    for words in (
        "97.0%",
        "71.0%",
        "31.3",
        "n = 256",
        "n = 64",
        "13 min 20 s",
        "1,234 DiT steps",
        machine_facts()["torch"],
    ):
        assert words in text, words


def test_a_report_with_nothing_in_it_is_still_a_page():
    structure = Structure(render_report(RunReport("Empty")))
    assert structure.open == [] and "section" not in structure.tags
    assert "Nothing was measured" in structure.text


def test_writing_makes_the_folder_and_leaves_no_partial_file(tmp_path, report):
    path = tmp_path / "run" / "report.html"
    write_report(path, report)
    write_report(path, report)
    assert [file.name for file in path.parent.iterdir()] == ["report.html"]
    assert path.read_text(encoding="utf-8") == render_report(report)


def test_the_verdict_names_what_was_measured_and_only_that():
    line = verdict({"accuracy": {"color": 0.9, "motion": 0.5, "n": 20}})
    assert "20 generated clips 90.0% show the colour" in line and "50.0% the motion" in line and "17% and 10%" in line
    assert "shape" not in line and "VAE" not in line and "took" not in line


def test_the_measured_table_shows_intervals_and_gaps():
    table = measured_table(
        [("Generated", "trained", {"color": 0.5, "n": 100}), ("Held out", "new", {"motion": 1.0, "n": 4})]
    )
    assert "40.4–59.6" in table and "51.0–100.0" in table  # Wilson's for 50 of 100 and 4 of 4
    assert table.count("<td>–</td>") == 2 and "Shape" not in table
    assert measured_table([("Generated", "trained", None)]) == ""


def test_a_confusion_table_keeps_the_worlds_order_and_puts_unclear_last():
    html = confusion_table("motion", {"orbit": {"left": 2, "wobble": 1}, "left": {"left": 3, "unclear": 1}})
    assert re.findall(r'<th scope="col">(\w+)', html) == ["left", "orbit", "wobble", "unclear"]
    assert re.findall(r'<th scope="row">(\w+)', html) == ["left", "orbit"]
    assert "3 of 4 asked left read left" in html


def test_stages_share_one_scale_and_total_is_not_a_stage():
    html = stage_table({"total": 40.0, "vae": 10.0, "dit": 20.0}, total=40.0)
    assert re.findall(r"--w:([\d.]+)%", html) == ["50.0", "100.0"]
    assert "train VAE" in html and html.count("40 s") == 1
    assert stage_table({}) and "30 s" in stage_table({"vae": 10.0, "dit": 20.0})


def test_words_for_numbers():
    seconds = (0.41, 9.96, 42, 59.7, 800, 3599.6, 3725)
    assert [duration(s) for s in seconds] == [
        "0.4 s",
        "10 s",
        "42 s",
        "1 min 00 s",
        "13 min 20 s",
        "1 h 00 min",
        "1 h 02 min",
    ]
    assert [percent(x) for x in (0, 0.5, 0.9731, 0.9999, 1)] == ["0%", "50.0%", "97.3%", "99.9%", "100%"]
    assert [listed(list(words)) for words in ("a", "ab", "abc")] == ["a", "a and b", "a, b and c"]
