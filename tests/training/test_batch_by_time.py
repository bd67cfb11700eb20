"""`batch_by: time`: seconds of a clip are measured when a run begins, and its batches follow them for good."""

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from tests import tiny
from tests.forked_ranks import Ranks
from tests.training.test_trainers import dit_config, metrics, vae_config
from tests.training.toy import assert_same, whole
from videodit.data.batch_sizes import batch_sizes
from videodit.data.latent_reader import LatentDataConfig
from videodit.data.loader import LatentLoader
from videodit.data.randomness import batch_digest
from videodit.errors import UserError
from videodit.training.checkpoint import load_latest
from videodit.training.clip_seconds import ClipSeconds
from videodit.training.dit_trainer import train_dit
from videodit.training.vae_trainer import train_vae

VIDEO, IMAGE = tiny.BUCKET, f"1x{tiny.SIZE}x{tiny.SIZE}"
TOKENS = {VIDEO: 48, IMAGE: 16}  # latents of 3x4x4 and 1x4x4
CUT, STEPS = 2, 4


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_shards(tmp_path_factory.mktemp("clips"), 20, frames=(1, 1, 1, tiny.FRAMES, tiny.FRAMES))


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory, shards: Path) -> Path:
    root = tmp_path_factory.mktemp("encoded")
    return tiny.make_latents(root / "latents", shards, tiny.make_vae(root / "vae"), [VIDEO, IMAGE])


def read(run: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run / name).read_text())
    return values


def edit(run: Path, name: str, values: dict[str, Any]) -> None:
    (run / name).write_text(json.dumps(values))


def totals(seconds: dict[str, float]) -> dict[str, int]:
    sizes = batch_sizes(TOKENS, 4, 2, "time", seconds=seconds)
    return {name: size.total for name, size in sizes.items()}


def back_to(step: int, run: Path, copy: Path) -> Path:
    """A copy of a run as it was when this step's checkpoint was its last one."""
    shutil.copytree(run, copy)
    for folder in (copy / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > step:
            shutil.rmtree(folder)
    return copy


def check_order(run: Path, latents: Path, steps: int) -> None:
    """The run's steps have the clips of an order with these batches, in which an epoch has every clip once."""
    options = {"global_batch_size": 4, "micro_batch_size": 2, "batch_by": "time"}
    loader = LatentLoader(LatentDataConfig(shards=str(latents)), seed=0, **options)  # type: ignore[arg-type]
    loader.use_seconds(read(run, "clip_seconds.json"))
    plans = [plan for plan, _ in islice(loader.iterate(), max(loader.steps_per_epoch, steps))]
    expected = [(plan.bucket, batch_digest(loader.keys(plan))) for plan in plans[:steps]]
    assert [(line["data/bucket"], line["data/digest"]) for line in metrics(run)] == expected
    epoch = [key for plan in plans[: loader.steps_per_epoch] for key in loader.keys(plan)]
    assert sorted(epoch) == sorted(entry.key for entry in loader.shards.entries)


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_stage": 3},
        pytest.param({"zero_stage": 1, "sequence_parallel": 2}, marks=pytest.mark.slow),
    ],
    ids=lambda settings: "-".join(map(str, settings.values())),
)
def test_two_ranks_measure_once_and_any_number_goes_on(
    ranks: Ranks, latents: Path, tmp_path: Path, settings: dict[str, object]
) -> None:
    def train(run: Path, size: int, **changes: object) -> None:
        options = {"global_batch_size": 4, "micro_batch_size": 2, "batch_by": "time", "max_steps": STEPS} | changes
        options |= {"save_every": CUT, "sample_every": 0, "keep_last": 9, "optim.warmup_steps": 0, "dtype": "fp32"}
        argv = ["train", "dit", f"--run_dir={run}", f"--data.shards={latents}"]
        argv += [f"--{name}={value}" for name, value in options.items()]
        for rank in ranks.start([*argv, *tiny.DIT_OPTIONS, *tiny.RUN_OPTIONS], size):
            assert rank.wait() == 0, rank.stderr

    straight = tmp_path / "straight"
    train(straight, 2, **settings)
    seconds = read(straight, "clip_seconds.json")
    assert seconds.keys() == TOKENS.keys() and min(seconds.values()) > 0
    assert read(straight, "batches.json") == totals(seconds)
    check_order(straight, latents, STEPS)
    alone = back_to(CUT, straight, tmp_path / "alone")
    train(alone, 1, zero_stage=1)
    # To the last digit, which no second measurement would give.
    for name in ("clip_seconds.json", "batches.json"):
        assert (alone / name).read_bytes() == (straight / name).read_bytes()
    for line, other in zip(metrics(alone), metrics(straight), strict=True):
        assert line["data/digest"] == other["data/digest"]
        assert line["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)


def test_what_was_measured_elsewhere_is_kept(latents: Path, tmp_path: Path) -> None:
    """As if by a machine on which images take twice as long as videos."""
    config = dit_config(tmp_path / "run", latents, max_steps=CUT, batch_by="time")
    train_dit(config)
    elsewhere = {VIDEO: 0.01, IMAGE: 0.02}
    assert totals(elsewhere) == {VIDEO: 4, IMAGE: 2}
    edit(tmp_path / "run", "clip_seconds.json", elsewhere)
    if read(tmp_path / "run", "batches.json") != totals(elsewhere):
        with pytest.raises(UserError, match=rf"clips a step of {IMAGE}: 2, but run_dir .* was trained with"):
            train_dit(replace(config, max_steps=STEPS))
    edit(tmp_path / "run", "batches.json", totals(elsewhere))
    train_dit(replace(config, max_steps=STEPS))
    assert read(tmp_path / "run", "clip_seconds.json") == elsewhere
    lines = metrics(tmp_path / "run")[CUT:]
    options = {"global_batch_size": 4, "micro_batch_size": 2, "batch_by": "time"}
    loader = LatentLoader(config.data, seed=0, **options)  # type: ignore[arg-type]
    loader.use_seconds(elsewhere)
    plans = [plan for plan, _ in islice(loader.iterate(CUT + 1), STEPS - CUT)]
    assert [line["data/digest"] for line in lines] == [batch_digest(loader.keys(plan)) for plan in plans]


def test_measuring_leaves_no_trace_and_stages_have_times_of_their_own(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit a run that was told the times, and one that went on after a stop inside the second stage."""
    data = {"shards": str(latents)}
    stages = ({"steps": 1, "data": data}, {"steps": 3, "data": data, "batch_by": "time"})

    def run(folder: Path) -> dict[str, Any]:
        train_dit(
            dit_config(
                folder, latents, data=LatentDataConfig(), stages=stages, max_steps=STEPS, save_every=CUT, keep_last=9
            )
        )
        checkpoint = load_latest(folder)
        assert checkpoint is not None and checkpoint.step == STEPS
        return whole(checkpoint)

    measured = run(tmp_path / "measured")
    seconds = read(tmp_path / "measured", "clip_seconds.json")
    of_second = {
        f"{name} (stage 2)": total for name, total in totals({n: seconds[f"{n} (stage 2)"] for n in TOKENS}).items()
    }
    assert read(tmp_path / "measured", "batches.json") == {VIDEO: 4, IMAGE: 4, **of_second}
    assert_same(run(back_to(CUT, tmp_path / "measured", tmp_path / "resumed")), measured)
    monkeypatch.setattr(ClipSeconds, "_measure", lambda *_: {name: seconds[f"{name} (stage 2)"] for name in TOKENS})
    assert_same(run(tmp_path / "told"), measured)
    assert metrics(tmp_path / "told") == metrics(tmp_path / "resumed") == metrics(tmp_path / "measured")


def test_a_vae_is_measured_too(shards: Path, tmp_path: Path) -> None:
    config = vae_config(tmp_path / "run", shards, max_steps=1, batch_by="time", sample_every=0)
    config = replace(config, data=replace(config.data, buckets=[VIDEO, IMAGE]))
    train_vae(config)
    before = (tmp_path / "run/clip_seconds.json").read_bytes()
    assert read(tmp_path / "run", "batches.json") == totals(json.loads(before))
    train_vae(replace(config, max_steps=3))
    assert (tmp_path / "run/clip_seconds.json").read_bytes() == before


def test_two_runs_that_must_be_the_same_are_not_measured(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_by time .* use batch_by tokens"):
        dit_config(tmp_path / "run", latents, batch_by="time", deterministic=True)
