"""Errors that are the user's to fix: the command line prints their one line and exits with code 2."""

import errno
from pathlib import Path

# The machine's refusals, which are the user's to fix; any other OSError may be a bug.
REFUSALS = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS}


class UserError(Exception):
    """A mistake in input or configuration; the message is one line that names the value and the fix."""


class LostRanks(Exception):
    """Other ranks are gone, or never came; one line. Exit code 1, after which launchers start the run again."""


class MissingExtra(UserError):
    """An optional package is not installed.

    Args:
        package: the module that could not be imported.
        extra: the extra of videodit that brings it.
    """

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed: run pip install 'videodit[{extra}]'")


def user_error(error: OSError, path: str | Path) -> UserError:
    """Turns what the disk refuses into one line with the fix.

    Args:
        error: what the operating system said.
        path: what was being written or read.
    """
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(f"no space left while writing {path}: free some space, then run the same command again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(f"no permission for {path}: change its permissions or choose another output")
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        return UserError(f"{path} is not a folder: choose another output")
    return UserError(f"{path} cannot be used ({error.strerror or error}): choose another path")
