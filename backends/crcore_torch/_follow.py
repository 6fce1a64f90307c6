"""What happens after every optimizer step: the one way in which this backend follows an optimizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crcore import CRCoreError


class Follower(nn.Module):
    """A module that is updated after every step of the optimizer that trains its student.

    The student is not registered as a submodule: it does not become part of this module's parameters and state.
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self._student = [unwrapped(student)]
        self._handles: dict[int, RemovableHandle] = {}

    def update(self) -> None:
        """What is done after a step. `follow` calls it; call it yourself only without an optimizer to follow."""
        raise NotImplementedError

    def follow(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Update after every ``optimizer.step()``; not after a step that a GradScaler skipped.

        Where several optimizers train the student, follow the one that is stepped last: each that is followed makes
        updates of its own.

        Returns:
            a handle whose ``remove()`` ends it.

        Raises:
            CRCoreError: the optimizer trains none of the student's parameters.
        """
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in trained for parameter in self._source().parameters()):
            raise CRCoreError(
                "the optimizer trains none of the student's parameters; build it from student.parameters(), "
                f"with the student that this {type(self).__name__} was made of"
            )
        earlier = self._handles.pop(id(optimizer), None)
        if earlier is not None:  # following twice must not update twice
            earlier.remove()
        handle = optimizer.register_step_post_hook(self._after_step)
        self._handles[id(optimizer)] = handle
        return handle

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        # An optimizer that handles gradient scaling itself is stepped although the scaler found an overflow; it is told
        # so by this attribute. Others are not stepped at all.
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            self.update()

    def _source(self) -> nn.Module:
        if not self._student:
            name = type(self).__name__
            raise CRCoreError(
                f"this {name.lower()} is a copy and follows no student; make a {name}(student) and load its "
                "state_dict there"
            )
        return self._student[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_student": [], "_handles": {}}


def unwrapped(module: nn.Module) -> nn.Module:
    """What is inside torch.compile and data-parallel wrappers."""
    inner = getattr(module, "_orig_mod", None)
    if inner is None and isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = module.module
    return module if inner is None else unwrapped(inner)
