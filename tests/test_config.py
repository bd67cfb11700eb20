"""Configs: the three layers, the types, the round trip, and one line for each mistake."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from videodit.config import Argument, from_dict, load_yaml, parse_command, parse_config, to_dict, to_yaml
from videodit.errors import UserError


@dataclass(frozen=True)
class Data:
    shards: str = "shards"
    """Folder of shards."""
    buckets: tuple[str, ...] = ("17x64x64",)
    """Frames, height and width of each bucket."""
    size: tuple[int, int] = (64, 64)
    """Height and width in pixels."""


@dataclass(frozen=True)
class Optim:
    lr: float = 1e-3
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the first and second moment."""
    kind: Literal["adamw", "muon"] = "adamw"
    """Optimizer."""

    def __post_init__(self) -> None:
        if self.lr <= 0:
            raise ValueError(f"optim.lr {self.lr} is not positive: give one such as 1e-3")


@dataclass(frozen=True)
class Base:
    run_dir: str
    """Folder of the run."""
    seed: int = 0
    """Seed of everything random."""


@dataclass(frozen=True)
class Run(Base):
    """A run."""

    prompts: list[str] = field(default_factory=list)
    """Prompts to sample."""
    dry_run: bool = False
    """Stop before the first step."""
    stop_after: int | None = None
    """Stop after so many steps."""
    folder: Path = Path("out")
    """A path."""
    limits: dict[str, float] = field(default_factory=dict)
    """Free names."""
    data: Data = field(default_factory=Data)
    """What is read."""
    optim: Optim = field(default_factory=lambda: Optim(lr=5e-4))
    """How it is optimized."""
    second: Data | None = None
    """A second source."""

    def __post_init__(self) -> None:
        if self.stop_after == 0:
            raise ValueError("stop_after 0 does nothing: give at least 1")


def parse(*argv: str) -> Run:
    return parse_config(Run, argv, "videodit train")


def refusal(*argv: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(*argv)
    message = str(caught.value)
    assert "\n" not in message and message
    return message


def write(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_defaults_then_yaml_then_command_line(tmp_path: Path) -> None:
    file = write(
        tmp_path, "run_dir: a\nseed: 1\noptim: {lr: 1e-2, kind: muon}\ndata:\n  buckets: [17x64x64, 1x32x32]\n"
    )
    config = parse("--config", file, "--optim.lr", "2e-3", "--seed=5")
    assert (config.run_dir, config.seed) == ("a", 5)
    assert config.optim == Optim(lr=2e-3, kind="muon")
    assert config.data.buckets == ("17x64x64", "1x32x32")
    assert parse("--run_dir", "a").optim.lr == 5e-4  # the parent's default, not the group's own
    assert parse("--optim.lr", "1", "--config", file).optim.lr == 1.0  # the order on the command line does not matter


def test_a_later_file_wins(tmp_path: Path) -> None:
    first = write(tmp_path, "run_dir: a\nseed: 1\n")
    second = tmp_path / "second.yaml"
    second.write_text("seed: 2\n")
    config = parse("--config", first, "--config", str(second))
    assert (config.run_dir, config.seed) == ("a", 2)


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "+1e-3", "10e-4", ".1e-2"])
def test_scientific_notation_is_a_number(tmp_path: Path, text: str) -> None:
    assert load_yaml(Run, write(tmp_path, f"run_dir: a\noptim: {{lr: {text}}}")).optim.lr == 1e-3
    assert parse("--run_dir", "a", "--optim.lr", text).optim.lr == 1e-3
    assert load_yaml(Run, write(tmp_path, f"run_dir: a\nlimits: {{x: {text}}}")).limits == {"x": 1e-3}


def test_lists_are_written_in_brackets_or_repeated() -> None:
    base = ("--run_dir", "a")
    assert parse(*base, "--data.buckets", "[17x64x64]").data.buckets == ("17x64x64",)
    assert parse(*base, "--data.buckets", "a", "--data.buckets", "[b, c]").data.buckets == ("a", "b", "c")
    assert parse(*base, "--data.size", "[32, 48]").data.size == (32, 48)
    assert parse(*base, "--data.size", "32", "--data.size", "48").data.size == (32, 48)
    assert parse(*base, "--prompts", "[]").prompts == []


@dataclass(frozen=True)
class Mixed:
    shards: str | list[str] = ""
    weights: list[float] = field(default_factory=list)


def test_one_text_or_a_list_of_them(tmp_path: Path) -> None:
    def shards(*argv: str) -> object:
        return parse_config(Mixed, argv, "videodit train").shards

    assert shards("--shards", "a") == "a" and shards("--shards=a, b") == "a, b"
    assert shards("--shards", "[a, b]") == shards("--shards", "a", "--shards", "b") == ["a", "b"]
    config = parse_config(Mixed, ["--shards", "[s3://a/b,c]", "--weights", "[1,0.5]"], "videodit train")
    assert config == Mixed(["s3://a/b", "c"], [1.0, 0.5])
    assert load_yaml(Mixed, write(tmp_path, to_yaml(config))) == config
    assert load_yaml(Mixed, write(tmp_path, "shards: a")) == Mixed("a")


@pytest.mark.parametrize("prompt", ["a, b: c", "[sic", "1:30", "null", "true", "- x", "'quoted'", "{a: 1}", "# x", "é"])
def test_a_prompt_stays_as_it_is_typed(prompt: str) -> None:
    assert parse("--run_dir", "a", f"--prompts={prompt}", "--prompts", "second").prompts == [prompt, "second"]
    assert parse(f"--run_dir={prompt}").run_dir == prompt


def test_flags_dashes_null_and_negative_values() -> None:
    config = parse("--run-dir", "a", "--dry-run", "--stop-after", "null", "--seed", "-3")
    assert (config.dry_run, config.stop_after, config.seed) == (True, None, -3)
    assert parse("--run_dir", "a", "--dry_run", "false").dry_run is False


def test_paths_mappings_and_optional_groups(tmp_path: Path) -> None:
    config = parse("--run_dir", "a", "--folder", "b/c", "--limits.x", "1", "--limits.y", "2e-1", "--second.shards", "s")
    assert config.folder == Path("b/c")
    assert config.limits == {"x": 1.0, "y": 0.2}
    assert config.second == Data(shards="s")
    assert load_yaml(Run, write(tmp_path, "run_dir: a\nsecond: null\noptim:\n")).second is None


def test_round_trip() -> None:
    config = parse("--run_dir", "a: b", "--optim.lr", "3e-7", "--prompts", "1:30", "--second.shards", "null")
    assert from_dict(Run, to_dict(config)) == config
    assert to_dict(config)["data"]["size"] == [64, 64]
    assert to_dict(config)["folder"] == "out"


@given(
    run_dir=st.text(st.characters(codec="utf-8"), min_size=1),
    prompts=st.lists(st.text(st.characters(codec="utf-8"))),
    lr=st.floats(min_value=1e-30, max_value=1e30),
    stop_after=st.none() | st.integers(min_value=1),
)
@example(run_dir="0E0", prompts=["1e-3", "+.5e4"], lr=1.0, stop_after=None)  # numbers to our reader, text to YAML 1.1
def test_yaml_reads_back_what_it_wrote(
    tmp_path_factory: pytest.TempPathFactory, run_dir: str, prompts: list[str], lr: float, stop_after: int | None
) -> None:
    config = Run(run_dir=run_dir, prompts=prompts, stop_after=stop_after, optim=Optim(lr=lr))
    path = tmp_path_factory.mktemp("yaml") / "run.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load_yaml(Run, path) == config


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["--data.shrds", "x"], ["--data.shrds", "did you mean --data.shards?"]),
        (["--lr", "3"], ["--lr", "did you mean --optim.lr?"]),
        (["--sed", "3"], ["--sed", "did you mean --seed?"]),
        (["--confg", "x.yaml"], ["--confg", "did you mean --config?"]),
        (["--qqqqqq", "3"], ["--qqqqqq", "--help"]),
        (["--qqqqqq"], ["--qqqqqq", "--help"]),
        (["--optim", "3"], ["--optim", "group", "--optim.lr"]),
        (["--data.class_path", "os.system"], ["--data.class_path"]),
        (["--optim.lr", "abc"], ["--optim.lr", "'abc'", "a number"]),
        (["--optim.lr", "null"], ["--optim.lr", "'null'", "a number"]),
        (["--seed", "1.5"], ["--seed", "'1.5'", "a whole number"]),
        (["--seed", "true"], ["--seed", "'true'", "a whole number"]),
        (["--stop_after", "soon"], ["--stop_after", "'soon'", "a whole number or null"]),
        (["--dry_run", "maybe"], ["--dry_run", "'maybe'", "true or false"]),
        (["--optim.kind", "sgd"], ["--optim.kind", "'sgd'", "adamw, muon"]),
        (["--data.size", "[1, 2, 3]"], ["--data.size", "[1, 2, 3]", "a list of 2"]),
        (["--limits.x", "abc"], ["limits", "abc"]),
        (["--second.size", "[a, 1]"], ["--second.size", "a list of 2"]),
        (["--seed"], ["--seed", "no value"]),
        (["stray"], ["'stray'", "--key value"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such"]),
        (["--optim.lr", "-1"], ["optim.lr -1.0 is not positive: give one such as 1e-3"]),
        (["--stop_after", "0"], ["stop_after 0 does nothing: give at least 1"]),
    ],
)
def test_each_mistake_on_the_command_line_is_one_line(argv: list[str], parts: list[str]) -> None:
    message = refusal("--run_dir", "a", *argv)
    for part in parts:
        assert part in message


def test_a_required_setting_is_named() -> None:
    assert "run_dir" in refusal("--seed", "3")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("run_dir: a\noptim: {lrr: 3}", ["optim.lrr", "did you mean optim.lr?"]),
        ("run_dir: a\noptm: {lr: 3}", ["optm", "did you mean optim?"]),
        ("run_dir: a\noptim: 3", ["optim", "group", "optim.lr"]),
        ("run_dir: a\nseed: x", ["seed", "'x'", "a whole number"]),
        ("run_dir: a\nseed:", ["seed", "null", "a whole number"]),
        ("run_dir: 1", ["run_dir", "1", "quoted"]),
        ("run_dir: a\nsecond: {shards: [1]}", ["second.shards", "[1]", "text"]),
        ("run_dir: a\ndata: {class_path: os.system}", ["data.class_path"]),
        ("run_dir: a\nseed: 3\nrun_dir: b", ["line 3", "run_dir is there twice"]),
        ("optim:\n\tlr: 3", ["line 2", "indented by a tab: use spaces"]),
        ("run_dir: a\n---\nseed: 3", ["line 2", "second document", "remove the line ---"]),
        ("run_dir: \x01", ["YAML", "special characters are not allowed"]),
        ("run_dir", ["holds only 'run_dir'", "key: value"]),
        ("run_dir: [", ["line 1", "YAML"]),
        ("- run_dir", ["list", "key: value"]),
        ("run_dir: !!python/object/apply:os.system [ls]", ["line 1", "YAML", "os.system' is no plain value"]),
    ],
)
def test_each_mistake_in_a_file_is_one_line_that_names_it(tmp_path: Path, text: str, parts: list[str]) -> None:
    file = write(tmp_path, text)
    message = refusal("--config", file)
    for part in [file, *parts]:
        assert part in message


def test_unreadable_files(tmp_path: Path) -> None:
    assert "cannot read" in refusal("--config", str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00run")
    assert "UTF-8" in refusal("--config", str(tmp_path / "binary.yaml"))


def test_help_shows_doc_type_and_default_of_each_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_config(Run, ["--help"], "videodit train", "Train it.", "videodit train --run_dir a")
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "Train it.",
        "--run_dir RUN_DIR Folder of the run. (required, type: text)",
        "--seed SEED Seed of everything random. (type: a whole number, default: 0)",
        "--optim.lr LR Peak learning rate. (type: a number, default: 0.0005)",
        "--prompts [ITEM,...] Prompts to sample. (type: a list [a, b, ...], each text, default: [])",
        "--config",
        "videodit train --run_dir a",
    ):
        assert part in text


def test_arguments_beside_the_config() -> None:
    arguments = [Argument("src", "Folder.", positional=True), Argument("out", "Shards.")]

    def command(*argv: str) -> tuple[Optim, dict[str, str]]:
        return parse_command(Optim, argv, "videodit ingest", arguments=arguments)

    expected = (Optim(lr=0.5), {"src": "in", "out": "to"})
    assert command("in", "--out", "to", "--lr", "0.5") == expected
    assert command("--lr", "0.5", "--out=to", "in") == expected
    with pytest.raises(UserError, match="SRC is missing"):
        command("--out", "to")
    with pytest.raises(UserError, match="--out is missing"):
        command("in")
    with pytest.raises(UserError, match="'more'"):
        command("in", "more", "--out", "to")
