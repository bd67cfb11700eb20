"""Which files a folder holds, as one hash."""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from videodit.errors import user_error

VAE_FILES = ("config.json", "*.safetensors")


def files_fingerprint(folder: str | Path, patterns: Sequence[str], beat: Callable[[], None] = lambda: None) -> str:
    """A sha256 over names, sizes and contents of a folder's files.

    Args:
        folder: where they lie; files that are not there do not count.
        patterns: which of them, as `Path.glob` takes them.
        beat: called now and then.
    Raises:
        UserError: if one cannot be read.
    """
    digest = hashlib.sha256()
    for path in sorted({path for pattern in patterns for path in Path(folder).glob(pattern) if path.is_file()}):
        try:
            digest.update(f"{path.name}\n{path.stat().st_size}\n".encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 22):
                    digest.update(chunk)
                    beat()
        except OSError as error:
            raise user_error(error, path) from None
    return digest.hexdigest()
