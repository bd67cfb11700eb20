"""Runs many command lines of videodit: `python -m tests.many_commands COMMANDS.json OUT`.

COMMANDS.json: {name: [argument, ...]}. torch and DeepSpeed take seconds to import, so that is done once, and each
command runs in a fork: a process of its own, whose exit code, stdout and stderr go to OUT/results.json as
{name: [code, stdout, stderr]}. One that does not end within a minute is killed by its alarm: code -14.
"""

import contextlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path

LIMIT_S = 60


def run_forked(argv: list[str], out: Path) -> int:
    """One command in a fork; its output goes to OUT/stdout and OUT/stderr."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    signal.alarm(LIMIT_S)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        file = os.open(out / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    from videodit.cli import main

    try:
        code = main(argv)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def warm_up() -> None:
    """Imports what the commands need, and reads the docs of their settings, so that no fork does it again."""
    from videodit.cli import ExportSettings, ImportSettings
    from videodit.config import from_dict
    from videodit.data.ingest import IngestConfig
    from videodit.demo import DemoConfig
    from videodit.errors import UserError
    from videodit.evaluation.evaluate import EvaluateConfig
    from videodit.evaluation.inspect_shards import InspectConfig
    from videodit.generation.encode import EncodeConfig
    from videodit.generation.generate import GenerateConfig
    from videodit.training.dit_config import DiTRunConfig
    from videodit.training.vae_config import VAERunConfig

    trained = (VAERunConfig, DiTRunConfig, EncodeConfig, GenerateConfig, EvaluateConfig)
    for config in (*trained, DemoConfig, IngestConfig, InspectConfig, ExportSettings, ImportSettings):
        with contextlib.suppress(UserError):  # what has no default
            from_dict(config, {})


if __name__ == "__main__":
    warm_up()
    folder = Path(sys.argv[2])
    results = {}
    for command_name, arguments in json.loads(Path(sys.argv[1]).read_text()).items():
        exit_code = run_forked(arguments, folder)
        results[command_name] = [exit_code, (folder / "stdout").read_text(), (folder / "stderr").read_text()]
        print(command_name, *results[command_name], flush=True)
    (folder / "results.json").write_text(json.dumps(results))
