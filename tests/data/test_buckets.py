import pytest
from hypothesis import given
from hypothesis import strategies as st

from videodit.data.buckets import Bucket, assign, group, nearest_frames, nearest_size, parse_bucket

WIDE, TALL, SQUARE, IMAGE = Bucket(17, 48, 80), Bucket(17, 80, 48), Bucket(33, 64, 64), Bucket(1, 64, 64)


@given(st.integers(0, 30), st.integers(1, 40), st.integers(1, 40))
def test_names_round_trip(k, rows, columns):
    bucket = Bucket(4 * k + 1, 16 * rows, 16 * columns)
    assert parse_bucket(bucket.name) == bucket


@given(st.integers(1, 400))
def test_nearest_frames_is_the_nearest(frames):
    assert nearest_frames(frames) == min(range(1, 500, 4), key=lambda fit: (abs(fit - frames), fit))


@given(st.integers(1, 400), st.sampled_from([8, 16, 32]))
def test_nearest_size_is_the_nearest(size, multiple):
    assert nearest_size(size, multiple) == min(range(multiple, 500, multiple), key=lambda fit: (abs(fit - size), fit))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("16x64x64", "16 frames, which is not 4k.1: the nearest that fits is 17x64x64"),
        ("18x70x64", "nearest that fits is 17x64x64"),
        ("17x72x64", "16 does not divide: the nearest that fits is 17x64x64"),
        ("0x64x64", "nearest that fits is 1x64x64"),
        ("17x0x64", "nearest that fits is 17x16x64"),
        ("17x64", "FRAMESxHEIGHTxWIDTH"),
        ("17x-64x64", "FRAMESxHEIGHTxWIDTH"),
        ("", "FRAMESxHEIGHTxWIDTH"),
    ],
)
def test_impossible_buckets_name_the_nearest(text, message):
    with pytest.raises(ValueError, match=message):
        parse_bucket(text)


def test_multiple_is_the_callers():
    assert parse_bucket("17x72x64", multiple=8) == (17, 72, 64)


@pytest.mark.parametrize(
    ("clip", "bucket"),
    [
        ((100, 480, 854), WIDE),
        ((100, 854, 480), TALL),
        ((100, 100, 110), SQUARE),
        ((32, 100, 100), IMAGE),  # square, but too short for the square video bucket
        ((1, 480, 854), IMAGE),  # a picture goes where a picture can
        ((0, 64, 64), None),
    ],
)
def test_assign(clip, bucket):
    assert assign(*clip, [IMAGE, WIDE, TALL, SQUARE]) == bucket


def test_equal_aspect_prefers_length_then_no_enlargement_then_size():
    buckets = [Bucket(17, 64, 64), Bucket(17, 128, 128), Bucket(17, 256, 256), Bucket(5, 512, 512)]
    assert assign(20, 130, 130, buckets) == (17, 128, 128)
    assert assign(20, 600, 600, buckets) == (17, 256, 256)
    assert assign(8, 64, 64, buckets) == (5, 512, 512)


def test_group_counts_what_fits_nowhere():
    grouping = group([(20, 64, 64), (3, 64, 64), (17, 64, 64)], [Bucket(17, 64, 64), Bucket(33, 64, 64)])
    assert grouping.members == {(17, 64, 64): [0, 2], (33, 64, 64): []}
    assert grouping.dropped == [1]
