"""Standard output while process groups are made."""

import contextlib
import io
import os
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_stdout() -> Iterator[None]:
    """What is written to standard output inside is dropped, from C++ too; so it is for all threads.

    In torch 2.8 and some that follow, gloo prints a line for every rank of every group (pytorch/gloo#462).
    """
    if sys.stdout is not None:  # as after >&-
        sys.stdout.flush()
    try:
        saved = os.dup(1)
    except OSError:  # it is closed, and nobody reads it
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
