"""The command line: exit codes, one line for a user's mistake, and help that loads nothing heavy."""

import dataclasses
import errno
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from videodit import __version__, cli
from videodit.errors import MissingExtra, UserError


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False)


def test_help_lists_every_verb_and_loads_no_torch() -> None:
    code = "import sys; from videodit.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    for verb in cli.VERBS:
        assert f"\n  {verb} " in done.stdout


def test_importing_the_package_loads_no_torch() -> None:
    assert python("-c", "import sys, videodit; dir(videodit); sys.exit('torch' in sys.modules)").returncode == 0


def configs() -> dict[str, type]:
    """The settings of each verb."""
    from videodit.data.ingest import IngestConfig
    from videodit.demo import DemoConfig
    from videodit.evaluation.evaluate import EvaluateConfig
    from videodit.evaluation.inspect_shards import InspectConfig
    from videodit.generation.encode import EncodeConfig
    from videodit.generation.generate import GenerateConfig
    from videodit.planning.plan_config import config_class
    from videodit.training.dit_config import DiTRunConfig
    from videodit.training.vae_config import VAERunConfig

    return {
        "demo": DemoConfig,
        "ingest": IngestConfig,
        "inspect": InspectConfig,
        "train vae": VAERunConfig,
        "train dit": DiTRunConfig,
        "plan": config_class([]),
        "encode": EncodeConfig,
        "generate": GenerateConfig,
        "evaluate": EvaluateConfig,
        "export": cli.ExportSettings,
        "import wan": cli.ImportSettings,
        "doctor": cli.NoSettings,
    }


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and value of every setting that is no group."""
    for name, value in values.items():
        if dataclasses.is_dataclass(value):
            yield from leaves(vars(value), f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize("verb", cli.VERBS)
def test_help_of_each_verb(verb: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its usage, an example, and every setting with what it means and its default."""
    monkeypatch.setenv("COLUMNS", "2000")
    with pytest.raises(SystemExit) as caught:
        cli.main([*verb.split(), "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: videodit {verb} " in text
    assert f"example:\n  videodit {verb}" in text
    rows = dict(re.findall(r"\n  --(\S+) \S+\s+(.+)", text))
    fields = dataclasses.fields(configs()[verb])
    made = {f.name: f.default if f.default_factory is dataclasses.MISSING else f.default_factory() for f in fields}
    for key, default in leaves(made):
        shown = "null" if default is None else list(default) if isinstance(default, tuple) else default
        shown = str(shown).lower() if isinstance(shown, bool) else shown
        doc, _, facts = rows[key].partition(" (type: ")
        ending = f", default: {shown})" if shown != "" else ")"
        assert len(doc.split()) >= 1 and not doc.startswith("(") and facts.endswith(ending), rows[key]
        assert not re.search(r"Literal|tuple|\bint\b|\bfloat\b|\bstr\b|\bbool\b|default: \)", facts), facts


def test_module_and_version() -> None:
    done = python("-m", "videodit", "--version")
    assert (done.returncode, done.stdout) == (0, f"videodit {__version__}\n")


@pytest.mark.parametrize(
    ("argv", "part"),
    [
        (["trian", "vae"], "did you mean train vae?"),
        (["genrate"], "did you mean generate?"),
        (["train"], "videodit train vae"),
        (["train", "--seed", "1"], "videodit train vae"),
        (["train", "dti"], "did you mean train dit?"),
        (["xxxxxxxx"], "choose from demo"),
        (["export", "run"], "--out is missing"),
        (["export", "--out", "x"], "RUN is missing"),
        (["doctor", "--sed", "1"], "--sed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(argv: list[str], part: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and err.count("\n") == 1
    assert part in err


def raising(error: BaseException) -> dict[str, cli.Verb]:
    def run(argv: object, prog: str, summary: str) -> None:
        raise error

    return {"doctor": cli.Verb("", run)}


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("size 65 is odd:\n  give 64"), 2, "error: size 65 is odd: give 64\n"),
        (MissingExtra("decord", "decord"), 2, "error: decord is not installed: run pip install 'videodit[decord]'\n"),
        (OSError(errno.ENOSPC, "No space left on device", "a.tar"), 2, "error: No space left on device: a.tar\n"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 2, "error: Permission denied: x\n"),
        (OSError(errno.EROFS, "Read-only file system"), 2, "error: Read-only file system\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_exit_codes(
    error: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "VERBS", raising(error))
    assert cli.main(["doctor"]) == code
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("error", [RuntimeError("bug"), OSError(errno.EIO, "I/O error"), ValueError("bug")])
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "VERBS", raising(error))
    with pytest.raises(type(error)):
        cli.main(["doctor"])


def test_one_rank_a_machine_prints(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["xxxxxxxx"]) == 2
    assert capsys.readouterr().err == ""


def test_ctrl_c_while_the_command_ends_is_no_traceback() -> None:
    code = (
        "import atexit, os, signal, sys; from videodit.cli import entry; sys.argv = ['videodit', '--version'];"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"
        "atexit.register(os.kill, os.getpid(), signal.SIGINT); entry()"
    )
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")


@pytest.mark.parametrize("buffered", [True, False])
def test_output_that_nobody_reads_is_no_traceback(buffered: bool) -> None:
    code = "import sys; from videodit.cli import entry; sys.argv = ['videodit', '--help']; sys.stdin.read(); entry()"
    command = [sys.executable, *([] if buffered else ["-u"]), "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=os.environ | {"PYTHONUNBUFFERED": ""}, **pipes) as process:
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 128 + signal.SIGPIPE


def test_what_an_encoding_lacks_is_written_out() -> None:
    code = "import sys; from videodit.cli import entry; sys.argv = ['videodit', 'ingest', '--help']; entry()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert r"s3://\u2026" in done.stdout


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    import videodit

    with pytest.raises(AttributeError, match="NoSuchThing"):
        videodit.NoSuchThing  # noqa: B018
    assert set(videodit.__all__) <= set(dir(videodit))
