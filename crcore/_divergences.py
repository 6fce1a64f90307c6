"""How far the student's prediction is from the teacher's, or from labels. Smooth: backends differentiate them.

All take logits of any rank with the classes on ``axis`` and return one value per prediction, the class axis reduced
away. Those of student and teacher are multiplied by ``temperature**2``, so that the gradient keeps its size when the
temperature changes (Hinton et al., 2015, arXiv 1503.02531, section 2). At temperature 1 all are finite for logits of
+-1e4, in float16 too; at others ``logits / temperature`` or the factor may leave float16's range, so backends compute
them in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from crcore._errors import CRCoreError
from crcore._typing import Array


def kl_divergence(student: Array, teacher: Array, *, axis: int = -1, temperature: float = 1.0, xp: Any = np) -> Array:
    """Kullback-Leibler divergence ``KL(teacher || student) = sum_c p_c (log p_c - log q_c)``.

    ``p = softmax(teacher / temperature)``, ``q = softmax(student / temperature)``; times ``temperature**2``. In nats.

    Args:
        student, teacher: logits of the same shape and dtype, classes on ``axis``.
        axis: the class axis: -1 or the last in Keras, 1 for dense prediction in PyTorch (``[N, C, H, W]``).
        temperature: > 0.
        xp: the array namespace.

    Returns:
        the shape of the logits without ``axis``; at least 0 but for rounding.

    Raises:
        CRCoreError: the shapes differ.

    >>> import numpy as np
    >>> float(kl_divergence(np.array([0.0, 0.0]), np.array([1e4, -1e4])))  # log(2)
    0.6931471805599453
    """
    log_q, log_p = _log_probabilities(student, teacher, axis, temperature, xp)
    return temperature**2 * xp.sum(xp.exp(log_p) * (log_p - log_q), axis=axis)


def js_divergence(student: Array, teacher: Array, *, axis: int = -1, temperature: float = 1.0, xp: Any = np) -> Array:
    """Jensen-Shannon divergence ``(KL(p || m) + KL(q || m)) / 2`` with ``m = (p + q) / 2``.

    Symmetric and at most ``log 2`` (times ``temperature**2``). Arguments, result and errors as in `kl_divergence`.

    >>> import numpy as np
    >>> float(js_divergence(np.array([-1e4, 1e4]), np.array([1e4, -1e4])))  # log(2)
    0.6931471805599453
    """
    log_q, log_p = _log_probabilities(student, teacher, axis, temperature, xp)
    log_m = xp.logaddexp(log_p, log_q) - math.log(2.0)
    halves = xp.exp(log_p) * (log_p - log_m) + xp.exp(log_q) * (log_q - log_m)
    return temperature**2 * 0.5 * xp.sum(halves, axis=axis)


def mse_divergence(student: Array, teacher: Array, *, axis: int = -1, temperature: float = 1.0, xp: Any = np) -> Array:
    """Mean squared error of the probabilities, ``mean_c (p_c - q_c)**2``, the measure of Mean Teacher.

    Mean Teacher: Tarvainen & Valpola, 2017, arXiv 1703.01780, section 3. Arguments, result and errors as in
    `kl_divergence`.

    >>> import numpy as np
    >>> float(mse_divergence(np.array([-1e4, 1e4]), np.array([1e4, -1e4])))
    1.0
    """
    log_q, log_p = _log_probabilities(student, teacher, axis, temperature, xp)
    difference = xp.exp(log_p) - xp.exp(log_q)
    return temperature**2 * xp.mean(difference * difference, axis=axis)


def cross_entropy(logits: Array, targets: Array, *, axis: int = -1, xp: Any = np) -> Array:
    """Cross entropy of a classifier, ``-sum_c targets_c log softmax(logits)_c``, in nats: the usual task loss.

    Args:
        logits: classes on ``axis``.
        targets: probabilities of the same shape and dtype; one-hot for a label.
        axis: the class axis.
        xp: the array namespace.

    Returns:
        the shape of the logits without ``axis``.

    Raises:
        CRCoreError: the shapes differ.

    >>> import numpy as np
    >>> float(cross_entropy(np.array([3.0, 3.0]), np.array([1.0, 0.0])))  # log(2)
    0.6931471805599453
    """
    if not same_shape(logits.shape, targets.shape):
        raise CRCoreError(
            f"targets must have the logits' shape, got {tuple(targets.shape)} for {tuple(logits.shape)}; give labels "
            "one-hot"
        )
    return -xp.sum(targets * _log_softmax(logits, axis, xp), axis=axis)


def confidence(logits: Array, *, axis: int = -1, xp: Any = np) -> Array:
    """The largest probability of each prediction, at temperature 1; the shape of the logits without ``axis``."""
    return xp.exp(xp.amax(_log_softmax(logits, axis, xp), axis=axis))


def same_shape(one: Any, other: Any) -> bool:
    """Whether two shapes are equal; a size that a traced tensor does not know (None) equals any."""
    one, other = tuple(one), tuple(other)
    return len(one) == len(other) and all(
        None in sizes or sizes[0] == sizes[1] for sizes in zip(one, other, strict=True)
    )


def _log_probabilities(student: Array, teacher: Array, axis: int, temperature: float, xp: Any) -> tuple[Array, Array]:
    if not same_shape(student.shape, teacher.shape):
        raise CRCoreError(
            f"student and teacher logits must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "give both networks views of the same batch"
        )
    return _log_softmax(student / temperature, axis, xp), _log_softmax(teacher / temperature, axis, xp)


def _log_softmax(logits: Array, axis: int, xp: Any) -> Array:
    shifted = logits - xp.amax(logits, axis=axis, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=axis, keepdims=True))
