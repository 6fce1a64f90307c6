"""Says how to put it right where Keras finds no engine."""

from __future__ import annotations

import os

from crcore import CRCoreError

ENGINES = ("tensorflow", "jax", "torch")

try:
    import keras as keras
except ModuleNotFoundError as error:
    if error.name == "keras":
        raise
    raise CRCoreError(
        f"Keras runs on an engine that is not installed here ({error}); install it, or choose another one with the "
        f"environment variable KERAS_BACKEND: {', '.join(ENGINES)}"
    ) from error
except ValueError as error:
    raise CRCoreError(
        f"KERAS_BACKEND={os.environ.get('KERAS_BACKEND')!r} is no engine of Keras ({error}); set that environment "
        f"variable to one of {', '.join(ENGINES)}"
    ) from error
