"""From the command's settings to the library's `Recipe`."""

from dataclasses import replace

import crcore as cr
from crcore.cli._errors import CommandError
from crcore.cli._methods import Method
from crcore.cli._settings import QUANTIZERS, Settings


def default_decay(steps: int) -> float:
    """An averaging window of about a twentieth of the run, between 10 and 1000 optimizer steps.

    >>> default_decay(2_000)
    0.99
    """
    return round(1 - 1 / min(max(steps / 20, 10), 1_000), 6)


def quantizers(name: str, weight_bits: int, activation_bits: int) -> tuple[cr.Quantizer, cr.Quantizer]:
    """The quantizers of weights and of activations behind a `--quantizer` name."""
    match name:
        case "lsq":
            return cr.LSQ(bits=weight_bits, per_channel=True), cr.LSQ(bits=activation_bits)
        case "lsq+":
            return cr.LSQ(bits=weight_bits, per_channel=True), cr.LSQPlus(bits=activation_bits)
        case "pact":
            # PACT (Choi et al., 2018) clips activations only; its experiments take DoReFa's weights.
            return cr.DoReFa(bits=weight_bits), cr.PACT(bits=activation_bits)
        case "dorefa":
            return cr.DoReFa(bits=weight_bits), cr.DoReFa(bits=activation_bits)
        case _:
            return cr.MinMax(bits=weight_bits, per_channel=True), cr.MinMax(bits=activation_bits)


def quantizer_name(recipe: cr.Recipe) -> str:
    """The `--quantizer` name that gives the quantizers of a recipe, at the recipe's bits."""
    bits = [quantizer.bits for quantizer in (recipe.weights, recipe.activations) if quantizer is not None]
    found = (name for name in QUANTIZERS if cr.Recipe(*quantizers(name, *bits)) == quantization_of(recipe))
    name = next(found, None)
    if name is None:
        raise CommandError(
            f"the checkpoint's recipe is none of --quantizer {', '.join(QUANTIZERS)}; leave the option out"
        )
    return name


def _weight(settings: Settings, *, steps: int) -> cr.Schedule:
    """lambda over the optimizer steps of a run."""
    peak, rise = settings.consistency_weight, max(round(settings.ramp * steps), 1)
    match settings.ramp_shape:
        case "sigmoid":
            return cr.sigmoid_ramp(peak, steps=rise)
        case "linear":
            return cr.linear_ramp(peak, steps=rise)
        case "cosine":
            return cr.cosine_ramp(peak, steps=rise)
        case _:
            return cr.constant(peak)


def quantization_of(recipe: cr.Recipe) -> cr.Recipe:
    """What is quantized how, without how it is trained."""
    return replace(recipe, consistency=None, ema=None, dampening=None, freezing=None)


def build_recipe(settings: Settings, method: Method, *, steps: int) -> cr.Recipe:
    """The recipe of one QAT method that trains for `steps` optimizer steps."""
    decay = default_decay(steps) if settings.ema_decay is None else settings.ema_decay
    consistency = None
    if method.consistency:
        consistency = cr.Consistency(
            cr.kl_divergence,
            weight=_weight(settings, steps=steps),
            temperature=settings.temperature,
            threshold=settings.threshold,
        )
    elif method.distillation:
        consistency = cr.Consistency(cr.kl_divergence, weight=settings.kd_weight, temperature=settings.kd_temperature)
    weights, activations = quantizers(settings.quantizer, settings.weight_bits, settings.activation_bits)
    return cr.Recipe(
        weights=weights,
        activations=activations,
        consistency=consistency,
        ema=cr.EMA(decay=decay, warmup=steps, batchnorm=settings.teacher_batchnorm) if method.average else None,
        dampening=None if settings.dampening is None else cr.Dampening(cr.cosine_ramp(settings.dampening, steps)),
        freezing=None
        if settings.freezing is None
        else cr.Freezing(cr.cosine_ramp(settings.freezing, steps, start=4 * settings.freezing)),
    )
