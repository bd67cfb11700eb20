"""The byte-level text encoder: any text in, and nothing but the caption itself decides its features."""

import zlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.tiny import tiny_dit, tiny_text
from videodit.errors import UserError
from videodit.models.text import (
    MAX_WORD_BYTES,
    ByteTextConfig,
    ByteTextEncoder,
    TextFeatures,
    split_words,
    tokenize,
    word_grams,
)
from videodit.models.text_folder import load_text_encoder
from videodit.models.text_to_video import TextToVideoModel

ENCODER = tiny_text()
captions = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4)


def features(caption: str) -> torch.Tensor:
    """(l, d) of one caption alone."""
    return ENCODER.encode([caption]).embeddings[0].detach()


@given(captions)
def test_a_caption_is_cut_into_its_words_and_every_different_word_is_one_row(texts: list[str]) -> None:
    tokens = tokenize(texts, max_words=1000, buckets=2**20)
    words = {b""} | {word for text in texts for word in split_words(text)}
    assert len(tokens.grams) == len(words)
    for text, index, mask in zip(texts, tokens.index, tokens.mask):
        pieces = split_words(text)
        assert b"".join(pieces) == b"".join(text.encode().split())
        assert all(0 < len(word) <= MAX_WORD_BYTES for word in pieces)
        rows = [tokens.grams[row] for row in index[mask]]
        assert [int((row > 0).sum()) for row in rows] == [len(word_grams(word)) for word in (b"", *pieces)]


def test_a_word_is_itself_and_its_parts() -> None:
    assert word_grams(b"red") == [b"<red>", b"<re", b"red", b"ed>", b"<red", b"red>"]
    assert word_grams(b"") == [b"<>"] and word_grams(b"a") == [b"<a>"]


def test_the_table_has_a_row_for_padding_and_the_hash_does_not_change() -> None:
    tokens = tokenize(["red"], 8, buckets=5)
    assert tokens.grams.shape == (2, 6) and tokens.grams[0, 1:].tolist() == [0] * 5
    assert tokens.grams[1].tolist() == [1 + zlib.crc32(gram) % 4 for gram in word_grams(b"red")]


def test_the_empty_caption_is_one_token() -> None:
    tokens = tokenize([""], 8, 64)
    assert tokens.grams.shape == (1, 1) and tokens.index.tolist() == [[0]] and tokens.mask.tolist() == [[True]]
    assert features("").shape == (1, 12) and features("").isfinite().all()
    assert torch.equal(features(" \t\n"), features(""))


@settings(max_examples=50, deadline=None)
@given(captions)
def test_the_batch_around_a_caption_changes_nothing(texts: list[str]) -> None:
    together = ENCODER.encode(texts)
    assert together.mask.any(dim=1).all() and together.embeddings.isfinite().all()
    for row, text in enumerate(texts):
        mine = together.embeddings[row][together.mask[row]]
        torch.testing.assert_close(mine.detach(), features(text), rtol=1e-4, atol=1e-4)


def test_a_longer_word_in_the_batch_changes_no_other_word() -> None:
    beside = ENCODER.encode(["cat sat", "elephantine hippopotamuses trample"]).embeddings[0, :3]
    torch.testing.assert_close(beside, ENCODER.encode(["cat sat"]).embeddings[0])


def test_unseen_words_differ_from_each_other_and_are_read_alike_when_alike() -> None:
    names = ["red", "rde", "bed", "blue", "zyx", "q", "qq"]
    rows = torch.stack([features(name)[1] for name in names])
    distances = torch.cdist(rows, rows) + 10 * torch.eye(len(names))
    assert distances.min() > 1e-3


def test_order_matters() -> None:
    forwards, backwards = features("red circle above blue square"), features("blue square above red circle")
    assert (forwards.mean(0) - backwards.mean(0)).abs().max() > 1e-3


def test_letter_case_and_every_letter_of_a_long_word_matter() -> None:
    long = "a" * MAX_WORD_BYTES
    for last in range(MAX_WORD_BYTES):
        changed = long[:last] + "b" + long[last + 1 :]
        assert (features(changed) - features(long)).abs().max() > 1e-4
    assert (features("Red") - features("red")).abs().max() > 1e-4


@pytest.mark.parametrize(
    "text", ["маленький красный круг", "小さな赤い円が左に動く", "🔴⬅️", "é", "دائرة حمراء", "\x00\x7f"]
)
def test_any_script_is_read(text: str) -> None:
    assert features(text).isfinite().all()
    assert (features(text).mean(0) - features("").mean(0)).abs().max() > 1e-3
    assert (features(text)[1] - features(text + "!")[1]).abs().max() > 1e-4 or len(features(text)) > 2


def test_long_words_are_cut_into_pieces() -> None:
    assert split_words("x" * 40) == (b"x" * 16, b"x" * 16, b"x" * 8)
    assert split_words(" two  words\n") == (b"two", b"words")
    assert split_words("円" * 6) == ("円".encode() * 5 + "円".encode()[:1], "円".encode()[1:])


def test_what_is_beyond_max_words_is_cut() -> None:
    caption = " ".join(f"word{i}" for i in range(20))
    assert features(caption).shape == (8, 12)
    torch.testing.assert_close(features(caption), features(" ".join(caption.split()[:7])))
    assert (features(caption) - features("other " + caption)).abs().max() > 1e-3


def test_a_repeated_word_is_read_once_and_told_apart_by_its_place() -> None:
    tokens = tokenize(["red red blue", "blue red"], 8, 64)
    assert len(tokens.grams) == 3 and tokens.index.tolist() == [[0, 1, 1, 2], [0, 2, 1, 0]]
    assert (features("red red")[1] - features("red red")[2]).abs().max() > 1e-3


def test_every_parameter_learns() -> None:
    encoder = ByteTextEncoder(ByteTextConfig(dim=12, buckets=64, depth=2, num_heads=2, max_words=8))
    out = encoder.encode(["a small red circle", "moves"])
    (out.embeddings * out.mask[..., None] * torch.randn(12)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"dim": 10}, "text.dim 10 is not a multiple of text.num_heads 4"),
        ({"buckets": 1}, "text.buckets 1 is below 2"),
        ({"depth": -1}, "text.depth -1 is negative"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(bad: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ByteTextConfig(**bad)


def test_a_model_folder_gives_the_byte_encoder_back(tmp_path: Path) -> None:
    ENCODER.save_pretrained(tmp_path)
    loaded = load_text_encoder(tmp_path)
    assert isinstance(loaded, ByteTextEncoder) and loaded.dim == 12
    assert torch.equal(loaded.encode(["red circle"]).embeddings, ENCODER.encode(["red circle"]).embeddings)
    assert load_text_encoder(tmp_path, dtype=torch.bfloat16).encode(["red"]).embeddings.dtype == torch.bfloat16
    with pytest.raises(UserError, match="is not a model folder"):
        load_text_encoder(tmp_path / "nowhere")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"source": "x", "max_length": "many"}', '{"max_length": 8}'])
def test_a_damaged_reference_is_the_users(text: str, tmp_path: Path) -> None:
    (tmp_path / "reference.json").write_text(text)
    with pytest.raises(UserError, match="reference.json is damaged"):
        load_text_encoder(tmp_path)


def test_captions_features_and_context_are_three_ways_to_say_the_same() -> None:
    model = TextToVideoModel(tiny_dit(), ENCODER)
    latents, sigma, prompts = torch.randn(2, 4, 2, 4, 4), torch.rand(2), ["a red circle", ""]
    from_captions = model(latents, sigma, prompts)
    encoded = ENCODER.encode(prompts)
    assert torch.equal(model(latents, sigma, encoded), from_captions)
    assert torch.equal(model(latents, sigma, model.text_context(prompts)), from_captions)
    assert torch.equal(model.dit(latents, sigma, encoded.embeddings, encoded.mask), from_captions)


def test_captions_need_an_encoder() -> None:
    model = TextToVideoModel(tiny_dit(), None)
    with pytest.raises(ValueError, match="captions given to a model without a text encoder"):
        model(torch.randn(1, 4, 2, 4, 4), torch.rand(1), ["a red circle"])
    text = TextFeatures(torch.randn(1, 3, 12), torch.ones(1, 3, dtype=torch.bool))
    assert model(torch.randn(1, 4, 2, 4, 4), torch.rand(1), text).shape == (1, 4, 2, 4, 4)


def test_the_joint_model_names_what_muon_leaves_alone() -> None:
    model = TextToVideoModel(tiny_dit(), ENCODER)
    names = [name for name, _ in model.named_parameters()]
    for prefix in model.muon_exclude:
        assert any(name.startswith(prefix) for name in names), prefix
