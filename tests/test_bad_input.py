"""A user's mistakes, through the command line: exit code 2 and one line that names the value and the fix."""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests import tiny
from tests.many_commands import FULL_AND_READ_ONLY, NO_MOUNTS, Results, can_mount, run_all
from videodit.data.mp4 import write_mp4
from videodit.data.shapes.render import render
from videodit.data.shapes.world import sample_spec
from videodit.parallel.mesh import World
from videodit.training.run_folder import RunFolder

# name -> arguments with {places} of the `places` fixture, and what the line must contain
CASES: dict[str, tuple[str, list[str]]] = {
    # ---- ingest
    "ingest: no such folder": ("ingest {gone} --out {new}", ["{gone}", "no such file or folder", "give a folder"]),
    "ingest: no videos": ("ingest {empty} --out {new}", ["{empty} has no videos", ".mp4", "pictures need --images"]),
    "ingest: another kind of file": ("ingest {text} --out {new}", ["{text}", ".csv"]),
    "ingest: nothing decodes": (
        "ingest {damaged_videos} --out {new}",
        ["none of the 1 video of", "a.mp4 for one: cannot be opened", "rejects.jsonl"],
    ),
    "ingest: onto itself": ("ingest {videos} --out {videos}", ["--out {videos}", "another folder"]),
    "ingest: out below a file": ("ingest {videos} --out {text}/shards", ["{text}/shards", "choose another"]),
    "ingest: out cannot be made": ("ingest {videos} --out /proc/videodit", ["/proc/videodit", "choose another"]),
    "ingest: typo": ("ingest {videos} --out {new} --min_frame 9", ["--min_frame", "did you mean --min_frames?"]),
    "ingest: range": ("ingest {videos} --out {new} --crf 99", ["crf is 99", "0 (best) to 51"]),
    # ---- train vae
    "vae: no run_dir": ("train vae --data.shards {shards}", ["run_dir is not set", "--run_dir"]),
    "vae: no shards": ("train vae --run_dir {new}", ["data.shards is not set", "--data.shards"]),
    "vae: no such shards": ("{vae} --data.shards {gone}", ["{gone}", "no such folder", "videodit ingest"]),
    "vae: empty shards": ("{vae} --data.shards {empty}", ["{empty} has no samples"]),
    "vae: a tar": (
        "{vae} --data.shards {shards}/shard-000000.tar",
        ["is a file: give the folder of the shards, {shards}"],
    ),
    "vae: latents for clips": ("{vae} --data.shards {latents}", ["{latents} holds latents, no clips"]),
    "vae: run_dir of shards": (
        "{vae} --run_dir {shards}",
        ["run_dir {shards} holds shards, no run", "another run_dir"],
    ),
    "vae: no held-out clips": ("{vae} --eval_clips 0", ["eval_clips 0 is below 1"]),
    "vae: seed": ("{vae} --seed 99999999999999999999", ["seed 99999999999999999999 has more than 64 bits"]),
    "vae: negative loss": ("{vae} --loss.l1 -1", ["loss.l1 -1.0 is no weight", "0 or more"]),
    "vae: no loss": ("{vae} --loss.l1 0", ["loss.l1 and loss.mse are both 0"]),
    "vae: no such eval shards": ("{vae} --eval_shards {gone}", ["{gone}", "no such folder"]),
    "vae: no such config": ("{vae} --config {gone}.yaml", ["no such config file: {gone}.yaml"]),
    "vae: typo": ("{vae} --optim.lrr 0.1", ["--optim.lrr", "did you mean --optim.lr?"]),
    "vae: a DiT's setting": ("{vae} --model.hidden_size 64", ["unknown setting --model.hidden_size: --help lists"]),
    "vae: typo in the file": ("{vae} --config {typo}", ["{typo}", "max_step", "did you mean max_steps?"]),
    "vae: type in the file": ("{vae} --config {wrong_type}", ["{wrong_type}", "seed 'many'", "a whole number"]),
    "vae: no YAML": ("{vae} --config {no_yaml}", ["{no_yaml} line 1", "not valid YAML"]),
    "vae: range": ("{vae} --max_steps 0", ["max_steps 0", "use a positive number"]),
    "vae: frames": ("{vae} --data.buckets 16x32x32", ["16x32x32", "not 4k+1", "nearest that fits is 17x32x32"]),
    "vae: size": ("{vae} --data.buckets 9x30x44", ["9x30x44", "8", "nearest that fits is 9x32x40"]),
    "vae: empty size": (
        "{vae} --data.buckets 9x0x32",
        ["9x0x32", "no height or no width", "nearest that fits is 9x1x32"],
    ),
    "vae: typo in a stage": (
        '{vae} --stages [{{"steps":1,"bucket":["9x32x32"]}}]',
        ["stage 1: bucket is not a setting of stages: these are steps, "],
    ),
    "vae: no bucket": ("{vae} --data.buckets 9by32", ["9by32", "FRAMESxHEIGHTxWIDTH"]),
    "vae: clips too short": ("{vae} --data.buckets 17x32x32", ["9 frames", "17x32x32", "shorter bucket"]),
    "vae: few clips": ("{vae} --global_batch_size 9", ["{shards} has 8 clips", "global_batch_size 9", "to 8 or less"]),
    "vae: device": ("{vae} --device tpu", ["'tpu'", "auto, cpu, cuda"]),
    "vae: dtype": ("{vae} --dtype fp8", ["fp8", "fp32 or bf16"]),
    "vae: stage": ("{vae} --zero_stage 4", ["zero_stage", "4", "0, 1, 2 or 3"]),
    "vae: model": ("{vae} --model.downsample [st]", ["model.downsample has 1 entries", "3 levels", "give 2"]),
    "vae: channels": (
        "{fresh_vae} --model.channels [8,12,16]",
        ["[8, 12, 16]", "8 channels", "64", "12 does not", "is 16"],
    ),
    "vae: no channels": ("{fresh_vae} --model.channels [0,8,8]", ["model.channels [0, 8, 8]", "[96, 192, 384]"]),
    "vae: no latents": ("{vae} --model.latent_channels 0", ["model.latent_channels 0", "use 1 or more"]),
    "vae: run_dir is a file": ("{vae} --run_dir {text}", ["{text}", "choose another run_dir"]),
    "vae: run_dir below a file": ("{vae} --run_dir {text}/run", ["{text}/run", "choose another run_dir"]),
    "vae: run_dir cannot be made": ("{vae} --run_dir /proc/run", ["/proc/run", "choose another run_dir"]),
    "vae: run_dir in use": ("{vae} --run_dir {held}", ["{held} is in use by process {pid}", "another run_dir"]),
    # ---- train dit
    "dit: no such latents": ("{dit} --data.shards {gone}", ["data.shards {gone}", "videodit encode"]),
    "dit: clips for latents": ("{dit} --data.shards {shards}", ["data.shards {shards}", "videodit encode"]),
    "dit: interrupted latents": ("{dit} --data.shards {torn_latents}", ["{torn_latents}", "videodit encode"]),
    "dit: no such vae": ("{dit} --vae {gone}", ["{gone}", "config.json"]),
    "dit: patch": ("{dit} --model.patch_size [2,2,2]", ["model.patch_size [2, 2, 2]", "fits is 5x32x32"]),
    "dit: patch in space": ("{dit} --model.patch_size [1,3,3]", ["[1, 3, 3]", "change the patch", "fits is 9x24x24"]),
    "dit: few clips": ("{dit} --global_batch_size 9", ["{latents} has 8 clips", "global_batch_size 9", "to 8 or less"]),
    "dit: typo": ("{dit} --model.hiden_size 64", ["--model.hiden_size", "did you mean --model.hidden_size?"]),
    "dit: keep_every": ("{dit} --save_every 4 --keep_every 6", ["keep_every 6", "save_every 4", "nearest is 8"]),
    "dit: heads": ("{dit} --model.num_heads 3", ["model.hidden_size 32", "model.num_heads 3", "a multiple of 6"]),
    "dit: no heads": ("{dit} --model.num_heads 0", ["model.num_heads 0", "use 1 or more"]),
    "dit: no MLP": ("{dit} --model.mlp_ratio -1", ["model.mlp_ratio -1", "use for example 4"]),
    "dit: rope": ("{dit} --model.rope_theta 0", ["model.rope_theta 0", "use for example 10000"]),
    "dit: slow samples": ("{dit} --sampling.fps -1", ["sampling.fps -1.0 is negative"]),
    "dit: shift": ("{dit} --sampling.shift 0", ["sampling.shift 0.0 is not positive", "1 is no shift"]),
    "dit: pattern": ("{dit} --model.pattern sx", ["model.pattern 'sx'", "s, t, f"]),
    "dit: run_dir below a file": ("{dit} --run_dir {text}/run", ["{text}/run", "choose another run_dir"]),
    # ---- encode
    "encode: no such vae": ("{encode} --vae {gone}", ["{gone}", "config.json"]),
    "encode: a DiT for a VAE": ("{encode} --vae {model}/dit", ["VAEConfig: it has ", "give the folder of a VAE"]),
    "encode: a model for a VAE": ("{encode} --vae {model}", ["{model} is not a model folder", "give {model}/vae"]),
    "encode: multiple": ("{encode} --multiple 0", ["multiple 0 is below 1: use for example 8"]),
    "encode: no shards": ("encode --vae {vae_folder} --out {new}", ["data.shards is not set", "--data.shards FOLDER"]),
    "encode: latents for clips": ("{encode} --data.shards {latents}", ["{latents} holds latents, no clips"]),
    "encode: vae without weights": ("{encode} --vae {bare_vae}", ["{bare_vae} has no weights", "model.safetensors"]),
    "encode: truncated vae": ("{encode} --vae {cut_vae}", ["{cut_vae}/model.safetensors", "truncated", "copy it"]),
    "encode: no such shards": ("{encode} --data.shards {gone}", ["{gone}", "no such folder"]),
    "encode: size": ("{encode} --data.buckets 9x20x32", ["9x20x32", "8", "9x16x32"]),
    "encode: frames": ("{encode} --data.buckets 10x32x32", ["10x32x32", "4k+1", "9x32x32"]),
    "encode: out below a file": ("{encode} --out {text}/latents", ["{text}/latents", "choose another"]),
    # ---- generate
    "generate: no model": ("generate --prompt x", ["--model is missing"]),
    "generate: no such model": ("{generate} --model {gone} --prompt x", ["no such model folder: {gone}", "export"]),
    "generate: another folder": ("{generate} --model {shards} --prompt x", ["{shards}", "model_index.json", "export"]),
    "generate: no weights": ("{generate} --model {bare_model} --prompt x", ["{bare_model}/dit has no weights"]),
    "generate: truncated dit": ("{generate} --model {cut_dit} --prompt x", ["{cut_dit}/dit/model.safe", "truncated"]),
    "generate: truncated vae": ("{generate} --model {cut_in_vae} --prompt x", ["{cut_in_vae}/vae/", "truncated"]),
    "generate: truncated text": ("{generate} --model {cut_text} --prompt x", ["{cut_text}/text_encoder/", "truncated"]),
    "generate: damaged index": ("{generate} --model {bad_index} --prompt x", ["model_index.json", "damaged"]),
    "generate: other weights": ("{generate} --model {mixed} --prompt x", ["{mixed}/dit", "does not fit"]),
    "generate: no prompt": ("{generate}", ["no prompt", "--prompt TEXT"]),
    "generate: empty prompt": ("{generate} --prompt=", ["a prompt is empty", "for example"]),
    "generate: blank prompt": ("{generate} --prompt=\u00a0", ["a prompt is empty", "for example"]),
    "generate: no such prompts": ("{generate} --prompts {gone}", ["--prompts {gone}", "No such file"]),
    "generate: prompts are a folder": ("{generate} --prompts {empty}", ["--prompts {empty}"]),
    "generate: prompts are no text": ("{generate} --prompts {model}/dit/model.safetensors", ["--prompts {model}/dit"]),
    "generate: Latin-1": ("{generate} --prompts {latin}", ["{latin} is no UTF-8 text: save it as UTF-8"]),
    "generate: seed": ("{generate} --prompt x --seed 99999999999999999999", ["--seed 9999", "more than 64 bits"]),
    "generate: a part": ("{generate} --model {model}/dit --prompt x", ["no model_index.json; give {model}"]),
    "generate: a run": ("{generate} --model {young_run} --prompt x", ["videodit export {young_run} --out MODEL"]),
    "generate: empty prompts": ("{generate} --prompts {blank}", ["no prompt", "--prompts FILE"]),
    "generate: frames": ("{generate} --prompt x --num_frames 16", ["num_frames 16", "4k+1", "nearest is 17"]),
    "generate: no frames": ("{generate} --prompt x --num_frames 0", ["num_frames 0", "4k+1", "nearest is 1"]),
    "generate: height": ("{generate} --prompt x --height 40", ["height 40", "16", "nearest is 32"]),
    "generate: width": ("{generate} --prompt x --width 60", ["width 60", "16", "nearest is 64"]),
    "generate: steps": ("{generate} --prompt x --num_steps 0", ["num_steps 0", "below 1"]),
    "generate: sampler": ("{generate} --prompt x --sampler dpm", ["'dpm'", "euler, heun"]),
    "generate: fps": ("{generate} --prompt x --fps 0", ["fps 0", "not positive"]),
    "generate: number": ("{generate} --prompt x --seed one", ["--seed 'one'", "a whole number"]),
    "generate: device": ("{generate} --prompt x --device gpu", ["'gpu'", "auto, cpu, cuda"]),
    "generate: out is a file": ("{generate} --prompt x --out {text}", ["{text}", "choose another"]),
    "generate: out below a file": ("{generate} --prompt x --out {text}/x", ["{text}/x", "choose another"]),
    # ---- plan, inspect, evaluate, export, import, demo
    "plan: tokens": ("plan --text_tokens -1", ["text_tokens -1", "use 0 for as many as the encoder reads"]),
    "inspect: no such shards": ("inspect {gone}", ["{gone}", "no such folder", "videodit ingest"]),
    "inspect: empty shards": ("inspect {empty}", ["{empty} has no samples"]),
    "inspect: no such config": ("inspect {shards} --like {gone}", ["like {gone}", "give its YAML or its folder"]),
    "inspect: frames": ("inspect {shards} --data.buckets 16x32x32", ["16x32x32", "the nearest that fits is 17x32x32"]),
    "import: no such folder": ("import wan {gone} --out {new}", ["no such folder: {gone}", "Wan 2.1"]),
    "import: another folder": ("import wan {model} --out {new}", ["{model} has no transformer/config.json", "Wan 2.1"]),
    "evaluate: nothing": ("evaluate", ["--model DIR", "--videos A --reference B"]),
    "evaluate: no such model": ("evaluate --model {gone}", ["no such model folder: {gone}"]),
    "evaluate: no such videos": ("evaluate --videos {gone} --reference {videos}", ["no such folder: {gone}"]),
    "evaluate: no such original": ("evaluate --videos {videos} --reference {gone}", ["no such folder: {gone}"]),
    "evaluate: out below a file": ("evaluate --model {model} --out {text}/x", ["{text}/x", "choose another"]),
    "evaluate: nothing matches": ("evaluate --videos {empty} --reference {videos}", ["{empty}", "{videos}"]),
    "evaluate: seed": ("{evaluate} --seed -1", ["seed -1 is negative", "use for example 0"]),
    "evaluate: batch size": ("{evaluate} --batch_size 0", ["batch_size 0 is below 1"]),
    "export: no run": ("export {gone} --out {new}", ["{gone} is not a run folder", "config.yaml"]),
    "export: no checkpoint": ("export {young_run} --out {new}", ["{young_run} has no checkpoint yet", "save_every"]),
    "demo: out below a file": ("demo --out {text}/demo", ["{text}/demo", "choose another"]),
    "demo: no recipe": ("demo --out {new} --vae_config {gone}.yaml", ["no recipe {gone}.yaml", "--vae_config"]),
    "demo: range": ("demo --out {new} --num_clips 0", ["num_clips 0"]),
    "demo: seed": ("demo --out {new} --seed -1", ["seed -1 is negative", "use for example 0"]),
}
NO_GPU_CASES = {
    "vae: no GPU": ("{vae} --device cuda", ["'cuda'", "--device cpu"]),
    "generate: no GPU": ("{generate} --prompt x --device cuda", ["'cuda'", "--device cpu"]),
}
if not torch.cuda.is_available():
    CASES |= NO_GPU_CASES
DISK_CASES: dict[str, tuple[str, list[str]]] = {
    "ingest: full": ("ingest {videos} --min_frames 9 --out {full}/shards", ["no space left", "{full}/shards", "free"]),
    "vae: full": ("{vae} --run_dir {full}/run", ["{full}/run", "No space left", "choose another run_dir"]),
    "dit: full": ("{dit} --run_dir {full}/run", ["{full}/run", "No space left", "choose another run_dir"]),
    "encode: full": ("{encode} --out {full}/latents", ["no space left", "{full}/latents", "free some space"]),
    "generate: full": ("{generate} --prompt x --out {full}/x", ["no space left", "{full}/x/00000-x.mp4", "free"]),
    "export: full": ("export {dit_run} --out {full}/model", ["no space left", "{full}/model", "free some space"]),
    "export: onto videos": ("export {dit_run} --out {videos}", ["{videos} holds other files, such as a.mp4"]),
    "export: out below a file": ("export {dit_run} --out {text}/model", ["{text}/model", "choose another"]),
    "export: too small": ("export {dit_run} --out {small}/model", ["{small}/model", "free some space"]),
    "inspect: full": ("{inspect} --out {full}/page.html", ["no space left", "{full}/page.html", "free some space"]),
    "evaluate: full": ("{evaluate} --out {full}/x", ["no space left", "{full}/x/00000-", "free some space"]),
    "demo: full": ("demo --smoke=true --out {full}/demo", ["no space left", "{full}/demo", "free some space"]),
    "ingest: read-only": ("ingest {videos} --out {read_only}/shards", ["no permission", "{read_only}/shards"]),
    "vae: read-only": ("{vae} --run_dir {read_only}/run", ["{read_only}/run", "choose another run_dir"]),
    "dit: read-only": ("{dit} --run_dir {read_only}/run", ["{read_only}/run", "choose another run_dir"]),
    "encode: read-only": ("{encode} --out {read_only}/latents", ["no permission", "{read_only}/latents"]),
    "generate: read-only": ("{generate} --prompt x --out {read_only}/x", ["no permission", "{read_only}/x"]),
    "export: read-only": ("export {dit_run} --out {read_only}/model", ["no permission", "{read_only}/model"]),
    "inspect: read-only": ("{inspect} --out {read_only}/page.html", ["no permission", "{read_only}/page.html"]),
    "evaluate: read-only": ("{evaluate} --out {read_only}/x", ["no permission", "{read_only}/x"]),
    "demo: read-only": ("demo --smoke=true --out {read_only}/demo", ["no permission", "{read_only}/demo"]),
    # The run starts, but its checkpoint does not fit.
    "dit: too small": ("{dit} --run_dir {small}/run", ["{small}/run", "no room for the checkpoint", "free some space"]),
}
# The same from a fresh process: what an import prints on stderr would be a second line.
FRESH = ["ingest: no such folder", "vae: no such shards", "generate: no such model"]


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Folders and files, good and bad, by name; and the start of the verbs' command lines with good values."""
    root = tmp_path_factory.mktemp("places")
    names = (
        "gone new empty text videos damaged_videos blank latin typo wrong_type no_yaml shards vae_folder latents model"
    )
    at = {name: root / name for name in names.split()}
    for name in ("empty", "videos", "damaged_videos"):
        at[name].mkdir()
    write_mp4(at["videos"] / "a.mp4", render(sample_spec(np.random.default_rng(0)), 9, 32), 8.0)
    whole = (at["videos"] / "a.mp4").read_bytes()
    (at["damaged_videos"] / "a.mp4").write_bytes(whole[: len(whole) // 3])
    for name, text in {"text": "x", "blank": " \n\n", "typo": "max_step: 3", "no_yaml": "a: [1"}.items():
        at[name].write_text(text)
    at["wrong_type"].write_text("seed: many")
    at["latin"].write_bytes("café".encode("latin-1"))
    tiny.make_shards(at["shards"])
    tiny.make_vae(at["vae_folder"])
    tiny.make_latents(at["latents"], at["shards"], at["vae_folder"])
    tiny.make_model(at["model"])

    def changed(name: str, origin: str) -> Path:
        at[name] = root / name
        shutil.copytree(at[origin], at[name])
        return at[name]

    (changed("torn_latents", "latents") / "latents.json").unlink()
    (changed("bare_vae", "vae_folder") / "model.safetensors").unlink()
    cut(changed("cut_vae", "vae_folder") / "model.safetensors")
    (changed("bare_model", "model") / "dit/model.safetensors").unlink()
    cut(changed("cut_dit", "model") / "dit/model.safetensors")
    cut(changed("cut_in_vae", "model") / "vae/model.safetensors")
    cut(changed("cut_text", "model") / "text_encoder/model.safetensors", keep=5)
    cut(changed("bad_index", "model") / "model_index.json")
    shutil.copy(at["model"] / "vae/model.safetensors", changed("mixed", "model") / "dit/model.safetensors")
    at["young_run"] = root / "young_run"
    (at["young_run"] / "checkpoints").mkdir(parents=True)
    (at["young_run"] / "config.yaml").write_text(yaml.safe_dump({"run_dir": str(at["young_run"])}))

    result = {name: str(path) for name, path in at.items()}
    run = " ".join(["--max_steps 2 --global_batch_size 4 --micro_batch_size 4", *tiny.RUN_OPTIONS])
    vae = " ".join([f"--run_dir {root}/vae_run --data.shards {at['shards']}", *tiny.VAE_OPTIONS])
    result["fresh_vae"] = f"train vae {run} --run_dir {root}/vae_run --data.shards {at['shards']}"
    dit = " ".join([f"--run_dir {root}/dit_run --data.shards {at['latents']}", *tiny.DIT_OPTIONS])
    result["held"], result["pid"] = f"{root}/held", str(os.getpid())
    result["dit_run"] = f"{root}/dit_run"
    result["vae"] = f"train vae {run} {vae} --data.buckets {tiny.BUCKET}"
    result["dit"] = f"train dit {run} {dit}"
    data = f"--data.shards {at['shards']} --data.buckets {tiny.BUCKET}"
    result["encode"] = f"encode --vae {at['vae_folder']} {data} --out {root / 'encoded'}"
    result["inspect"] = f"inspect {at['shards']} --data.buckets {tiny.BUCKET} --clips 1"
    result["evaluate"] = f"evaluate --model {at['model']} --num_prompts 1"
    result["generate"] = f"generate --model {at['model']} --out {root / 'samples'}"
    return result


def cut(path: Path, keep: int = 0) -> None:
    """Leaves the first half of a file, or `keep` bytes."""
    content = path.read_bytes()
    path.write_bytes(content[: keep or len(content) // 2])


def arguments(case: str, places: dict[str, str]) -> list[str]:
    """The case's command line; a setting that comes twice counts as it comes last."""
    words = case.format(**places).split(" ")
    settings: dict[str, list[str]] = {}
    verb: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            verb.append(word)
        elif "=" in word:
            settings[word.split("=")[0]] = [word]
        else:
            settings[word] = [word, words.pop(0)]
    return verb + [word for setting in settings.values() for word in setting]


@pytest.fixture(scope="module")
def results(places: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Results:
    """What every case gave; those of DISK_CASES are missing where there are no private mounts."""
    for name in ("full", "small", "read_only"):
        places[name] = str(tmp_path_factory.mktemp(name))
    setup = f"{FULL_AND_READ_ONLY}; mount -t tmpfs -o size=64k tmpfs {{small}}".format(**places)
    cases = CASES
    if can_mount(setup):
        cases = {**CASES, "a run to export": ("{dit}", []), **DISK_CASES}
    else:
        setup = ""
    commands = {name: arguments(case, places) for name, (case, _) in cases.items()}
    here = World(0, 1, 0, torch.device("cpu"))
    with RunFolder.open(places["held"], "model: this process has it", here):
        found = run_all(commands, tmp_path_factory.mktemp("out"), setup)
    assert found.pop("a run to export", [0])[0] == 0
    return found


def check(code: int, stdout: str, stderr: str, parts: list[str]) -> None:
    assert code == 2, (code, stdout, stderr)
    assert stdout == ""
    lines = [line for line in stderr.splitlines() if not line.startswith("ingest videos: ")]  # progress
    assert len(lines) == 1 and lines[0].startswith("error: "), stderr
    for part in parts:
        assert part in stderr


@pytest.mark.parametrize("name", list(CASES))
def test_one_line_and_exit_code_2(results: Results, places: dict[str, str], name: str) -> None:
    check(*results[name], [part.format(**places) for part in CASES[name][1]])


@pytest.mark.parametrize("name", list(DISK_CASES))
def test_the_disk_refuses(results: Results, places: dict[str, str], name: str) -> None:
    if name not in results:
        pytest.skip(NO_MOUNTS)
    code, stdout, stderr = results[name]
    if name == "dit: too small":  # warnings about checkpoints come before
        stderr = stderr.splitlines(keepends=True)[-1]
    stdout = "" if name.startswith(("demo", "inspect")) else stdout  # stages that begin, and the table
    check(code, stdout, stderr, [part.format(**places) for part in DISK_CASES[name][1]])


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_process_says_nothing_else(places: dict[str, str], name: str) -> None:
    done = tiny.videodit(*arguments(CASES[name][0], places))
    check(done.returncode, done.stdout, done.stderr, [part.format(**places) for part in CASES[name][1]])


def test_mistakes_left_nothing_behind(results: Results, places: dict[str, str]) -> None:
    assert len(results) >= len(CASES)
    assert Path(places["text"]).read_text() == "x"
    assert [path.name for path in Path(places["videos"]).iterdir()] == ["a.mp4"]
    assert not list(Path(places["empty"]).iterdir())
    samples = Path(places["model"]).parent / "samples"
    assert not samples.exists() or not list(samples.iterdir())


@pytest.mark.slow
def test_a_second_process_on_the_same_run_folder(places: dict[str, str], tmp_path: Path) -> None:
    command = arguments("{vae} --max_steps 100000 --run_dir " + str(tmp_path / "run"), places)
    with tiny.started(command) as first:
        tiny.wait_until(lambda: (tmp_path / "run/metrics.jsonl").exists(), first)
        second = tiny.videodit(*command)
        check(second.returncode, second.stdout, second.stderr, [f"{tmp_path}/run is in use by process {first.pid}"])
        first.send_signal(signal.SIGTERM)
        assert first.wait(60) == 143
    steps = [json.loads(line)["step"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert (tmp_path / f"run/checkpoints/step-{len(steps):08d}/manifest.json").is_file()
