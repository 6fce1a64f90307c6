"""The methods that are compared, and in what they differ. Everything else is common to all of them."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from crcore.cli._errors import CommandError

if TYPE_CHECKING:
    from crcore.cli._settings import Settings

# Settings that only some methods read, by the trait of those that do. Every other setting decides every run.
READ_BY = {
    "quantized": (
        "quantizer",
        "weight_bits",
        "activation_bits",
        "epochs",
        "lr",
        "dampening",
        "freezing",
        "reestimate_batchnorm",
    ),
    "average": ("ema_decay", "teacher_batchnorm"),
    "distillation": ("kd_weight", "kd_temperature"),
    "consistency": ("consistency_weight", "ramp", "ramp_shape", "temperature", "threshold", "teacher_view"),
    "unlabeled": ("unlabeled",),
}
READ_BY_NONE = ("methods", "seeds", "evaluate_every")  # which runs there are, and when they are looked at


@dataclass(frozen=True)
class Method:
    """One row of the comparison."""

    name: str
    summary: str
    quantized: bool = True
    average: bool = False  # an exponential moving average (EMA) of the student follows the optimizer
    distillation: bool = False  # a frozen float teacher is matched, on the student's own view
    consistency: bool = False  # the average is matched, on a second view
    unlabeled: bool = False  # images without a label take part in the consistency term

    def deciding(self, settings: "Settings") -> dict[str, Any]:
        """The settings that decide a run of this method: runs that agree in them, and in the seed, are the same run."""
        unread = {name for trait, names in READ_BY.items() if not getattr(self, trait) for name in names}
        if settings.consistency_weight == 0:  # zero at every step, whatever its way there
            unread |= {"ramp", "ramp_shape"}
        elif settings.ramp_shape == "constant":
            unread.add("ramp")
        return {
            field.name: getattr(settings, field.name)
            for field in fields(settings)
            if field.name not in unread and field.name not in READ_BY_NONE
        }


METHODS = {
    method.name: method
    for method in (
        Method("fp32", "the float network that every QAT method starts from; task loss only", quantized=False),
        Method("qat", "plain quantization-aware training: task loss only"),
        Method("qat+ema", "qat, and an average of its weights is evaluated; its student is qat's", average=True),
        Method("qat+kd", "qat plus KL to the frozen float network on the same view", distillation=True),
        Method("qat+cr", "qat plus KL to the averaged student on a second view", average=True, consistency=True),
        Method(
            "qat+cr+unlabeled",
            "qat+cr, with a batch of unlabeled images joining the consistency term in each step",
            average=True,
            consistency=True,
            unlabeled=True,
        ),
    )
}


def parse_methods(text: str) -> tuple[str, ...]:
    """Split a comma-separated list of methods.

    >>> parse_methods("fp32,qat+cr")
    ('fp32', 'qat+cr')
    """
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise CommandError(f"no method given; choose from {', '.join(METHODS)}")
    for name in names:
        if name not in METHODS:
            raise CommandError(f"unknown method {name!r}; choose from {', '.join(METHODS)}, separated by commas")
    if len(set(names)) < len(names):
        raise CommandError(f"a method is given twice in {text!r}; name each once")
    return names
