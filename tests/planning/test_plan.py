"""`videodit plan`: what it prints, refuses and advises; and that every file in configs/ fits the machine it names."""

import re
from functools import partial
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests import tiny
from videodit import cli
from videodit.config import load_yaml
from videodit.errors import UserError
from videodit.models.checkpointing import POLICIES
from videodit.models.dit import VideoDiT
from videodit.models.lora import add_lora
from videodit.models.text import ByteTextEncoder
from videodit.models.text_to_video import TextToVideoModel
from videodit.planning.footprint import ParameterCount, step_flops
from videodit.planning.machines import GIB, find_machine
from videodit.planning.memory import BUCKET, rank_memory
from videodit.planning.plan import Planner, choose_checkpointing, make_plan, plan_dtype, policy_of, room_of
from videodit.planning.plan_config import DiTPlanConfig, VAEPlanConfig, config_class
from videodit.planning.table import print_plan
from videodit.planning.workload import dit_pass

CONFIGS = sorted(
    p for p in (Path(__file__).resolve().parents[2] / "configs").glob("*_*.yaml") if p.stem != "ingest_base"
)
SMALL = {"model.hidden_size": 32, "model.depth": 2, "model.num_heads": 2, "text.dim": 32, "text.num_heads": 2}
SMALL |= {"model.text_dim": 32, "gpu": "h100", "sampling.height": 64, "sampling.width": 64}


def small(tmp_path: Path, **changes) -> DiTPlanConfig:
    path = tmp_path / "config.yaml"
    path.write_text("max_steps: 1000\n")
    return load_yaml(DiTPlanConfig, path, {**SMALL, **changes})


def machine_of(path: Path) -> tuple[str, str]:
    """How many GPUs of which kind the first line of a config names."""
    first = path.read_text().splitlines()[0]
    named = re.search(r"--gpus (\d+) --gpu ([\w-]+)", first)
    assert named, f"{path.name} names no machine: {first}"
    return named[1], named[2]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_fits_the_machine_that_its_first_line_names(path: Path) -> None:
    gpus, gpu = machine_of(path)
    config = load_yaml(config_class([str(path)]), path, {"gpus": int(gpus), "gpu": gpu})
    dtype = plan_dtype(config)
    planner = Planner(config, config.workload(), config.gpus, dtype)
    choice = planner.choice(config.zero_stage, policy_of(config), planner.micro)
    assert planner.micro == config.micro_batch_size, "a rank never gets such a micro batch"
    assert choice.memory.total <= room_of(find_machine(config.gpu, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_command_plans_every_config(path: Path) -> None:
    gpus, gpu = machine_of(path)
    assert cli.main(["plan", "--config", str(path), "--gpus", gpus, "--gpu", gpu]) == 0


@pytest.mark.parametrize(
    ("name", "d", "depth", "heads", "low", "high"),
    [
        ("small", 384, 12, 6, 40e6, 50e6),
        ("base", 768, 12, 12, 0.12e9, 0.13e9),
        ("large", 1024, 24, 16, 0.36e9, 0.46e9),
        ("xl", 1152, 28, 16, 0.5e9, 0.7e9),
        ("2b", 2048, 32, 16, 1.8e9, 2.2e9),
        ("5b", 3072, 36, 24, 4.6e9, 5.4e9),
    ],
)
def test_sizes_have_the_parameters_that_their_names_say(
    name: str, d: int, depth: int, heads: int, low: float, high: float
) -> None:
    """S, B, L and XL are DiT's widths, depths and heads (Peebles & Xie 2022, Table 1)."""
    config = load_yaml(DiTPlanConfig, next(path for path in CONFIGS if path.stem == f"dit_{name}"))
    model = config.model
    assert (model.hidden_size, model.depth, model.num_heads) == (d, depth, heads)
    assert low < config.workload().parameters().total < high
    with torch.device("meta"):
        blocks = sum(p.numel() for p in VideoDiT(model).blocks.parameters())
    # Four matrices of attention and eight of the MLP a block, four of the attention to text in every other one.
    assert blocks == pytest.approx((12 + 4 / 2) * d**2 * depth, rel=0.01)


def test_the_command_prints_a_plan(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("max_steps: 1000\nmodel:\n  hidden_size: 32\n  depth: 2\n  num_heads: 2\n")
    command = ["plan", "--config", str(path), "--gpus", "4", "--gpu", "H200", "--buckets", "[17x64x64, 9x32x64]"]
    assert cli.main([*command, "--model.depth", "4"]) == 0
    out = capsys.readouterr().out
    for text in ("4 x h200", "17x64x64", "9x32x64", "ZeRO", "GPU-hours", "MFU"):
        assert text in out
    for text in ("model:\n  latent_channels: 4\n", "model:\n  channels: [8, 16, 16]\n", "loss:\n  kl: 0.01\n"):
        path.write_text(text)  # any setting that only a VAE has
        assert config_class([str(path)]) is VAEPlanConfig
    assert config_class([], ["--gpu", "h100", "--model.latent-channels=4"]) is VAEPlanConfig
    assert config_class([]) is config_class([], ["--model.depth", "4", "--loss", "0"]) is DiTPlanConfig
    path.write_text("model:\n  channels: [8, 16, 16]\n")
    assert cli.main(["plan", f"--config={path}", "--gpu", "h100", "--model.latent_channels", "4"]) == 0
    assert "VAE of" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "0"], "gpus 0 is an empty plan: the nearest that works is 1"),
        (["--gpus", "64"], "global_batch_size 32 leaves 32 of 64 GPUs without a clip: use 64, or --gpus 32"),
        (["--gpus", "6", "--sequence_parallel", "4"], "sequence_parallel 4 does not divide 6 GPUs: .* --gpus 8"),
        (["--gpu", "h300"], "--gpu 'h300' is not known: use cpu or one of b200, h200"),
        (["--model.depth", "100000"], "model.depth 100000 is more than a plan takes on: use 256 or less"),
        (
            ["--model.hidden_size", "10000000"],
            "model.hidden_size 10000000 has .* which 64 h100 do not hold: use at most [1-9]",
        ),
        (["--model.mlp_ratio", "1e17"], "model.mlp_ratio 1.*0 has .* use at most [1-9]"),
        (["--model.in_channels", "1" + 16 * "0"], "model.in_channels 1.*0 has .* use at most [1-9]"),
        (["--model.local_width", "1" + 14 * "0"], "model.local_width 1.*0 has .* use at most [1-9]"),
        (["--text.buckets", "1" + 18 * "0"], "text.buckets 1.*0 has .* use at most [1-9]"),
        (["--model.hidden_size", "1" + 200 * "0"], "has weights of more than 1e.30 GiB"),
        (["--buckets", "17x100000x100000"], "17x100000x100000 is .* tokens a clip, .* 2,000,000 or less"),
        (["--mfu", "40"], "mfu 40.0 is no share"),
        (["--text_tokens", "65"], "text_tokens 65 is more than the 64 that the text encoder reads"),
        (["--buckets", "18x64x64"], "18x64x64.*the nearest that fits is 17x64x64"),
        (["--buckets", "17x64x72"], "9 latents of width are not divided by the 2 of model.patch_size.*nearest"),
        (["--compile", "--checkpointing", "attention"], "checkpointing attention does not go with compile: use full"),
        (["--checkpointing", "half"], "checkpointing 'half' is not one of none, attention, full, auto"),
    ],
)
def test_an_impossible_plan_is_one_line(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  hidden_size: 32\n  depth: 2\n  num_heads: 2\n")
    assert cli.main(["plan", "--config", str(path), *options]) == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("compiled", [False, True])
def test_too_large_a_run_is_refused_with_the_nearest_that_fits(compiled: bool, tmp_path: Path) -> None:
    large = {"model.hidden_size": 2048, "model.num_heads": 16, "model.depth": 8, "compile": compiled}
    large |= {"sampling.height": 1024, "sampling.width": 1024}
    config = small(tmp_path, gpu="rtx4090", gpus=8, micro_batch_size=4, **large)
    with pytest.raises(UserError) as refused:
        make_plan(config)
    advice = re.search(r"--zero_stage (\d) --checkpointing (\w+) --micro_batch_size (\d)", str(refused.value))
    assert advice, refused.value
    stage, policy, micro = advice.groups()
    better = small(
        tmp_path,
        gpu="rtx4090",
        gpus=8,
        zero_stage=int(stage),
        checkpointing=policy,
        micro_batch_size=int(micro),
        **large,
    )
    plan = make_plan(better)
    assert plan.chosen.memory.total <= plan.room


def test_what_no_setting_makes_fit_is_refused_with_the_gpus_that_do(tmp_path: Path) -> None:
    huge = {"model.hidden_size": 12288, "model.num_heads": 96, "gpu": "a100", "offload_optimizer": True}
    message = "no ZeRO stage, checkpointing or micro batch makes it fit; the nearest that does is (--gpus.*) \\("
    with pytest.raises(UserError, match=message) as refused:
        make_plan(small(tmp_path, **huge, **{"model.depth": 8}))
    advice = re.findall(r"--(\w+) (\w+)", re.search(message, str(refused.value))[1])
    changes = {name: int(value) if value.isdigit() else value == "true" or value for name, value in advice}
    assert changes["gpus"] > 1
    plan = make_plan(small(tmp_path, **{**huge, "model.depth": 8, **changes}))
    assert plan.chosen.memory.total <= plan.room


def test_auto_takes_the_first_policy_that_fits(tmp_path: Path) -> None:
    few = {
        "text.max_words": 4,
        "text.buckets": 64,
    }  # else the text encoder, which no policy is for, outweighs so small a DiT
    config = small(tmp_path, checkpointing="auto", micro_batch_size=32, **few)
    planner = Planner(config, config.workload(), 1, torch.bfloat16)
    needs = [planner.choice(1, policy, 32).memory.total / 0.92 for policy in POLICIES]
    assert needs == sorted(needs, reverse=True)
    rooms = (needs[0] + 1, needs[1] + 1, needs[2] + 1, needs[2] / 2)
    chosen = [choose_checkpointing(config, room, 1, torch.bfloat16) for room in rooms]
    assert chosen == ["none", "attention", "full", "full"]
    assert make_plan(config).chosen.checkpointing == "none"
    compiled = small(tmp_path, checkpointing="auto", micro_batch_size=32, compile=True, **few)
    assert choose_checkpointing(compiled, rooms[1], 1, torch.bfloat16) == "full"


def test_time_follows_from_flops_ranks_and_mfu(tmp_path: Path) -> None:
    one, eight = (make_plan(small(tmp_path, gpus=gpus, mfu=0.5)) for gpus in (1, 8))
    (bucket,) = one.buckets
    assert bucket.step_s == pytest.approx(bucket.step_flops / (989e12 * 0.5))
    assert one.seconds == pytest.approx(1000 * bucket.step_s) and one.seconds == pytest.approx(8 * eight.seconds)
    uneven = make_plan(small(tmp_path, gpus=24, mfu=0.5))  # 32 clips: some ranks have 2, and the others wait
    assert uneven.seconds == pytest.approx(one.seconds / 16)


def test_steps_on_windows_are_counted_as_such(tmp_path: Path) -> None:
    """Of 8x8 latents in patches of 2x2, windows of 4x4 are a quarter of the tokens."""
    windows = {"crop.size": [4, 4], "crop.share": 0.75, "text.max_words": 4}
    whole, mixed = (make_plan(small(tmp_path, **changes)) for changes in ({"text.max_words": 4}, windows))
    full, part = mixed.buckets
    assert (full.name, part.name) == ("17x64x64", "17x64x64, 4x4 of latents")
    assert (full.steps, part.steps, part.tokens) == (250, 750, full.tokens / 4)
    assert full.step_s == whole.buckets[0].step_s
    run = partial(dit_pass, shape=(1, 16, 5, 4, 4), text_tokens=mixed.config.text.max_words)

    def build() -> TextToVideoModel:
        return TextToVideoModel(VideoDiT(mixed.config.model), ByteTextEncoder(mixed.config.text))

    assert part.step_flops == part.clips * step_flops(build, run) < full.step_flops / 2
    assert mixed.seconds == pytest.approx(250 * full.step_s + 750 * part.step_s)
    small_clips = make_plan(small(tmp_path, buckets=["17x32x32"], **windows))  # no larger than a window
    assert [row.name for row in small_clips.buckets] == ["17x32x32"]
    shown = StringIO()
    print_plan(mixed, Console(file=shown, width=200))
    assert re.search("4x4 of latents +│ +750 ", shown.getvalue())


def test_fp32_has_a_speed_of_its_own_without_tensor_cores(tmp_path: Path) -> None:
    assert torch.get_float32_matmul_precision() == "highest"  # nobody has switched TF32 on
    assert find_machine("a100", torch.float32).peak_flops == 19.5e12 < find_machine("a100", torch.bfloat16).peak_flops


def test_buckets_by_tokens_have_as_many_tokens_a_step(tmp_path: Path) -> None:
    buckets = {"buckets": ["17x64x64", "17x32x64", "1x64x64"]}
    plan = make_plan(small(tmp_path, gpus=8, batch_by="tokens", **buckets))
    assert [row.clips for row in plan.buckets] == [32, 64, 160]  # of 5, 5 and 1 latent frames
    assert len({row.tokens * row.clips for row in plan.buckets}) == 1
    by_clips = make_plan(small(tmp_path, gpus=8, **buckets))
    assert [row.clips for row in by_clips.buckets] == [32, 32, 32]
    assert plan.buckets[1].step_s == pytest.approx(2 * by_clips.buckets[1].step_s)
    assert plan.chosen.memory == by_clips.chosen.memory  # of the largest bucket


def test_buckets_by_time_take_as_long(tmp_path: Path) -> None:
    """By FLOPs; the caption's are a clip's whatever its size, so that a small one has more of them for a token."""
    buckets = {"buckets": ["17x64x64", "1x32x32"], "global_batch_size": 256}
    plan = make_plan(small(tmp_path, batch_by="time", **buckets))
    large, tiny_one = plan.buckets
    assert large.clips == 256
    assert abs(tiny_one.step_flops - large.step_flops) <= tiny_one.step_flops / tiny_one.clips  # to a clip
    assert tiny_one.clips * tiny_one.tokens < large.clips * large.tokens
    shown = StringIO()
    print_plan(plan, Console(file=shown, width=200))
    assert "batch_by time: clips/step by FLOPs" in shown.getvalue()


def test_ranks_that_share_clips_share_their_activations_and_time(tmp_path: Path) -> None:
    alone, shared = (make_plan(small(tmp_path, gpus=8, sequence_parallel=n, micro_batch_size=4)) for n in (1, 4))
    assert shared.chosen.memory.activations == pytest.approx(alone.chosen.memory.activations / 4)
    assert shared.chosen.memory.optimizer == alone.chosen.memory.optimizer  # ZeRO shards over all ranks
    assert shared.seconds == pytest.approx(alone.seconds)
    wide = make_plan(small(tmp_path, gpus=64, sequence_parallel=2))  # 32 clips for 32 pairs
    assert wide.seconds == pytest.approx(alone.seconds / 8)


def test_latents_decide_channels_and_buckets(tmp_path: Path) -> None:
    latents = tiny.make_latents(tmp_path / "latents", tiny.make_shards(tmp_path / "s"), tiny.make_vae(tmp_path / "vae"))
    plan = make_plan(small(tmp_path, **{"data.shards": str(latents)}))
    assert [row.bucket.name for row in plan.buckets] == [tiny.BUCKET]
    assert plan.config.model.in_channels == 4


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "muon"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sharding_divides_what_it_shards(dtype: torch.dtype, optimizer: str) -> None:
    count = ParameterCount(total=10**9, small=0)
    options = {"dtype": dtype, "optimizer": optimizer, "ema_profiles": 2}
    for stage in (1, 2, 3):
        one, many = (rank_memory(count, 0.0, zero_stage=stage, ranks=ranks, **options) for ranks in (1, 1000))
        assert many.optimizer == pytest.approx(one.optimizer / 1000) and many.ema == pytest.approx(one.ema / 1000)
        assert (many.gradients < one.gradients) == (stage > 1)
    assert one.total > (10 if optimizer == "adamw8bit" else 16) * 10**9 and one.total / GIB < 30
    assert isinstance(VAEPlanConfig(), VAEPlanConfig)


def test_a_gpu_reduces_one_bucket_while_the_next_one_fills() -> None:
    count = ParameterCount(total=10**9, small=0)
    options = {"ranks": 8, "dtype": torch.bfloat16, "optimizer": "adamw", "ema_profiles": 2}
    for stage, more in ((1, 0), (2, 2 * BUCKET), (3, 0)):
        one, two = (rank_memory(count, 0.0, zero_stage=stage, overlapped=way, **options) for way in (False, True))
        assert two.gradients - one.gradients == more


def test_offload_moves_optimizer_and_averages_to_the_host(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    count = ParameterCount(total=10**9, small=0)
    for stage in (1, 2, 3):
        options = {"zero_stage": stage, "ranks": 8, "dtype": torch.bfloat16, "optimizer": "adamw", "ema_profiles": 2}
        here, away = (rank_memory(count, 7.0, offload=offload, **options) for offload in (False, True))
        assert away.optimizer == away.ema == here.host == 0 and away.weights == here.weights
        assert away.activations == here.activations and away.gradients <= here.gradients
        moved = here.optimizer + here.ema
        assert away.total <= here.total - moved + 1 and moved < away.host < 1.4 * moved
        assert away.in_one_place().total == pytest.approx(away.total + away.host)
    path = tmp_path / "config.yaml"
    path.write_text("model:\n  hidden_size: 32\n  depth: 1\n  num_heads: 2\n  pattern: s\n")
    assert cli.main(["plan", "--config", str(path), "--gpus", "4", "--buckets", "1x64x64", "--offload_optimizer"]) == 0
    out = capsys.readouterr().out
    assert "host" in out and "of host memory on each rank" in out
    assert cli.main(["plan", "--config", str(path), "--offload_optimizer", "--zero_stage", "0"]) == 2
    assert "offload_optimizer at zero_stage 0" in capsys.readouterr().err


def test_where_only_offload_fits_it_is_the_advice(tmp_path: Path) -> None:
    large = {"model.hidden_size": 8192, "model.num_heads": 64, "model.pattern": "st", "micro_batch_size": 1}
    with pytest.raises(UserError, match="the nearest that fits is .* --offload_optimizer true") as refused:
        make_plan(small(tmp_path, gpu="rtx4090", **large))
    advice = re.search(r"--zero_stage (\d)(?: --checkpointing (\w+))?", str(refused.value))
    assert advice
    stage, policy = int(advice[1]), advice[2] or "none"
    settings = {**large, "zero_stage": stage, "checkpointing": policy, "offload_optimizer": True}
    config = small(tmp_path, gpu="rtx4090", **settings)
    planner = Planner(config, config.workload(), 1, torch.bfloat16)
    memory = planner.choice(stage, policy, 1).memory
    assert memory.host > memory.total and memory.total <= room_of(find_machine("rtx4090", torch.bfloat16))


def test_lora_plans_moments_for_what_it_trains(tmp_path: Path) -> None:
    """Frozen weights are weights and nothing else; the numbers are those of the real model."""
    config = small(tmp_path, **{"init": "unused", "lora.rank": 2})
    model = VideoDiT(config.model)
    whole = sum(p.numel() for p in model.parameters())
    model.requires_grad_(False)
    add_lora(model.blocks, config.lora)
    text = sum(p.numel() for p in ByteTextEncoder(config.text).parameters())
    count = config.workload().parameters()
    assert count.total == sum(p.numel() for p in model.parameters() if p.requires_grad) > 0
    assert count.frozen == whole + text
    options = {"zero_stage": 2, "ranks": 4, "dtype": torch.bfloat16, "optimizer": "adamw", "ema_profiles": 2}
    memory = rank_memory(count, 0.0, **options)
    assert memory.weights == 2 * (count.total + count.frozen)
    assert (memory.optimizer, memory.ema) == (12 * count.total / 4, 8 * count.total / 4)
