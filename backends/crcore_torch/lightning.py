"""Lightning: the teacher follows the student inside ``Trainer.fit``. The one file that imports lightning.

class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.student = crt.prepare(net, recipe)
        self.teacher = crt.Teacher(self.student, recipe.ema)     # a submodule: checkpoints carry it, its step included
        self.consistency = crt.ConsistencyLoss(recipe.consistency)

    def training_step(self, batch, index):
        x, y = batch
        logits, target = self.student(augment(x)), self.teacher(augment(x))
        return F.cross_entropy(logits, y) + self.consistency(logits, target, step=self.teacher.step)

L.Trainer(callbacks=[TeacherCallback()], num_sanity_val_steps=0).fit(Classifier(), loader)
"""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.utils.hooks import RemovableHandle

from crcore import CRCoreError
from crcore_torch._fake_quantize import FakeQuantize
from crcore_torch._teacher import Teacher


class TeacherCallback(Callback):
    """Makes the module's `Teacher` follow the optimizer that trains its student, for the length of a fit.

    One update per optimizer step: not per micro-batch (``accumulate_grad_batches``), and none for a step that AMP's
    GradScaler skipped. Where several optimizers train the student (weights and scales apart), a step is complete when
    the last of them, in the order of ``configure_optimizers``, has been stepped; the teacher follows that one.

    Resuming with ``fit(..., ckpt_path=...)`` continues where the checkpoint was written: the teacher, its step and the
    student's scales are part of it. Logs ``<teacher>_decay``, the decay of the next update.

    Args:
        teacher: name of the attribute that holds the `Teacher`, dotted if it is further inside.

    Raises:
        CRCoreError: when the fit starts: there is no such attribute, it is not a `Teacher`, no optimizer trains its
            student; or the sanity check would evaluate a student that has not seen data yet.
    """

    def __init__(self, teacher: str = "teacher") -> None:
        super().__init__()
        self.teacher = teacher
        self._handle: RemovableHandle | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look for the teacher before anything is trained."""
        if stage == "fit":
            self._teacher_of(pl_module)

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how to go on where validation comes before the first training batch."""
        averages = set(self._teacher_of(pl_module).modules())  # these adopt the student's scales when they are called
        quantizers = [module for module in pl_module.modules() if isinstance(module, FakeQuantize)]
        if not all(quantizer.initialized for quantizer in quantizers if quantizer not in averages):
            raise CRCoreError(
                "the sanity check evaluates a student whose activation scales wait for the first training batch; "
                "use Trainer(num_sanity_val_steps=0), or run a batch through the student in train mode before fit"
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow; by now a checkpoint has been restored."""
        teacher = self._teacher_of(pl_module)
        problem: CRCoreError | None = None
        for optimizer in reversed(trainer.optimizers):
            try:
                self._handle = teacher.follow(optimizer)
            except CRCoreError as error:  # trains something else, such as a discriminator
                problem = error
            else:
                return
        raise problem or CRCoreError("TeacherCallback needs an optimizer; return one from configure_optimizers")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Log the decay of the next update."""
        pl_module.log(f"{self.teacher}_decay", self._teacher_of(pl_module).decay)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop following."""
        self._remove()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop following."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _teacher_of(self, pl_module: LightningModule) -> Teacher:
        found: Any = pl_module
        for part in self.teacher.split("."):
            found = getattr(found, part, None)
        if not isinstance(found, Teacher):
            given = "nothing" if found is None else f"a {type(found).__name__}"
            raise CRCoreError(
                f"TeacherCallback({self.teacher!r}) found {given} at {type(pl_module).__name__}.{self.teacher}; write "
                f"self.{self.teacher} = crcore_torch.Teacher(self.student, recipe.ema) in its __init__"
            )
        return found
