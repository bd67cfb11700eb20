"""Frozen `transformers` encoders: tiny ones with random weights and a tokenizer made here, behind our interface."""

import json
import math
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from tests.models.tiny import tiny_dit
from videodit import cli
from videodit.errors import UserError
from videodit.models.text_folder import load_text_encoder
from videodit.models.text_to_video import TextToVideoModel
from videodit.models.text_transformers import TransformersTextEncoder
from videodit.planning.plan_config import DiTPlanConfig

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["<pad>", "</s>", "<unk>", *"a small red circle moves left".split()]
T5_SHAPE = {"vocab_size": 16, "d_model": 12, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 3}
CLIP_SHAPE = {"vocab_size": 16, "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2}
CLIP_SHAPE |= {"num_attention_heads": 3, "max_position_embeddings": 6, "eos_token_id": 1, "pad_token_id": 0}


def write_encoder(kind: str, folder: Path, max_shard_size: str = "5GB") -> Path:
    torch.manual_seed(0)
    if kind == "t5":
        model = transformers.T5EncoderModel(transformers.T5Config(**T5_SHAPE))
    elif kind == "umt5":
        model = transformers.UMT5EncoderModel(transformers.UMT5Config(**T5_SHAPE))
    else:
        model = transformers.CLIPTextModel(transformers.CLIPTextConfig(**CLIP_SHAPE))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {kind: write_encoder(kind, root / kind) for kind in ("t5", "umt5", "clip")}


@pytest.fixture(scope="module")
def encoders(folders: dict[str, Path]) -> dict[str, TransformersTextEncoder]:
    return {kind: TransformersTextEncoder(folder) for kind, folder in folders.items()}


every_kind = pytest.mark.parametrize("kind", ["t5", "umt5", "clip"])


@every_kind
def test_features_and_mask(kind: str, encoders: dict[str, TransformersTextEncoder]) -> None:
    encoder = encoders[kind]
    features = encoder.encode(["", "a red circle", "moves"])
    assert encoder.dim == 12 and features.embeddings.shape == (3, 4, 12) and features.embeddings.dtype == torch.float32
    assert features.mask.sum(dim=1).tolist() == [1, 4, 2] and features.mask.dtype == torch.bool
    assert (features.embeddings[~features.mask] == 0).all() and features.embeddings.isfinite().all()
    assert not features.embeddings.requires_grad


@every_kind
def test_the_batch_around_a_caption_changes_nothing(kind: str, encoders: dict[str, TransformersTextEncoder]) -> None:
    alone = encoders[kind].encode(["a red circle"]).embeddings[0]
    beside = encoders[kind].encode(["a red circle", "a small red circle moves"]).embeddings[0, :4]
    torch.testing.assert_close(beside, alone, rtol=1e-4, atol=1e-4)


@every_kind
def test_words_and_their_order_matter(kind: str, encoders: dict[str, TransformersTextEncoder]) -> None:
    one, other, same = encoders[kind].encode(["red circle", "circle red", "red circle"]).embeddings
    assert (one.mean(0) - other.mean(0)).abs().max() > 1e-4
    torch.testing.assert_close(one, same)  # not bit for bit: a matrix product may treat its last rows apart


def test_long_captions_are_cut(folders: dict[str, Path]) -> None:
    encoder = TransformersTextEncoder(folders["t5"], max_length=3)
    assert encoder.encode(["a small red circle moves left"]).mask.tolist() == [[True] * 3]


def test_no_caption_is_longer_than_the_encoders_positions(encoders: dict[str, TransformersTextEncoder]) -> None:
    assert (encoders["clip"].max_length, encoders["t5"].max_length) == (6, 128)
    assert encoders["clip"].encode(["red " * 50]).embeddings.shape == (1, 6, 12)


def test_a_model_folder_keeps_a_reference(folders: dict[str, Path], tmp_path: Path) -> None:
    encoder = TransformersTextEncoder(folders["umt5"], max_length=5)
    encoder.save_pretrained(tmp_path / "text_encoder")
    assert [path.name for path in (tmp_path / "text_encoder").iterdir()] == ["reference.json"]
    loaded = load_text_encoder(tmp_path / "text_encoder")
    assert isinstance(loaded, TransformersTextEncoder) and loaded.max_length == 5
    captions = ["a red circle", ""]
    assert torch.equal(loaded.encode(captions).embeddings, encoder.encode(captions).embeddings)


def test_weights_are_read_in_the_dtype_asked_for(folders: dict[str, Path]) -> None:
    encoder = TransformersTextEncoder(folders["t5"], dtype=torch.bfloat16)
    exact = TransformersTextEncoder(folders["t5"]).encode(["red circle"]).embeddings
    rough = encoder.encode(["red circle"]).embeddings
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.float(), exact, rtol=0.1, atol=0.1)


def test_the_dit_takes_the_features(encoders: dict[str, TransformersTextEncoder]) -> None:
    model = TextToVideoModel(tiny_dit(), None)
    latents, sigma = torch.randn(1, 4, 2, 4, 4), torch.rand(1)
    out = [model(latents, sigma, encoders["t5"].encode([caption])) for caption in ("red circle", "left")]
    assert (out[0] - out[1]).abs().max() > 1e-4


@every_kind
def test_a_plan_counts_a_caption_as_it_is_read(
    kind: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        assert TransformersTextEncoder(folders[kind], 6).encode(["a small red circle moves left"]).mask.sum() == 6
    config = DiTPlanConfig(text_encoder=str(folders[kind]), text_tokens=6)
    assert config.workload().caption_flops() == counter.get_total_flops() > 0
    if kind == "clip":  # which has no more positions
        longer = DiTPlanConfig(text_encoder=str(folders[kind]), text_tokens=50)
        assert longer.workload().caption_flops() == counter.get_total_flops()
    assert DiTPlanConfig(text_encoder=str(tmp_path / "on_the_cluster")).workload().caption_flops() == 0
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  hidden_size: 32\n  depth: 1\n  num_heads: 2\n  pattern: s\n  text_dim: 12\n")
    options = ["--text_encoder", str(folders[kind]), "--text_tokens", "6", "--buckets", "1x64x64", "--gpu", "h100"]
    assert cli.main(["plan", "--config", str(path), *options]) == 0
    assert f"takes {counter.get_total_flops():.3e} FLOPs a caption, once" in " ".join(capsys.readouterr().out.split())


def rewrite(**changes: object) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def cut_weights(size: int) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:size])

    return apply


FAULTS = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "is not a folder with config.json"),
    "half a config": (lambda folder: (folder / "config.json").write_text("{"), "config.json is damaged"),
    "another model": (rewrite(model_type="bert"), "is a bert: give one of clip, clip_text_model, t5, umt5"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded: .*model.safetensors"),
    "weights cut": (cut_weights(-10), "cannot be loaded"),
    "weights cut in the header": (cut_weights(10), "cannot be loaded"),
    "weights missing": (rewrite(num_layers=3), "lacks 8 weights, encoder.block.2"),
    "weights of another size": (rewrite(d_model=24), "cannot be loaded"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "has no tokenizer"),
    "half a tokenizer": (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be loaded"),
}


@pytest.mark.parametrize("read_weights", [True, False])
@pytest.mark.parametrize("fault", FAULTS)
def test_damage_is_one_line_for_the_user(
    fault: str, read_weights: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    damage, message = FAULTS[fault]
    shutil.copytree(folders["t5"], tmp_path / "t5")
    damage(tmp_path / "t5")
    with pytest.raises(UserError, match=message) as caught:
        TransformersTextEncoder(tmp_path / "t5", read_weights=read_weights)
    assert "\n" not in str(caught.value)


@every_kind
@pytest.mark.parametrize("sharded", [False, True])
def test_an_encoder_is_checked_without_its_weights(
    kind: str, sharded: bool, folders: dict[str, Path], tmp_path: Path
) -> None:
    whole, folder = TransformersTextEncoder(folders[kind], 9), folders[kind]
    if sharded:
        folder = write_encoder(kind, tmp_path / "sharded", max_shard_size="1KB")
        assert len(list(folder.glob("*.safetensors"))) > 2
    checked = TransformersTextEncoder(folder, 9, read_weights=False)
    assert (checked.dim, checked.max_length) == (whole.dim, whole.max_length)
    checked.save_pretrained(tmp_path / "reference")
    assert json.loads((tmp_path / "reference" / "reference.json").read_text())["source"] == str(folder)
    with pytest.raises(ValueError, match="without its weights"):
        checked.encode(["a red circle"])
    if sharded:
        next(folder.glob("*-00002-*.safetensors")).unlink()
        with pytest.raises(UserError, match="cannot be loaded: .*00002"):
            TransformersTextEncoder(folder, 9, read_weights=False)


def test_a_check_takes_no_memory_for_the_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    """The file is sparse: 768 MB of zeros that lie nowhere."""
    folder = shutil.copytree(folders["t5"], tmp_path / "t5")
    rewrite(vocab_size=1 << 25)(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
    shapes["shared.weight"][0] = 1 << 25
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    head = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(file.tell() + end)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert TransformersTextEncoder(folder, read_weights=False).dim == 12
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 200e6


def test_pickled_weights_are_not_read(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["t5"], tmp_path / "t5")
    weights = tmp_path / "t5" / "model.safetensors"
    torch.save({}, weights.with_name("pytorch_model.bin"))
    weights.unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        TransformersTextEncoder(tmp_path / "t5")
