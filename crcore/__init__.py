"""Quantization-aware training that generalises, by consistency regularization (arXiv 2402.13497).

This package is the method, in NumPy: quantizers with their gradients, schedules, the average, the objective. It imports
no framework; `crcore_torch` binds it to PyTorch.

>>> import crcore as cr
>>> recipe = cr.Recipe(
...     weights=cr.LSQ(bits=4, per_channel=True),
...     activations=cr.LSQ(bits=4),
...     consistency=cr.Consistency(cr.kl_divergence, weight=cr.sigmoid_ramp(1.0, steps=5_000)),
...     ema=cr.EMA(decay=0.999, warmup=2_000),
... )
>>> float(recipe.consistency.weight_at(5_000)), round(float(recipe.ema.decay_at(0)), 3)
(1.0, 0.1)
"""

from crcore._checkpoints import PortableLayer as PortableLayer
from crcore._consistency import Consistency as Consistency
from crcore._divergences import cross_entropy as cross_entropy
from crcore._divergences import js_divergence as js_divergence
from crcore._divergences import kl_divergence as kl_divergence
from crcore._divergences import mse_divergence as mse_divergence
from crcore._ema import EMA as EMA
from crcore._ema import ema_update as ema_update
from crcore._errors import CRCoreError as CRCoreError
from crcore._grid import IntGrid as IntGrid
from crcore._oscillation import Dampening as Dampening
from crcore._oscillation import Freezing as Freezing
from crcore._oscillation import FreezingState as FreezingState
from crcore._oscillation import Oscillation as Oscillation
from crcore._oscillation import OscillationRates as OscillationRates
from crcore._oscillation import oscillation_update as oscillation_update
from crcore._packing import code_dtype as code_dtype
from crcore._packing import code_limits as code_limits
from crcore._portable import PortableCheckpoint as PortableCheckpoint
from crcore._quantized import QuantizedCheckpoint as QuantizedCheckpoint
from crcore._quantizers import LSQ as LSQ
from crcore._quantizers import PACT as PACT
from crcore._quantizers import DoReFa as DoReFa
from crcore._quantizers import LSQPlus as LSQPlus
from crcore._quantizers import MinMax as MinMax
from crcore._recipe import LayerQuantizers as LayerQuantizers
from crcore._recipe import Recipe as Recipe
from crcore._schedules import constant as constant
from crcore._schedules import cosine_ramp as cosine_ramp
from crcore._schedules import linear_ramp as linear_ramp
from crcore._schedules import sigmoid_ramp as sigmoid_ramp
from crcore._typing import Divergence as Divergence
from crcore._typing import Quantizer as Quantizer
from crcore._typing import Schedule as Schedule

__version__ = "0.1.0"

__all__ = [
    "EMA",
    "LSQ",
    "PACT",
    "CRCoreError",
    "Consistency",
    "Dampening",
    "Divergence",
    "DoReFa",
    "Freezing",
    "FreezingState",
    "IntGrid",
    "LSQPlus",
    "LayerQuantizers",
    "MinMax",
    "Oscillation",
    "OscillationRates",
    "PortableCheckpoint",
    "PortableLayer",
    "QuantizedCheckpoint",
    "Quantizer",
    "Recipe",
    "Schedule",
    "code_dtype",
    "code_limits",
    "constant",
    "cosine_ramp",
    "cross_entropy",
    "ema_update",
    "js_divergence",
    "kl_divergence",
    "linear_ramp",
    "mse_divergence",
    "oscillation_update",
    "sigmoid_ramp",
]
