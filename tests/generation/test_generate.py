"""`videodit generate`: files that play, a record that reproduces them, and one line for every mistake."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from tests.generation.test_pipeline import PIPE
from videodit import cli
from videodit.data.video_io import probe, read_frames
from videodit.errors import UserError
from videodit.generation.generate import GenerateConfig, generate
from videodit.generation.pipeline import TextToVideo

PROMPTS = ["a small red circle moves left", "Blau, größer!", "маленький круг", "a small red circle moves left"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    PIPE.save_pretrained(folder)
    return str(folder)


def config(model: str, out: Path, **changes) -> GenerateConfig:
    return GenerateConfig(**{"model": model, "prompt": PROMPTS, "out": str(out), "device": "cpu", **changes})


def test_a_clip_and_its_record_for_every_prompt(model: str, tmp_path: Path) -> None:
    seen = []
    paths = generate(config(model, tmp_path / "new" / "out", seed=4, fps=12.0), lambda *progress: seen.append(progress))
    assert [path.name for path in paths] == [
        "00000-a-small-red-circle-moves-left.mp4",
        "00001-blau-gr-er.mp4",
        "00002-clip.mp4",
        "00003-a-small-red-circle-moves-left.mp4",
    ]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(
        [path.name for path in paths] + [path.with_suffix(".json").name for path in paths]
    )
    assert seen[-1] == (4, 4)
    for index, path in enumerate(paths):
        info = probe(path)
        assert (info.num_frames, info.height, info.width, info.fps) == (5, 32, 16, 12.0)
        record = json.loads(path.with_suffix(".json").read_text())
        assert (record["prompt"], record["seed"], record["fps"]) == (PROMPTS[index], 4 + index, 12.0)


def test_every_flag_is_in_the_clip_or_its_record(model: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """As typed, with dashes; what is the model's own is each time another value."""
    (tmp_path / "prompts.txt").write_text("a star\n")
    flags = (
        "--num-frames 9 --height 16 --width 48 --num-steps 4 --guidance-scale 1.5 --sampler heun --fps 12.5 --seed 7"
    )
    files = ["--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out")]
    command = ["generate", "--model", model, "--prompt", "first", "--prompt", "second", *files, *flags.split()]
    assert cli.main([*command, "--device", "cpu", "--batch-size", "2"]) == 0
    names = [f"{index:05d}-{slug}" for index, slug in enumerate(("first", "second", "a-star"))]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / f"{name}.mp4") for name in names]
    for index, (name, prompt) in enumerate(zip(names, ("first", "second", "a star"))):
        clip = probe(tmp_path / "out" / f"{name}.mp4")
        assert (clip.num_frames, clip.height, clip.width, clip.fps) == (9, 16, 48, 12.5)
        record = json.loads((tmp_path / "out" / f"{name}.json").read_text())
        assert (record["prompt"], record["seed"], record["model"]) == (prompt, 7 + index, model)
        assert (record["num_frames"], record["height"], record["width"], record["fps"]) == (9, 16, 48, 12.5)
        assert (record["num_steps"], record["guidance_scale"], record["sampler"]) == (4, 1.5, "heun")
    defaults = TextToVideo.from_pretrained(model).defaults
    for name in ("num_frames", "height", "width", "fps", "num_steps", "guidance_scale", "sampler"):
        assert getattr(defaults, name) != record[name]


@pytest.mark.parametrize("flag", ["num_steps", "guidance_scale", "sampler", "seed"])
def test_what_the_file_does_not_tell_changes_its_pixels(model: str, tmp_path: Path, flag: str) -> None:
    given = {"num_steps": 2, "guidance_scale": 1.5, "sampler": "euler", "seed": 0}
    other = {"num_steps": 3, "guidance_scale": 4.0, "sampler": "heun", "seed": 1}
    one, two = (
        generate(config(model, tmp_path / str(i), prompt=["a star"], **(given | {flag: values[flag]})))[0]
        for i, values in enumerate((given, other))
    )
    assert not np.array_equal(read_frames(one), read_frames(two))


def test_the_record_reproduces_the_clip(model: str, tmp_path: Path) -> None:
    options = {"num_steps": 2, "guidance_scale": 1.5, "sampler": "heun", "num_frames": 9, "height": 16, "width": 32}
    path = generate(config(model, tmp_path / "a", seed=11, **options))[1]
    record = json.loads(path.with_suffix(".json").read_text())
    assert options.items() <= record.items()
    again = {name: record[name] for name in (*options, "seed", "fps", "dtype", "model")}
    (copy,) = generate(config(out=tmp_path / "b", prompt=[record["prompt"]], device=record["device"], **again))
    difference = read_frames(copy).astype(int) - read_frames(path)
    assert np.abs(difference).mean() < 1.0
    clip = TextToVideo.from_pretrained(model)([record["prompt"]], seed=record["seed"], **options)[0]
    assert clip.shape == (9, 16, 32, 3)


def test_the_batch_size_changes_nothing(model: str, tmp_path: Path) -> None:
    together, apart = (generate(config(model, tmp_path / str(b), batch_size=b)) for b in (4, 1))
    for one, other in zip(together, apart):
        assert one.name == other.name
        assert np.abs(read_frames(one).astype(int) - read_frames(other)).mean() < 1.0


def test_the_same_prompt_with_another_seed_is_another_clip(model: str, tmp_path: Path) -> None:
    paths = generate(config(model, tmp_path))
    assert not np.array_equal(read_frames(paths[0]), read_frames(paths[3]))


def test_another_clip_of_the_same_name_stays(model: str, tmp_path: Path) -> None:
    (first,) = generate(config(model, tmp_path, prompt=["a star"], seed=1))
    before = first.read_bytes()
    (again,) = generate(config(model, tmp_path, prompt=["a star"], seed=1))
    (second,) = generate(config(model, tmp_path, prompt=["a star"], seed=2))
    (third,) = generate(config(model, tmp_path, prompt=["A star!"], seed=2))
    assert [path.name for path in (again, second, third)] == [f"00000-a-star{end}.mp4" for end in ("", "-2", "-3")]
    assert first.read_bytes() == before != second.read_bytes()
    records = [json.loads(path.with_suffix(".json").read_text()) for path in (first, second, third)]
    assert [(record["prompt"], record["seed"]) for record in records] == [("a star", 1), ("a star", 2), ("A star!", 2)]


def test_clips_that_are_kept_do_not_hang_on_where_the_model_lies(model: str, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "elsewhere")
    (made,) = generate(config(model, tmp_path / "out", prompt=["a star"]))
    made.write_bytes(b"kept")

    def is_kept() -> bool:
        elsewhere = str(tmp_path / "elsewhere")
        (path,) = generate(config(elsewhere, tmp_path / "out", prompt=["a star"], keep_existing=True))
        assert path == made
        return path.read_bytes() == b"kept"

    assert is_kept()
    dit = tmp_path / "elsewhere/dit/config.json"
    dit.write_text(json.dumps(json.loads(dit.read_text()) | {"rope_theta": 500.0}))  # the same weights
    assert not is_kept()


def test_prompts_from_a_file(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeff  a star \r\n\nein Kreis größer\n", encoding="utf-8")
    paths = generate(config(model, tmp_path, prompt=["first"], prompts=str(tmp_path / "prompts.txt")))
    prompts = [json.loads(path.with_suffix(".json").read_text())["prompt"] for path in paths]
    assert prompts == ["first", "a star", "ein Kreis größer"]


def test_half_precision(model: str, tmp_path: Path) -> None:
    (path,) = generate(config(model, tmp_path, prompt=["a star"], dtype="bf16"))
    assert json.loads(path.with_suffix(".json").read_text())["dtype"] == "bf16"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": []}, "no prompt: give --prompt TEXT"),
        ({"prompt": ["a star", " "]}, "a prompt is empty"),
        ({"prompts": "nowhere.txt"}, "cannot read --prompts nowhere.txt"),
        ({"model": "nowhere"}, "no such model folder: nowhere"),
        ({"num_frames": 6}, "num_frames 6 is not 4k.1: the nearest is 5"),
        ({"height": 20}, "height 20 is not a multiple of"),
        ({"num_steps": 0}, "num_steps 0 is below 1"),
        ({"sampler": "rk4"}, "'rk4' is not one of"),
        ({"crop_top": 8}, "crop_top is given to a model without micro_conditioning: leave it out"),
        ({"device": "tpu"}, "device 'tpu'"),
        ({"dtype": "fp8"}, "dtype 'fp8'"),
    ],
)
def test_mistakes_are_one_line_for_the_user(model: str, tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        generate(config(**{"model": model, "out": tmp_path / "out", **changes}))
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_file_given_as_a_prompt(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\n")
    with pytest.raises(UserError, match=f"--prompt {file} is a file: give --prompts {file}"):
        generate(GenerateConfig("no model", prompt=["a" * 300, str(file)]))


def test_a_file_of_prompts_that_is_no_text(model: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(UserError, match="prompts.txt is no UTF-8 text: save it as UTF-8"):
        generate(config(model, tmp_path, prompts=str(tmp_path / "prompts.txt")))


def test_an_out_that_is_a_file(model: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="file"):
            generate(config(model, out))


def test_truncated_weights(model: str, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "model")
    weights = tmp_path / "model" / "dit" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-50])
    with pytest.raises(UserError, match="dit/model.safetensors is truncated or damaged"):
        generate(config(str(tmp_path / "model"), tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": ""}, "--model is missing"), ({"batch_size": 0}, "--batch_size 0"), ({"fps": 0.0}, "--fps 0.0")],
)
def test_a_config_that_cannot_be(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GenerateConfig(**{"model": "m", **changes})
