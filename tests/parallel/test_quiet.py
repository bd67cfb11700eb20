"""What C++ prints while groups are made stays away from a command's output."""

import ctypes
import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from videodit.parallel.mesh import init_process, shutdown
from videodit.parallel.quiet import without_stdout


def test_lines_from_c_and_python_are_dropped_inside_and_come_before_and_after(capfd):
    print("before")
    with without_stdout():
        print("inside")
        ctypes.CDLL(None).puts(b"inside, in C")
        ctypes.CDLL(None).fflush(None)
        os.write(1, b"inside, by number")
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"


def test_an_error_gives_the_output_back(capfd):
    with pytest.raises(ValueError), without_stdout():
        raise ValueError
    print("after")
    assert capfd.readouterr().out == "after\n"


def test_a_process_without_standard_output_goes_on():
    code = "import videodit.parallel.quiet as q, sys\nwith q.without_stdout(): pass\nsys.exit(7)"
    done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, "-c", code], capture_output=True)
    assert done.returncode == 7, done.stderr


def test_a_group_is_made_without_a_word(capfd):
    init_process("cpu")  # gloo of torch 2.8 prints a line here
    assert dist.is_initialized()
    shutdown()
    assert capfd.readouterr().out == ""
