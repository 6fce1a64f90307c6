"""`load_model`: Keras' own, with errors that say what is wrong with the file."""

from __future__ import annotations

import os
import zipfile
from typing import Any

import keras

from crcore import CRCoreError


def load_model(path: str | os.PathLike[str], **options: Any) -> Any:
    """`keras.saving.load_model`, which works as well, for files that may be damaged.

    Args:
        path: a ``.keras`` file.
        options: as there.

    Raises:
        CRCoreError: there is no such file, it is cut short or damaged, or it was written by another version of crcore.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise CRCoreError(f"there is no file {path!r}; give the path that model.save(...) was given")
    damaged: str | None = "its end is missing, or it is no .keras file"
    try:
        with zipfile.ZipFile(path) as archive:
            first = archive.testzip()
            damaged = first and f"{first!r} in it is damaged"
            if damaged is None and "config.json" not in archive.namelist():
                damaged = "it holds no model"
    except (zipfile.BadZipFile, OSError):
        pass
    if damaged:
        raise CRCoreError(f"{path!r} cannot be loaded: {damaged}; save it again with model.save(...), or copy it again")
    return keras.saving.load_model(path, **options)
