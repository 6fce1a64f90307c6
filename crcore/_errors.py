"""The one exception type that crcore raises on purpose."""


class CRCoreError(ValueError):
    """Something the caller gave cannot be used.

    The message names what was given, what is allowed and how to fix it. It is a ``ValueError``, so that code which
    does not know crcore catches it as what it is.
    """
