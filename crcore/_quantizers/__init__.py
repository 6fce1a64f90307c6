"""The quantizers: each a frozen description with its forward, its explicit gradient and its initialisation from data.

The gradients are written out because frameworks disagree on autodiff exactly at the clip bounds, where quantized
values live: the derivative of ``clip`` at its bound is 1 in torch and TensorFlow and 0.5 in JAX. Here it is 1,
everywhere: **the bounds count as inside**. All quantizers clip to the grid and then round half to even, and divide by
the scale (a product with ``1 / scale`` differs on about 0.1 % of the elements).

``x``, the parameters and the cotangent share one floating dtype; backends hand in float32 (or float64).
"""

from crcore._quantizers._dorefa import DoReFa as DoReFa
from crcore._quantizers._lsq import LSQ as LSQ
from crcore._quantizers._lsq import LSQPlus as LSQPlus
from crcore._quantizers._minmax import MinMax as MinMax
from crcore._quantizers._pact import PACT as PACT
