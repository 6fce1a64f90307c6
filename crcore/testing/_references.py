"""Closed forms in float64, written apart from the core: what a backend's autograd must arrive at."""

from __future__ import annotations

from typing import Any

import numpy as np

from crcore import Consistency, js_divergence, kl_divergence, mse_divergence


def reference_divergence(
    function: Any, student: Any, teacher: Any, cotangent: Any, *, axis: int = -1, temperature: float = 1.0
) -> tuple[Any, Any]:
    """``(values, dstudent)`` of one of crcore's divergences, where ``cotangent = dL/dvalues``.

    With ``p = softmax(teacher / T)`` and ``q = softmax(student / T)``, the gradients with respect to ``student`` are

        KL    T * (q - p)
        JS    T * q * (g - sum_c q_c g_c),   g = log(q / m) / 2,  m = (p + q) / 2
        MSE   T * q * (g - sum_c q_c g_c),   g = 2 * (q - p) / C
    """
    log_p = log_softmax(np.asarray(teacher, np.float64) / temperature, axis)
    log_q = log_softmax(np.asarray(student, np.float64) / temperature, axis)
    p, q = np.exp(log_p), np.exp(log_q)
    upstream = np.expand_dims(np.asarray(cotangent, np.float64), axis)
    if function is kl_divergence:
        values = np.sum(p * (log_p - log_q), axis=axis)
        return temperature**2 * values, temperature * (q - p) * upstream
    if function is js_divergence:
        log_m = np.logaddexp(log_p, log_q) - np.log(2.0)
        values = 0.5 * np.sum(p * (log_p - log_m) + q * (log_q - log_m), axis=axis)
        g = 0.5 * (log_q - log_m)
    elif function is mse_divergence:
        values = np.mean((p - q) ** 2, axis=axis)
        g = 2.0 * (q - p) / q.shape[axis]
    else:
        raise ValueError(f"no closed form is written for {function!r}")
    slope = q * (g - np.sum(q * g, axis=axis, keepdims=True))
    return temperature**2 * values, temperature * slope * upstream


def reference_consistency(
    consistency: Consistency, student: Any, teacher: Any, *, step: int, axis: int = -1, sample_weight: Any = None
) -> tuple[Any, Any]:
    """``(loss, dstudent)`` of the consistency objective: one mean over predictions, masked ones counted."""
    factors = np.ones(np.max(teacher, axis=axis).shape)
    if consistency.threshold is not None:
        factors = factors * (confidences(teacher, axis) >= consistency.threshold)
    if sample_weight is not None:
        weight = np.asarray(sample_weight, np.float64)
        if weight.ndim == 1:
            weight = weight.reshape(-1, *[1] * (factors.ndim - 1))
        factors = factors * weight
    factors = factors * float(consistency.weight_at(step)) / factors.size
    values, dstudent = reference_divergence(
        consistency.divergence, student, teacher, factors, axis=axis, temperature=consistency.temperature
    )
    return np.sum(values * factors), dstudent


def confidences(logits: Any, axis: int) -> Any:
    """The largest probability of each prediction."""
    return np.exp(np.max(log_softmax(np.asarray(logits, np.float64), axis), axis=axis))


def log_softmax(logits: Any, axis: int) -> Any:
    """In float64."""
    shifted = logits - np.max(logits, axis=axis, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=axis, keepdims=True))
