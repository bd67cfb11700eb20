"""tools/slurm and tools/kubernetes: the commands they give to the scheduler, and what becomes of each exit code."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import tiny
from tests.forked_ranks import free_port
from videodit.config import parse_config
from videodit.training.dit_config import DiTRunConfig

PROGRAMS = Path(sys.executable).parent
TOOLS = Path(__file__).resolve().parents[2] / "tools"
SBATCH = TOOLS / "slurm/train.sbatch"
COMMAND_PROMPTS = ["a red kite", "two"]
COMMAND = ["train", "dit", "--config", "configs/dit_xl.yaml", "--prompts", json.dumps(COMMAND_PROMPTS)]

# Slurm's commands and the launcher, as executables that write down how they were called.
STUBS = {
    "scontrol": """
case "$1" in
show) [ "$2 $3" = "hostnames $SLURM_JOB_NODELIST" ] && printf 'node-a\\nnode-b\\nnode-c\\n' ;;
*) echo "$@" >> "$STUBS/scontrol.log" ;;
esac""",
    "squeue": """
[ "$*" = "--noheader --jobs 123456 --format %T" ] && cat "$STUBS/state" """,
    # One task for each node, in turn; ends as the worst of them does.
    "srun": """
printf '%s\\n' "$@" > "$STUBS/srun.log"
while [[ "$1" == --* ]]; do shift; done
[ -e "$STUBS/waits" ] && exec "$STUBS/waiting"
worst=0
for node in 0 1 2; do
    SLURM_NODEID=$node "$@" || { code=$?; [ "$code" -gt "$worst" ] && worst=$code; }
done
exit "$worst" """,
    "python": """
printf '%s\\n' "$@" > "$STUBS/python-$SLURM_NODEID.log"
exit "$(cat "$STUBS/code")" """,
    # An srun whose tasks take their time after a SIGTERM.
    "waiting": """
trap 'touch "$STUBS/told"' TERM
touch "$STUBS/up"
until [ -e "$STUBS/save" ]; do sleep 0.05; done
exit "$(cat "$STUBS/code")" """,
}


@pytest.fixture
def stubs(tmp_path: Path) -> Path:
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body.strip()}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "state").write_text("RUNNING\n")
    (tmp_path / "code").write_text("0\n")
    return tmp_path


def environment(stubs: Path) -> dict[str, str]:
    slurm = {"JOB_ID": "123456", "JOB_NODELIST": "node-[a-c]", "JOB_NUM_NODES": "3", "CPUS_PER_TASK": "64"}
    paths = {"PATH": f"{stubs}:{os.environ['PATH']}", "STUBS": str(stubs)}
    return {**os.environ, **paths, **{f"SLURM_{name}": value for name, value in slurm.items()}}


def submit(stubs: Path, code: int = 0, state: str = "RUNNING") -> subprocess.CompletedProcess[str]:
    (stubs / "code").write_text(f"{code}\n")
    (stubs / "state").write_text(f"{state}\n")
    command = ["bash", str(SBATCH), *COMMAND]
    return subprocess.run(command, env=environment(stubs), capture_output=True, text=True, timeout=60)


def requeued(stubs: Path) -> bool:
    log = stubs / "scontrol.log"
    if not log.exists():
        return False
    assert log.read_text() == "requeue 123456\n"
    return True


def test_the_job_script_is_valid_bash() -> None:
    done = subprocess.run(["bash", "-n", SBATCH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = [line.removeprefix("#SBATCH ") for line in SBATCH.read_text().splitlines() if line.startswith("#SBATCH")]
    assert {"--requeue", "--signal=B:TERM@300", "--ntasks-per-node=1", "--open-mode=append"} <= set(options)


@pytest.mark.parametrize("script", [SBATCH, TOOLS.parent / ".ci/run"], ids=lambda script: script.name)
def test_shellcheck_finds_nothing(script: Path) -> None:
    done = subprocess.run([PROGRAMS / "shellcheck", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_job_scripts_command_is_one_that_trains() -> None:
    """As the comment has it, and as the other tests give it, but for where data and run are."""
    words = next(line for line in SBATCH.read_text().splitlines() if "sbatch --nodes" in line).split()
    for command in (words[words.index("train") :], COMMAND):
        places = [] if "--run_dir" in command else ["--data.shards", "LATENTS", "--run_dir", "RUN"]
        config = parse_config(DiTRunConfig, [*command[2:], *places], "videodit train dit")
        assert command[:2] == ["train", "dit"] and config.run_dir == "RUN" and config.model.depth > 12
        assert config.data.shards == "LATENTS" and list(config.prompts) == ([] if not places else COMMAND_PROMPTS)


def test_each_node_gets_one_launcher_and_the_command_as_it_was_typed(stubs: Path) -> None:
    done = submit(stubs)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    srun = (stubs / "srun.log").read_text().splitlines()
    assert {"--nodes=3", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(srun)
    for node in range(3):
        given = (stubs / f"python-{node}.log").read_text().splitlines()
        assert given == [
            "tools/launch.py",
            f"--node-rank={node}",
            "--nnodes=3",
            "--nproc-per-node=gpu",
            "--rdzv-backend=static",
            "--rdzv-endpoint=node-a:23456",
            "-m",
            "videodit",
            *COMMAND,
        ]
    assert (TOOLS / "launch.py").exists()


@pytest.mark.parametrize("code", [0, 1, 2, 130, 137, 143])
def test_only_a_stop_with_a_checkpoint_is_requeued(stubs: Path, code: int) -> None:
    assert submit(stubs, code).returncode == code
    assert requeued(stubs) == (code == 143)


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", ""])
def test_a_cancelled_job_is_not_requeued(stubs: Path, state: str) -> None:
    assert submit(stubs, 143, state).returncode == 143
    assert not requeued(stubs)


@pytest.mark.parametrize(
    "code, number", [(143, signal.SIGTERM), (0, signal.SIGTERM), (1, signal.SIGTERM), (143, signal.SIGUSR1)]
)
def test_a_stop_is_passed_on_and_the_tasks_decide(stubs: Path, code: int, number: int) -> None:
    """Bash's `wait` gives 143 as soon as the signal is there: that must not be taken for the tasks' own exit code."""
    (stubs / "waits").touch()
    (stubs / "code").write_text(f"{code}\n")
    with subprocess.Popen(["bash", SBATCH, *COMMAND], env=environment(stubs)) as process:
        try:
            tiny.wait_until((stubs / "up").exists, process)
            process.send_signal(number)
            tiny.wait_until((stubs / "told").exists, process)
            process.send_signal(number)
            (stubs / "save").touch()
            assert process.wait(60) == code
        finally:
            (stubs / "save").touch()
            process.kill()
    assert requeued(stubs) == (code == 143)


@pytest.fixture(scope="module")
def manifests() -> dict[str, Any]:
    documents = yaml.safe_load_all((TOOLS / "kubernetes/train.yaml").read_text())
    return {document["kind"]: document for document in documents}


def trainer(job: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The command of the pod's container, and the launcher's options in it."""
    (container,) = job["spec"]["template"]["spec"]["containers"]
    arguments = container["args"]
    launcher = arguments[: arguments.index("-m")]
    assert all(option.startswith("--") and "=" in option for option in launcher)
    return container["command"] + arguments, dict(option[2:].split("=", 1) for option in launcher)


def test_the_manifests_are_of_kubernetes_schemas() -> None:
    """Strictly: a field that a schema does not know is refused, which a cluster would drop without a word."""
    command = [PROGRAMS / "kubernetes-validate", "--strict", TOOLS / "kubernetes/train.yaml"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr.count(" passed for resource ") + done.stdout.count(" passed for resource ") == 2


def test_the_pods_are_the_nodes(manifests: dict[str, Any]) -> None:
    job = manifests["Job"]
    command, options = trainer(job)
    assert job["spec"]["completionMode"] == "Indexed"
    assert job["spec"]["completions"] == job["spec"]["parallelism"] == int(options["nnodes"])
    assert options["node-rank"] == "$(JOB_COMPLETION_INDEX)"
    assert command[:2] == ["python", "tools/launch.py"]
    assert command[command.index("-m") :][:4] == ["-m", "videodit", "train", "dit"]


def test_the_first_pod_is_found_by_its_name(manifests: dict[str, Any]) -> None:
    job, service = manifests["Job"], manifests["Service"]
    _, options = trainer(job)
    name, subdomain = job["metadata"]["name"], job["spec"]["template"]["spec"]["subdomain"]
    assert service["metadata"]["name"] == subdomain
    assert service["spec"]["clusterIP"] == "None"  # headless
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    host, port = options["rdzv-endpoint"].split(":")
    assert host == f"{name}-0.{subdomain}" and int(port) > 1024
    assert options["rdzv-backend"] == "static"


def test_a_failed_pod_is_replaced_and_a_wrong_config_ends_the_job(manifests: dict[str, Any]) -> None:
    spec = manifests["Job"]["spec"]
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # else there is no podFailurePolicy
    assert pod["terminationGracePeriodSeconds"] >= 300
    assert spec["backoffLimit"] > spec["completions"]  # one failure is one of every pod
    assert spec["podReplacementPolicy"] == "Failed"
    (container,) = pod["containers"]
    by_code = {}
    for rule in spec["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == container["name"]
            assert rule["onExitCodes"]["operator"] == "In"
            by_code |= dict.fromkeys(rule["onExitCodes"]["values"], rule["action"])
    assert by_code == {2: "FailJob", 143: "Ignore"}


def test_what_is_mounted_is_there(manifests: dict[str, Any]) -> None:
    pod = manifests["Job"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.slow
def test_the_pods_command_trains(manifests: dict[str, Any], tmp_path: Path) -> None:
    """On one node without GPUs, with a small model that is not compiled; all other arguments are the manifest's."""
    command, options = trainer(manifests["Job"])
    latents = tiny.make_latents(
        tmp_path / "latents", tiny.make_shards(tmp_path / "clips"), tiny.make_vae(tmp_path / "vae")
    )
    here = {"nnodes": "1", "node-rank": "0", "nproc-per-node": "2", "rdzv-endpoint": f"127.0.0.1:{free_port()}"}
    assert here.keys() <= options.keys()
    here |= {"data.shards": str(latents), "run_dir": str(tmp_path / "run")}
    given = dict(argument[2:].split("=", 1) for argument in command if "=" in argument)
    assert here.keys() <= given.keys()
    smaller = [f"--{name}={here.get(name, value)}" for name, value in given.items()]
    at = command.index("-m")
    launcher = [argument for argument in smaller if argument[2:].split("=")[0] in options]
    training = [argument for argument in smaller if argument not in launcher]
    tiny_run = ["--max_steps=2", "--global_batch_size=4", "--micro_batch_size=2", "--compile=false", *tiny.RUN_OPTIONS]
    run = [sys.executable, *command[1:2], *launcher, *command[at : at + 4], *training, *tiny.DIT_OPTIONS, *tiny_run]
    environment = {**os.environ, "PYTHONPATH": str(TOOLS.parent)}
    done = subprocess.run(run, cwd=TOOLS.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run/metrics.jsonl").read_text().count("train/loss") == 2


@pytest.mark.parametrize("file", ["slurm/train.sbatch", "kubernetes/train.yaml", "hostfile.example", "launch.py"])
def test_what_the_commands_in_comments_name_exists(file: str) -> None:
    """Configs and files of the repository that a user is told to give."""
    words = [word for line in (TOOLS / file).read_text().splitlines() for word in line.replace("=", " ").split()]
    named = {word.strip("[](),.") for word in words if word.strip("([").startswith(("tools/", "configs/", "videodit/"))}
    assert named
    for path in named:
        assert (TOOLS.parent / path).exists(), path
