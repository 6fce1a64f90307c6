"""What is seen while training: a live bar on a terminal, one line for each epoch elsewhere."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Shows where a list of runs stands; used as a context manager."""

    def __init__(self, console: Console, total_steps: int) -> None:
        """`total_steps` counts the optimizer steps of all runs."""
        self.console = console
        self.title = ""
        self._steps = 0
        self._accuracy = ""
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeRemainingColumn(),
            TextColumn("left  {task.fields[state]}"),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._all = self._bar.add_task("all runs", total=total_steps, state="")
        self._run = self._bar.add_task("", total=None, state="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, steps: int, *, done: int) -> None:
        """A run of `steps` optimizer steps begins, or continues after `done` of them."""
        self._steps, self._accuracy = steps, ""
        self._bar.reset(self._run, total=steps, completed=done, description=self.title, state="")
        self._bar.advance(self._all, done)
        if done:
            self.console.print(f"{self.title}: continues after step {done} of {steps}", highlight=False)

    def skip(self, steps: int) -> None:
        """A run that was finished earlier."""
        self._bar.advance(self._all, steps)
        self.console.print(f"{self.title}: finished earlier", highlight=False)

    def advance(self) -> None:
        """One step, without a look at its losses."""
        self._bar.advance(self._run)
        self._bar.advance(self._all)

    def step(
        self, epoch: int, step: int, task: float, consistency: float, weight: float | None, decay: float | None
    ) -> None:
        """One step, with its losses."""
        parts = _parts({"task": task, "consistency": consistency, "weight": weight, "decay": decay})
        self._bar.update(self._run, state=f"epoch {epoch}  {parts}  {self._accuracy}")
        self.advance()

    def epoch(self, entry: Mapping[str, Any], epochs: int) -> None:
        """An epoch is over."""
        accuracy = [] if entry["accuracy"] is None else [f"accuracy {entry['accuracy']:.2f} %"]
        if entry["teacher_accuracy"] is not None:
            accuracy.append(f"teacher {entry['teacher_accuracy']:.2f} %")
        self._accuracy = "  ".join(accuracy) or self._accuracy
        self._bar.update(self._run, state=f"epoch {entry['epoch']}  {_parts(entry)}  {self._accuracy}")
        if not self.console.is_terminal:
            words = [f"{self.title}: epoch {entry['epoch']}/{epochs}", f"step {entry['step']}/{self._steps}"]
            line = "  ".join([*words, _parts(entry), *accuracy])
            self.console.print(line, highlight=False, soft_wrap=True)


def _parts(entry: Mapping[str, Any]) -> str:
    parts = [f"task {entry['task']:.4f}"]
    if entry["weight"] is not None:
        parts.append(f"consistency {entry['consistency']:.4f}  lambda {entry['weight']:.3f}")
    if entry["decay"] is not None:
        parts.append(f"decay {entry['decay']:.4f}")
    return "  ".join(parts)
