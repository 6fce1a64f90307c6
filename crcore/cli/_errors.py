"""The error that `crcore.cli.main` prints as one line and turns into exit status 2."""

import crcore as cr


class CommandError(cr.CRCoreError):
    """Something the user can put right; the message says what was given, what is allowed and how to fix it."""


def one_line(error: BaseException, limit: int = 300) -> str:
    """The message of an error of another library, without its line breaks."""
    text = " ".join(str(error).split())
    return text if len(text) <= limit else text[: limit - 3] + "..."
