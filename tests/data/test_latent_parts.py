"""Parts of a latent set: fixed ranges of clips, known by what they are, dealt to any number of ranks."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from videodit.data.latent_parts import Part, clips_fingerprint, deal_parts, make_parts
from videodit.data.shard_writer import ShardWriter
from videodit.data.shards import Entry, ShardSet
from videodit.errors import UserError


def some_shards(*names: str) -> ShardSet:
    return ShardSet("nowhere", [Entry(f"c{number}", name, {}, {}) for number, name in enumerate(names)])


def test_each_shard_of_clips_gives_its_own_parts() -> None:
    shards = some_shards("a.tar", "a.tar", "a.tar", "b.tar", "b.tar", "c.d.tar")
    assert make_parts(shards, range(6), 3) == [Part("a.tar", (0, 1, 2)), Part("b.tar", (3, 4)), Part("c.d.tar", (5,))]
    assert make_parts(shards, [0, 1, 2, 5], 2) == [
        Part("a-000.tar", (0, 1)), Part("a-001.tar", (2,)), Part("c.d.tar", (5,))
    ]  # fmt: skip


def test_two_parts_of_one_name_are_refused() -> None:
    with pytest.raises(UserError, match=r"2 shards of latents would be called a-000.tar: rename"):
        make_parts(some_shards("a.tar", "a.tar", "a-000.tar"), range(3), 1)


@given(st.lists(st.integers(1, 40), max_size=30), st.integers(1, 12))
def test_ranks_get_neighbours_and_about_as_many_clips(sizes: list[int], ranks: int) -> None:
    parts = [Part(f"{number}.tar", tuple(range(size))) for number, size in enumerate(sizes)]
    shares = deal_parts(parts, ranks)
    assert [part for share in shares for part in share] == parts and len(shares) == ranks
    clips = [sum(len(part.clips) for part in share) for share in shares]
    assert all(abs(count - sum(sizes) / ranks) <= max(sizes) for count in clips if sizes)


def write_clips(folder: Path, keys: str = "ab", sha256: str = "", pixels: bytes = b"123", per_shard: int = 9) -> str:
    facts = {"sha256": sha256} if sha256 else {}
    with ShardWriter(folder, per_shard, prefix=folder.name) as writer:
        for key in keys:
            writer.write(key, {"mp4": pixels, "json": json.dumps({"caption": key, **facts}).encode()})
    shards = ShardSet.open(folder)
    return clips_fingerprint(shards, range(len(shards)))


def test_clips_are_known_by_what_they_are_not_where_they_lie(tmp_path: Path) -> None:
    one = write_clips(tmp_path / "one", sha256="s")
    assert one == write_clips(tmp_path / "two", sha256="s", per_shard=1)
    assert one == write_clips(tmp_path / "three", sha256="s", pixels=b"4")  # they are read only if no hash is known
    others = [write_clips(tmp_path / "four", sha256="t"), write_clips(tmp_path / "five", "abc", sha256="s")]
    others += [write_clips(tmp_path / "six"), write_clips(tmp_path / "seven", pixels=b"124")]
    assert len({one, *others}) == 5
