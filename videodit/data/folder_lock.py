"""A folder that one process changes, and that others may look through meanwhile only if nobody does."""

import contextlib
import fcntl
import os
from pathlib import Path
from typing import IO

from videodit.errors import UserError, user_error

_NAME = ".lock"


class FolderLock:
    """Holds a folder, first beside others that only look, and alone after `hold_alone`.

    The kernel drops it with the process: a killed one leaves nothing behind to clean up.

    Args:
        folder: made if missing.
        name: of the setting that gave the folder, for messages.
    Raises:
        UserError: if another process holds it alone, or it cannot be written.
    """

    def __init__(self, folder: str | Path, name: str) -> None:
        self._folder, self._name = Path(folder), name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # A file, not the folder itself: NFS wants to be able to write what it locks.
            self._file: IO[str] = (self._folder / _NAME).open("a+")
        except OSError as error:
            raise user_error(error, self._folder) from error
        self._take(fcntl.LOCK_SH)

    def hold_alone(self) -> None:
        """Keeps all others out.

        Raises:
            UserError: if there is another.
        """
        self._take(fcntl.LOCK_EX)
        with contextlib.suppress(OSError):  # a full disk: only the message to others is poorer
            self._file.truncate(0)
            self._file.write(str(os.getpid()))
            self._file.flush()

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets the folder go."""
        with contextlib.suppress(OSError):  # what could not be written to a full disk
            self._file.close()

    def _take(self, kind: int) -> None:
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.seek(0)
            holder = self._file.read().strip() if kind == fcntl.LOCK_SH else ""  # those that only look do not say
            self._file.close()
            by = f"process {holder}" if holder else "another process"
            raise UserError(
                f"{self._name} {self._folder} is in use by {by}: wait for it, or choose another {self._name}"
            ) from None
        except OSError as error:
            self._file.close()
            raise user_error(error, self._folder) from error
