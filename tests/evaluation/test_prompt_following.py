"""Judging clips: right, wrong and unclear, and the statistics around it."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from videodit.data.shapes.oracle import oracle_report
from videodit.data.shapes.render import render
from videodit.data.shapes.world import SceneSpec, prompt_specs, sample_spec
from videodit.evaluation.prompt_following import ATTRIBUTES, chance, judge, measure, tally, wilson_interval


@pytest.fixture(scope="module")
def specs() -> list[SceneSpec]:
    return prompt_specs(10)


@pytest.fixture(scope="module")
def clips(specs) -> list[np.ndarray]:
    return [render(spec) for spec in specs]


def asking(spec: SceneSpec, **attributes: str) -> SceneSpec:
    return replace(spec, objects=(replace(spec.objects[0], **attributes),))


def test_rendered_clips_follow_their_own_prompts(clips, specs):
    measured = measure(iter(clips), specs)
    assert measured.accuracy == {"color": 1.0, "shape": 1.0, "motion": 1.0, "size": 1.0, "all": 1.0, "n": 10}
    for table in measured.confusion.values():
        assert all(list(row) == [asked] for asked, row in table.items())


@pytest.mark.parametrize(
    ("name", "word"), [("color", "pink"), ("shape", "ring"), ("motion", "spins"), ("size", "tiny")]
)
def test_a_wrong_word_costs_that_attribute_and_no_other(clips, specs, name, word):
    result = judge(clips[0], asking(specs[0], **{name: word}))
    assert [key for key in ATTRIBUTES if not result["correct"][key]] == [name]
    assert result["asked"][name] == word and result["read"][name] == getattr(specs[0].objects[0], name)
    assert result["correct"]["all"] == (name == "size")  # all: the triple that is held out


def test_unclear_is_wrong_even_when_asked_for(specs):
    blank = np.full((17, 64, 64, 3), 128, np.uint8)
    unclear = asking(specs[0], **dict.fromkeys(ATTRIBUTES, "unclear"))
    for spec in (specs[0], unclear):
        assert not any(judge(blank, spec)["correct"].values())
    measured = measure([blank], specs[:1])
    assert measured.confusion["color"] == {specs[0].objects[0].color: {"unclear": 1}}


def test_counts_agree_with_the_oracles_own_report(clips, specs):
    shifted = specs[1:] + specs[:1]  # most answers are wrong now
    measured = measure(clips, shifted)
    assert measured.accuracy == pytest.approx(oracle_report(clips, shifted))
    assert measured.accuracy["motion"] < 1
    for name in ATTRIBUTES:
        table = measured.confusion[name]
        assert sum(sum(row.values()) for row in table.values()) == len(clips)
        right = sum(row.get(asked, 0) for asked, row in table.items())
        assert right == pytest.approx(measured.accuracy[name] * len(clips))


def test_tallies_of_parts_join_to_the_tally_of_the_whole(clips, specs):
    first, second = measure(clips[:3], specs[:3]), measure(clips[3:], specs[3:])
    assert tally(first.judgements + second.judgements) == measure(clips, specs)


def test_what_cannot_be_judged_is_refused(clips, specs):
    two = sample_spec(np.random.default_rng(0), num_objects=2)
    with pytest.raises(ValueError, match="this one has 2"):
        judge(clips[0], two)
    with pytest.raises(ValueError):
        measure(clips[:2], specs[:1])
    with pytest.raises(ValueError, match="no clips"):
        measure([], [])


def test_chance_is_one_over_the_number_of_words():
    assert chance() == pytest.approx({"color": 1 / 6, "shape": 1 / 4, "motion": 1 / 10, "size": 1 / 3, "all": 1 / 240})


@given(st.integers(1, 5000), st.floats(0, 1))
def test_a_wilson_interval_holds_exactly_the_rates_within_z_standard_errors(n: int, fraction: float):
    share = round(fraction * n) / n
    low, high = wilson_interval(share, n)
    assert 0 <= low <= share + 1e-12 and share - 1e-12 <= high <= 1
    for bound in (low, high):  # the score test's equation, which defines the interval
        if 1e-9 < bound < 1 - 1e-9:
            z = abs(share - bound) / math.sqrt(bound * (1 - bound) / n)
            assert z == pytest.approx(1.959964, rel=1e-4) or abs(share - bound) < 1e-9


def test_a_wilson_interval_without_trials_is_everything_and_a_bad_share_is_refused():
    assert wilson_interval(0.0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError):
        wilson_interval(1.2, 10)
