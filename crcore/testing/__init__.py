"""What a backend author imports: the conformance kit, and the hypothesis strategies it is made of.

    class MyAdapter:                        # a dozen lines per method: NumPy in, NumPy out
        name = "mine"
        flushes_denormals = False
        def initial(self, quantizer, x, axes): ...
        def quantize(self, quantizer, x, parameters, cotangent, elements): ...
        ...

    class TestMine(ConformanceSuite):       # pytest collects some 200 parity tests
        adapter = MyAdapter()

Needs hypothesis and pytest, which `import crcore` does not: nothing in crcore imports this package.
"""

from crcore.testing._conformance import Adapter as Adapter
from crcore.testing._conformance import ConformanceSuite as ConformanceSuite
from crcore.testing._references import reference_consistency as reference_consistency
from crcore.testing._references import reference_divergence as reference_divergence
from crcore.testing._strategies import DIVERGENCES as DIVERGENCES
from crcore.testing._strategies import QUANTIZERS as QUANTIZERS
from crcore.testing._strategies import LogitsCase as LogitsCase
from crcore.testing._strategies import QuantizerCase as QuantizerCase
from crcore.testing._strategies import averages as averages
from crcore.testing._strategies import cotangents as cotangents
from crcore.testing._strategies import free_inputs as free_inputs
from crcore.testing._strategies import lattice_inputs as lattice_inputs
from crcore.testing._strategies import logits as logits
from crcore.testing._strategies import quantizers as quantizers
from crcore.testing._strategies import recipes as recipes
from crcore.testing._strategies import schedules as schedules

__all__ = [
    "DIVERGENCES",
    "QUANTIZERS",
    "Adapter",
    "ConformanceSuite",
    "LogitsCase",
    "QuantizerCase",
    "averages",
    "cotangents",
    "free_inputs",
    "lattice_inputs",
    "logits",
    "quantizers",
    "recipes",
    "reference_consistency",
    "reference_divergence",
    "schedules",
]
