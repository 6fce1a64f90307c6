"""What the numbers show, in words: never more than the interval allows. And the line that repeats a run."""

import shlex
from collections.abc import Sequence
from typing import Any

from crcore.cli._arguments import build_parser
from crcore.cli._report import Gain, Row


def verdict(rows: Sequence[Row]) -> list[str]:
    """One sentence for each quantized method, and for its average, beside plain QAT."""
    found = []
    for row in rows:
        # The student of qat+ema is that of qat, and the float network is no method of quantization.
        if row.student_gain is not None and row.method not in ("fp32", "qat+ema"):
            found.append(f"{row.method} {in_words(row.student_gain)}")
        if row.teacher_gain is not None:
            found.append(f"The average of {row.method} {in_words(row.teacher_gain)}")
    return found or ["Nothing to compare: a gain is a difference to qat, and needs both qat and another method."]


def in_words(gain: Gain) -> str:
    """The predicate of a sentence about a gain over qat.

    >>> in_words(Gain(-0.1, 0.5))
    'is 0.10 points below qat, 95 % interval -0.60 to +0.40: no difference shown.'
    """
    sign = "above" if gain.mean > 0 else "below"
    where = f"is {abs(gain.mean):.2f} points {sign} qat" if round(gain.mean, 2) else "is level with qat"
    if gain.half is None:
        return f"{where} with one seed, which gives no interval: this may be chance."
    lowest, highest = gain.mean - gain.half, gain.mean + gain.half
    interval = f"{where}, 95 % interval {lowest:+.2f} to {highest:+.2f}"
    if gain.half < 5e-3:  # a few test images more or less, by chance the same number for each seed
        return f"{where}, by the same amount with every seed: too few seeds or test images for an interval."
    if lowest > 0:
        return f"{interval}: a gain."
    if highest < 0:
        return f"{interval}: a loss."
    return f"{interval}: no difference shown."


def command_line(command: str, settings: dict[str, Any], *, engine: str | None) -> str:
    """The command, "compare", "sweep" or "train", that gives these settings; options at their default are left out.

    Args:
        settings: as `Settings.to_dict` gives them; what is not among them has its default.
        engine: of Keras, where a run takes part whose backend is Keras.

    >>> command_line("compare", {"seeds": [0, 1], "methods": ["qat"], "data": "my images"}, engine=None)
    "crcore compare --data 'my images' --methods qat --seeds 2"
    """
    # A sweep cannot be parsed without its axes, and has the options of a comparison.
    defaults = vars(build_parser("").parse_args(["train" if command == "train" else "compare"]))
    given = dict(settings)
    seeds, methods = tuple(given.pop("seeds")), given.pop("methods", ())
    if command == "train":
        given |= {"seed": seeds[0], "method": methods[0]}
    else:
        if seeds != defaults["seeds"]:
            given["seeds"] = f"{seeds[0]}-{seeds[-1]}" if seeds[0] else len(seeds)
        if methods:
            given["methods"] = ",".join(methods)
    given |= {name: "all" for name in ("labels", "unlabeled") if given.get(name) == 0}
    if given.get("float_epochs") == given.get("epochs"):
        given.pop("float_epochs", None)
    words = ["crcore", command]
    for name, default in defaults.items():
        value = given.get(name, default)
        if name == "flip" and value is not None:
            words.append("--flip" if value else "--no-flip")
        elif name == "amp" and value:
            words.append("--amp")
        elif value != default and not isinstance(value, bool):
            words += [f"--{name.replace('_', '-')}", str(value)]
    environment = "" if engine is None else f"KERAS_BACKEND={shlex.quote(engine)} "
    return environment + shlex.join(words)
