"""Files that a reader never sees half of: written under a temporary name, then put in place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def put_in_place(path: Path, *, ending: str = "") -> Iterator[Path]:
    """A temporary path to write to, which becomes `path` where the block ends without an error.

    `ending` is appended to the temporary name, for writers that insist on one.
    """
    temporary = path.with_name(f"{path.name}.tmp{ending}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner reads
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # what a full disk left of it


def write_text(path: Path, text: str) -> None:
    """Write a text file."""
    with put_in_place(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
