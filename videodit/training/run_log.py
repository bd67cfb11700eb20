"""RUN/train.log: plain lines of what a run did, and every warning, of all ranks, with its time."""

import logging
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from videodit.errors import UserError
from videodit.parallel.mesh import World


class _File(logging.FileHandler):
    """A full disk costs lines of the log, and nothing else."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # of opening
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        pass  # of writing; it would print a traceback for every line

    def close(self) -> None:
        with suppress(OSError):
            super().close()


class RunLog:
    """The log of one run while it is open: rank 0 writes what is told, every rank its warnings and its end.

    Attributes:
        rank: of this process; lines of other ranks than 0 begin with it.
    """

    def __init__(self, handler: logging.Handler, rank: int) -> None:
        self._handler, self.rank = handler, rank

    @classmethod
    @contextmanager
    def open(cls, path: Path, world: World) -> Iterator["RunLog"]:
        """Appends to a file whatever goes through `logging` (from WARNING on) and `warnings` inside, and the end.

        What is shown on the console stays as it is.
        """
        handler = _File(path, delay=True)
        rank = "" if world.is_main else f"rank {world.rank} "
        handler.setFormatter(logging.Formatter(f"%(asctime)s {rank}%(levelname)s %(message)s"))
        log, root, shown = cls(handler, world.rank), logging.getLogger(), warnings.showwarning
        # Python shows warnings of loggers on stderr only as long as nobody handles them.
        handlers = [handler] if root.handlers or logging.lastResort is None else [handler, logging.lastResort]

        def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
            shown(message, category, filename, lineno, file, line)
            if file is None:
                log._write(logging.WARNING, f"{message} ({category.__name__} at {Path(filename).name}:{lineno})")

        for each in handlers:
            root.addHandler(each)
        warnings.showwarning = show
        try:
            yield log
            log.info("done")
        except BaseException as error:
            log._write_end(error)
            raise
        finally:
            if warnings.showwarning is show:
                warnings.showwarning = shown
            for each in handlers:
                root.removeHandler(each)
            handler.close()

    def info(self, text: str) -> None:
        """A line of rank 0."""
        if self.rank == 0:
            self._write(logging.INFO, text)

    def _write_end(self, error: BaseException) -> None:
        if isinstance(error, SystemExit):
            self.info(f"stopped with exit code {error.code}")
        elif isinstance(error, KeyboardInterrupt):
            self.info("interrupted")
        elif isinstance(error, UserError):
            self._write(logging.ERROR, str(error))
        else:
            self._write(logging.ERROR, "".join(traceback.format_exception(error)).rstrip())

    def _write(self, level: int, text: str) -> None:
        self._handler.handle(logging.LogRecord("videodit", level, "", 0, text, None, None))
