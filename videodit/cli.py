"""The verbs: parse, call, print; no logic. What a verb needs is imported inside it, so that --help answers at once."""

import difflib
import io
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NoReturn

from videodit import __version__
from videodit.config import Argument, parse_command, parse_config
from videodit.early_stop import end_at_once
from videodit.errors import REFUSALS, LostRanks, UserError
from videodit.progress import counted, show_progress

EXIT_DONE, EXIT_LOST_RANKS, EXIT_USER_ERROR, EXIT_INTERRUPTED = 0, 1, 2, 130
EXIT_NO_READER = 128 + signal.SIGPIPE  # as of a process that the signal ends


@dataclass(frozen=True)
class NoSettings:
    """The config of a verb that has none."""


@dataclass(frozen=True)
class ImportSettings:
    """Settings of import."""

    pattern: str = "f"
    """attention of the blocks, repeated to the depth: f as published; st to train a factorized model from it"""


@dataclass(frozen=True)
class ExportSettings:
    """Settings of export."""

    ema_length: float | None = None
    """relative width of the weight average, made from those in all checkpoints; by default the run's first"""


def demo(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.demo import DemoConfig, run_demo

    run_demo(parse_config(DemoConfig, argv, prog, summary, "videodit demo --out runs/demo"))


def ingest(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.data.ingest import IngestConfig
    from videodit.data.ingest import ingest as run

    what = "Folder of videos or tars, a .csv, .jsonl or .parquet list, or one file; here or, as s3://…, elsewhere."
    source = Argument("src", what, positional=True)
    example = "videodit ingest my_videos --out runs/a/shards"
    arguments = [source, Argument("out", "Shard folder to write.")]
    config, given = parse_command(IngestConfig, argv, prog, summary, example, arguments)
    with show_progress("ingest videos") as progress:
        result = run(given["src"], given["out"], config, progress)
    for setting, (clips, example) in result.filtered.items():
        print(f"{setting} leaves out {clips}, such as {example}")
    for reason, count in result.reasons.items():
        print(f"{count} left out{', for one' if count > 1 else ''}: {reason}")
    if result.uncaptioned:
        names = result.uncaptioned
        print(f"{counted(len(names), 'video')} without a caption, such as {names[0]}: the file's name is read as one")
    start = "dry run, nothing is written: " if config.dry_run else ""
    see = f": see {given['out']}/rejects.jsonl" if result.reasons and not config.dry_run else ""
    made = f"{counted(result.accepted, 'video')} to {counted(result.clips, 'clip')} in {given['out']}"
    print(f"{start}{made}; {result.rejected} rejected{see}")


def inspect(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.evaluation.inspect_shards import InspectConfig, inspect_shards

    arguments = [Argument("shards", "Folder of shards.", positional=True)]
    example = "videodit inspect runs/a/shards --like configs/vae_demo.yaml"
    config, given = parse_command(InspectConfig, argv, prog, summary, example, arguments)
    print(f"page: {inspect_shards(given['shards'], config)}")


def train_vae(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.training.vae_config import VAERunConfig
    from videodit.training.vae_trainer import train_vae as run

    example = "videodit train vae --config configs/vae_demo.yaml --data.shards runs/a/shards --run_dir runs/a/vae"
    folder = run(parse_config(VAERunConfig, argv, prog, summary, example))
    if _speaks():
        print(f"VAE folder: {folder}")


def train_dit(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.training.dit_config import DiTRunConfig
    from videodit.training.dit_trainer import train_dit as run

    example = "videodit train dit --config configs/dit_demo.yaml --data.shards runs/a/latents --run_dir runs/a/dit"
    folder = run(parse_config(DiTRunConfig, argv, prog, summary, example))
    if _speaks():
        print(f"run folder: {folder}; its model folder: videodit export {folder} --out MODEL")


def encode(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.generation.encode import EncodeConfig, encode_clips

    example = "videodit encode --data.shards runs/a/shards --vae runs/a/vae/model --out runs/a/latents"
    config = parse_config(EncodeConfig, argv, prog, summary, example)
    with show_progress("encode clips", _speaks()) as progress:
        count = encode_clips(config, progress)
    if _speaks():
        print(f"{counted(count, 'clip')} encoded in {config.out}, as {', '.join(config.data.buckets)}")


def generate(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.generation.generate import GenerateConfig
    from videodit.generation.generate import generate as run

    example = 'videodit generate --model runs/demo/model --prompt "a small red circle moves left" --out runs/samples'
    config = parse_config(GenerateConfig, argv, prog, summary, example)
    with show_progress("generate clips") as progress:
        paths = run(config, progress)
    print("\n".join(map(str, paths)))


def evaluate(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.evaluation.evaluate import EvaluateConfig
    from videodit.evaluation.evaluate import evaluate as run

    run(parse_config(EvaluateConfig, argv, prog, summary, "videodit evaluate --model runs/demo/model"))


def export(argv: Sequence[str], prog: str, summary: str) -> None:
    source = Argument("run", "Run folder of train dit or train vae.", positional=True)
    arguments = [source, Argument("out", "Model folder to write.")]
    example = "videodit export runs/demo/dit --out my_model"
    config, given = parse_command(ExportSettings, argv, prog, summary, example, arguments)
    from videodit.training.export import export_run

    average = export_run(given["run"], given["out"], config.ema_length)
    print(f"model folder: {given['out']}, average of relative width {average}")


def import_wan(argv: Sequence[str], prog: str, summary: str) -> None:
    source = Argument("src", "Folder of a Wan 2.1 text-to-video model in diffusers' layout.", positional=True)
    arguments = [source, Argument("out", "Model folder to write.")]
    example = "videodit import wan Wan2.1-T2V-1.3B-Diffusers --out my_model"
    config, given = parse_command(ImportSettings, argv, prog, summary, example, arguments)
    from videodit.generation.import_wan import import_wan as run

    run(given["src"], given["out"], config.pattern)
    print(f"model folder: {given['out']}")


def plan(argv: Sequence[str], prog: str, summary: str) -> None:
    from videodit.planning.plan import make_plans
    from videodit.planning.plan_config import config_class
    from videodit.planning.table import print_plans
    from videodit.settings import option_values

    example = "videodit plan --config configs/dit_base.yaml --gpus 8 --gpu h100"
    cls = config_class(option_values(argv, "config"), argv)
    print_plans(make_plans(parse_config(cls, argv, prog, summary, example)))


def doctor(argv: Sequence[str], prog: str, summary: str) -> None:
    parse_config(NoSettings, argv, prog, summary, "videodit doctor")
    from videodit.doctor import run_doctor

    run_doctor()


@dataclass(frozen=True)
class Verb:
    """One command: what it does in a sentence, and the function that parses its arguments and runs it."""

    summary: str
    run: Callable[[Sequence[str], str, str], None]


VERBS = {
    "demo": Verb("Run the whole way on the built-in world: render to a measured model and report.html.", demo),
    "ingest": Verb("Turn a folder, list or tars of videos into checked, cut, captioned shards.", ingest),
    "inspect": Verb("Show what training will see of shards: buckets, crops, scores, what was left out.", inspect),
    "train vae": Verb("Train the video VAE on shards; the same command resumes.", train_vae),
    "train dit": Verb("Train the text-to-video DiT on latent shards; the same command resumes.", train_dit),
    "plan": Verb("Say what a training run needs: parameters, FLOPs, memory and time, before a GPU is touched.", plan),
    "encode": Verb(
        "Encode clips into latent shards with a trained VAE; the same command resumes, or makes what changed.", encode
    ),
    "generate": Verb("Make clips from prompts: an .mp4 each, beside the .json that reproduces it.", generate),
    "evaluate": Verb("Measure a model, or one set of videos against another.", evaluate),
    "export": Verb("Write EMA weights, configs and statistics of a run as one model folder.", export),
    "import wan": Verb("Write a published Wan 2.1 text-to-video model as a model folder.", import_wan),
    "doctor": Verb("Say what this machine can run, and what is missing.", doctor),
}


def help_text() -> str:
    """List the verbs, each with its sentence."""
    rows = "\n".join(f"  {name:<11} {verb.summary}" for name, verb in VERBS.items())
    return (
        "usage: videodit VERB [--config FILE.yaml] [--key value ...]\n\n"
        f"Train text-to-video models, from raw videos to clips made from prompts.\n\nverbs:\n{rows}\n\n"
        "videodit VERB --help shows its settings and an example.\nexample: videodit demo --out runs/demo"
    )


def find_verb(argv: Sequence[str]) -> tuple[str, list[str]]:
    """Split argv into the verb and its arguments. Raises UserError: no such verb."""
    for words in (2, 1):
        name = " ".join(argv[:words])
        if name in VERBS:
            return name, list(argv[words:])
    followed = {"train": "videodit train vae or videodit train dit", "import": "videodit import wan"}
    typed = argv[0] if argv[0] not in followed else " ".join(argv[:2])
    if typed in followed or (argv[0] in followed and argv[1].startswith("-")):
        raise UserError(f"{argv[0]} needs to know what: {followed[argv[0]]}")
    near = difflib.get_close_matches(typed, VERBS, n=1, cutoff=0.5)
    advice = f"did you mean {near[0]}?" if near else f"choose from {', '.join(VERBS)}"
    raise UserError(f"no verb {typed!r}: {advice}")


def run(argv: Sequence[str]) -> None:
    """Run one command line; whatever goes wrong is raised."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
    elif argv[0] == "--version":
        print(f"videodit {__version__}")
    else:
        name, rest = find_verb(argv)
        VERBS[name].run(rest, f"videodit {name}", VERBS[name].summary)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `videodit` and give its exit code: 0 done, 2 the user's to fix (one line on stderr), 1 other ranks
    are gone (likewise), 130 interrupted.

    Args:
        argv: the arguments after `videodit`; those of the process if None.
    """
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _report(str(error))
    except LostRanks as error:
        print(f"error: {error}", file=sys.stderr)  # on every rank: each may have lost others
        return EXIT_LOST_RANKS
    except OSError as error:
        if error.errno not in REFUSALS:
            raise  # a bug keeps its traceback
        return _report(f"{error.strerror}: {error.filename}" if error.filename else str(error.strerror))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


def entry() -> NoReturn:
    """The command `videodit`: `main`, and then the end of the process with its exit code."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"  # without the line of code
    # Tensors of 2 MiB and more on huge pages: torch reads this at its first allocation (docs/decisions.md).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.argv[1:2] == ["train"]:
        end_at_once()
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: a name in another encoding ends no command
    try:
        code = main()
        if sys.stdout is not None:  # as after >&-
            sys.stdout.flush()
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        # What is left in the buffer would be tried again while Python ends, and fail.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = EXIT_NO_READER
    except SystemExit as end:
        if not isinstance(end.code, int):
            raise
        code = end.code
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, another Ctrl-C would be a traceback
    mesh = sys.modules.get("videodit.parallel.mesh")  # not imported by verbs that need no processes
    if mesh is not None:
        mesh.leave(code)
    sys.exit(code)


def _reader_is_gone() -> bool:
    """Whether nobody reads stdout any more, as in `videodit … | head -1`."""
    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are always told
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _speaks() -> bool:
    return os.environ.get("RANK", "0") == "0"  # torchrun starts this once a rank


def _report(message: str) -> int:
    # torchrun starts this once a rank and says so in LOCAL_RANK: one line a machine is enough.
    if os.environ.get("LOCAL_RANK", "0") == "0":
        print("error: " + " ".join(message.split()), file=sys.stderr)
    return EXIT_USER_ERROR
