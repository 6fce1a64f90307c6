"""What the scripts here have in common."""

from __future__ import annotations

import argparse
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path


def names_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A type for argparse: some of the known names, separated by commas."""

    def names(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(known)}")
        return found

    return names


def progress(text: str) -> None:
    """A line on the screen."""
    print(text, file=sys.stderr, flush=True)


def processor() -> str:
    """The processor's own name where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def rewrite(pages: Sequence[Path], updated: Callable[[str], str], description: str | None) -> None:
    """The command line of a script that makes parts of pages anew: rewrite them, or check them."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; status 1 if a part is another")
    given = parser.parse_args()
    for page in pages:
        old = page.read_text(encoding="utf-8")
        new = updated(old)
        if given.check and old != new:
            sys.exit(f"{page} is not what the results give; run: python {sys.argv[0]}")
        page.write_text(new, encoding="utf-8")
