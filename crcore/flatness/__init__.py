"""How flat the loss is around trained weights, and how sensitive a network is to noise on its weights and inputs.

The instruments work on a `LossLandscape`, which a backend makes of a network: ``crcore_torch.Landscape``,
``crcore_keras.Landscape``. They need SciPy; nothing else in crcore does.

>>> import numpy as np
>>> from types import SimpleNamespace
>>> curvature = np.array([4.0, 3.0, 1.0, 0.0, -2.0])
>>> bowl = SimpleNamespace(size=5, hvp=lambda vector: curvature * vector)
>>> top_eigenvalues(bowl, k=2).round(6).tolist()
[4.0, 3.0]
>>> trace(bowl, probes=10).mean
6.0
"""

from crcore import CRCoreError

try:
    import scipy as scipy
except ModuleNotFoundError as error:
    raise CRCoreError(
        f"crcore.flatness needs the package {error.name!r}; install it with: pip install 'crcore[flatness]'"
    ) from error

from crcore.flatness._corruptions import CORRUPTIONS as CORRUPTIONS
from crcore.flatness._corruptions import corrupt as corrupt
from crcore.flatness._estimate import Estimate as Estimate
from crcore.flatness._landscape import Hessian as Hessian
from crcore.flatness._landscape import LossLandscape as LossLandscape
from crcore.flatness._sensitivity import Curve as Curve
from crcore.flatness._sensitivity import corruption_sensitivity as corruption_sensitivity
from crcore.flatness._sensitivity import noise_sensitivity as noise_sensitivity
from crcore.flatness._sensitivity import weight_sensitivity as weight_sensitivity
from crcore.flatness._sharpness import Sharpness as Sharpness
from crcore.flatness._sharpness import sharpness as sharpness
from crcore.flatness._spectrum import SpectralDensity as SpectralDensity
from crcore.flatness._spectrum import spectral_density as spectral_density
from crcore.flatness._spectrum import top_eigenvalues as top_eigenvalues
from crcore.flatness._spectrum import trace as trace

__all__ = [
    "CORRUPTIONS",
    "Curve",
    "Estimate",
    "Hessian",
    "LossLandscape",
    "Sharpness",
    "SpectralDensity",
    "corrupt",
    "corruption_sensitivity",
    "noise_sensitivity",
    "sharpness",
    "spectral_density",
    "top_eigenvalues",
    "trace",
    "weight_sensitivity",
]
