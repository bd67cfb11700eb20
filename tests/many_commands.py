"""Runs many command lines of videodit: `python -m tests.many_commands COMMANDS.json OUT`.

COMMANDS.json: {name: [argument, ...]}. torch and DeepSpeed take seconds to import, so that is done once, and each
command runs in a fork: a process of its own, whose exit code, stdout and stderr go to OUT/results.json as
{name: [code, stdout, stderr]}. One that does not end within a minute is killed by its alarm: code -14.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIMIT_S = 60
UNSHARE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-ec"]
FULL_AND_READ_ONLY = (
    "mount -t tmpfs -o size=64k tmpfs {full}; head -c 65536 /dev/zero > {full}/zeros; "
    "mount -t tmpfs -o ro tmpfs {read_only}"
)
"""Shell commands that make a full and a read-only disk of two folders, in a private mount namespace."""
NO_MOUNTS = "no private mounts here (unshare --user --mount), so no full and no read-only disk"

Results = dict[str, tuple[int, str, str]]
"""name -> (exit code, stdout, stderr)"""


def can_mount(setup: str) -> bool:
    """Whether the shell commands run in a private mount namespace, which some machines do not allow."""
    return bool(shutil.which("unshare")) and subprocess.run([*UNSHARE, setup], capture_output=True).returncode == 0


def run_all(commands: dict[str, list[str]], out: Path, setup: str = "") -> Results:
    """Runs the commands, in order, in a private mount namespace where shell commands set things up before, if given."""
    (out / "commands.json").write_text(json.dumps(commands))
    command = [sys.executable, "-m", "tests.many_commands", str(out / "commands.json"), str(out)]
    if setup:
        command = [*UNSHARE, f'{setup}; exec "$@"', "sh", *command]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    results: Results = json.loads((out / "results.json").read_text())
    return results


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
