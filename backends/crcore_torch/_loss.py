"""The consistency term as a loss module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from crcore import Consistency, CRCoreError
from crcore_torch._xp import xp


class ConsistencyLoss(nn.Module):
    """``lambda(step) * D(student || teacher)``, to be added to the task loss. The gradient reaches the student alone.

    Args:
        consistency: divergence, weight, temperature and threshold.

    Raises:
        CRCoreError: ``consistency`` is not a `crcore.Consistency`; `forward` names what it cannot take.

    >>> import crcore, torch
    >>> loss = ConsistencyLoss(crcore.Consistency(crcore.kl_divergence, weight=0.5))
    >>> student = torch.zeros(4, 2, requires_grad=True)
    >>> loss(student, torch.tensor([[100.0, -100.0]]).expand(4, 2), step=0)  # 0.5 * log(2)
    tensor(0.3466, grad_fn=<MulBackward0>)
    """

    def __init__(self, consistency: Consistency) -> None:
        super().__init__()
        if not isinstance(consistency, Consistency):
            raise CRCoreError(
                f"ConsistencyLoss takes a crcore.Consistency, got {consistency!r}; for plain QAT leave the term out, "
                "else give Recipe(consistency=Consistency(...))"
            )
        self.consistency = consistency

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        *,
        step: int | Tensor,
        axis: int = -1,
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """The weighted term, 0-d, in float32 (float64 for float64 logits).

        Args:
            student: logits of the student on one view, of any rank.
            teacher: logits of the teacher on the other view, of the same shape.
            step: optimizer steps made so far, ``teacher.step``. A 0-d tensor keeps a compiled training step from being
                compiled again as lambda moves.
            axis: the class axis; 1 for ``[N, C, H, W]``.
            sample_weight: ``[N]``, or one per prediction.

        Raises:
            CRCoreError: not tensors, shapes that differ, the teacher's logits given as the student's, or swapped.
        """
        _check(student, teacher)
        dtype = torch.float64 if student.dtype == torch.float64 else torch.float32
        traced = isinstance(step, Tensor)
        weight = self.consistency.weight_at(step.float(), xp=xp) if traced else self.consistency.weight_at(step)  # type: ignore[union-attr]
        if not isinstance(weight, Tensor):
            weight = float(weight)
            if weight == 0.0:  # plain QAT, to the bit: no graph, and no 0 * inf
                return student.new_zeros((), dtype=dtype)
        distance = self.consistency.distance(
            student.to(dtype),
            teacher.detach().to(dtype),
            axis=axis,
            sample_weight=None if sample_weight is None else sample_weight.to(dtype),
            xp=xp,
        )
        return weight * distance

    def extra_repr(self) -> str:
        """The objective."""
        return repr(self.consistency)


def _check(student: Any, teacher: Any) -> None:
    for name, logits in (("student", student), ("teacher", teacher)):
        if not isinstance(logits, Tensor):
            raise CRCoreError(
                f"{name} must be a tensor of logits, got {type(logits).__name__}; pick the logits out of the model's "
                "output, for example output.logits"
            )
    if tuple(student.shape) != tuple(teacher.shape):
        # The core says so too, but not while lambda is zero.
        raise CRCoreError(
            f"student and teacher logits must have one shape, got {tuple(student.shape)} and {tuple(teacher.shape)}; "
            "give both networks views of the same batch"
        )
    if student is teacher or _same_memory(student, teacher):
        raise CRCoreError(
            "student and teacher are the same tensor, so that the term is zero for ever; "
            "give student(augment(x)) and teacher(augment(x))"
        )
    if torch.is_grad_enabled() and teacher.requires_grad and not student.requires_grad:
        raise CRCoreError(
            "the gradient must reach the student, but only the second argument has one; swap the arguments"
        )


def _same_memory(student: Tensor, teacher: Tensor) -> bool:
    """Whether one is a detached copy of the other; not asked where a compiler traces, which has no memory yet."""
    return not torch.compiler.is_compiling() and student.dtype == teacher.dtype and student.is_set_to(teacher)
