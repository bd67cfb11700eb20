"""Facts about the machine: there, of the right kind, and honest about git."""

import json
import os
import subprocess

import torch

from videodit.evaluation import machine


def test_facts_are_complete_and_json():
    facts = machine.machine_facts()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["cpu"] and facts["torch"] == torch.__version__
    assert 1 <= facts["cores"] <= os.cpu_count()
    assert facts["memory_gib"] > 0
    assert (facts["gpu"] is None) == (not torch.cuda.is_available())


def test_a_folder_that_is_no_checkout_has_no_commit_even_inside_one(tmp_path):
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    git("init", "-q")
    assert machine._git_commit(tmp_path) is None  # no commit yet
    (tmp_path / "file").write_text("a")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert machine._git_commit(tmp_path) == git("rev-parse", "--short=12", "HEAD")
    (tmp_path / "file").write_text("b")
    assert machine._git_commit(tmp_path).endswith("+changes")
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert machine._git_commit(inside) is None
