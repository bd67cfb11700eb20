"""Files that are whole after a power loss: what a rename names is on the disk before."""

import os
from pathlib import Path


def write_durably(file: Path, text: str) -> None:
    """Writes a file beside its place, then puts it there in one rename; a crash at any moment leaves the old one whole.

    Raises:
        OSError: if it cannot be written.
    """
    temp = file.with_suffix(".tmp")
    temp.write_text(text)
    sync(temp)
    os.replace(temp, file)
    sync(file.parent)


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
