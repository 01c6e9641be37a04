"""Writing files so that an interruption or a full disk leaves what was there before."""

import contextlib
import os
from pathlib import Path

from pnem.errors import RunError

__all__ = ["check_new", "write_atomically"]


def check_new(path: Path) -> None:
    """Raises `RunError` if there is something at `path`, or nothing can be made there: to be known before a long job.

    Folders on the way to it may be missing.
    """
    if path.exists():
        raise RunError(f"{path} exists already: choose another name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise RunError(f"cannot write {path}: {folder} is not a folder that can be written to")


def write_atomically(path: Path, content: bytes) -> None:
    """Writes beside `path`, then puts the new file in its place.

    Raises:
        RunError: the file cannot be written; what was at `path` is intact.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # Where a folder on the way is a file, there is nothing to take away.
        with contextlib.suppress(NotADirectoryError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"cannot write {path}: {error.strerror or error}; what was there before is unchanged") from error
