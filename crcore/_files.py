"""Files that are replaced as a whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from crcore._errors import CRCoreError


@contextmanager
def replaced(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A file beside ``path`` to write to, which takes its place when the block ends without an error.

    So nobody ever reads half of what is written, and what was there before stays until all of the new is there.

    Args:
        path: of the file to replace or to make.

    Yields:
        the path to write to, in the same folder.

    Raises:
        CRCoreError: the block raised it, or whatever else it raised stopped the writing: no such folder, no space left.
    """
    path = as_path(path)
    if not path.name or not path.parent.is_dir():
        raise CRCoreError(f"{path} cannot be written: there is no folder {str(path.parent)!r}; name a file in one")
    if os.path.islink(path):  # it stays one, and what it leads to may lie on another disk
        path = path.resolve()
    temporary = path.parent / f"{path.stem[:100]}.{os.getpid()}.tmp{path.suffix}"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # some writers make files that only their owner reads
        os.replace(temporary, path)
    except CRCoreError:
        raise
    except Exception as error:  # those who write have errors of their own
        raise CRCoreError(f"{path} cannot be written ({cause(error)}); nothing was changed there") from error
    finally:
        with suppress(OSError, ValueError):  # a path that could not be written need not be one that can be removed
            temporary.unlink(missing_ok=True)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path.

    Raises:
        CRCoreError: it is no text and no path.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise CRCoreError(f"a path must be a str or a pathlib.Path, got {type(path).__name__}")
    return Path(path)


def cause(error: Exception) -> str:
    """What an error says, as part of a message of one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
