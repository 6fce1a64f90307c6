"""`ConsistencyCallback`: what ``fit`` evaluates, and the last update of the average."""

from __future__ import annotations

from typing import Any

import keras

from crcore import CRCoreError
from crcore_keras._consistency_model import ConsistencyModel, Network


class ConsistencyCallback(keras.callbacks.Callback):
    """Evaluate the teacher during ``fit`` and let the average include the last step when it ends.

    ``History`` and the progress bar show ``task_loss``, ``consistency_loss``, ``lambda`` and ``decay`` (of the last
    step) for every `ConsistencyModel`. With ``validation_data``, this callback adds the teacher's metrics, as
    ``val_teacher_loss`` and so on, for `ModelCheckpoint` and `EarlyStopping` to monitor, wherever they stand in the
    list of callbacks.

    Args:
        evaluate: "student" gives ``val_*``, "teacher" gives ``val_teacher_*``, "both" gives both.

    Raises:
        CRCoreError: another value of ``evaluate``; in ``fit``, a model that is no `ConsistencyModel` or has no average.
    """

    def __init__(self, evaluate: Network = "teacher") -> None:
        super().__init__()
        if evaluate not in ("teacher", "student", "both"):
            raise CRCoreError(f'evaluate must be "teacher", "student" or "both", got {evaluate!r}')
        self.evaluate = evaluate

    def on_train_begin(self, logs: Any = None) -> None:
        """Called by Keras."""
        if not isinstance(self.model, ConsistencyModel):
            raise CRCoreError(f"ConsistencyCallback goes with a ConsistencyModel, got {type(self.model).__name__}")
        if self.evaluate != "student" and not self.model.has_average:
            raise CRCoreError(
                'the model has no average to evaluate; give Recipe(ema=EMA(...)), or ConsistencyCallback("student")'
            )
        self.model.validates = self.evaluate

    def on_train_end(self, logs: Any = None) -> None:
        """Called by Keras."""
        self.model.validates = "student"
        self.model.update_teacher()
