"""The spectrum of the Hessian from its products with vectors: largest eigenvalues, trace, density."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh

from crcore import CRCoreError
from crcore.flatness._estimate import Estimate, estimate
from crcore.flatness._landscape import Hessian, Progress, check_count, counted

Product = Callable[[NDArray[Any]], NDArray[np.float64]]

_NORM_STEPS = 8  # of Lanczos, after which its largest Ritz value is the norm but for some percent


def top_eigenvalues(
    hessian: Hessian,
    k: int = 50,
    *,
    by: Literal["value", "magnitude"] = "value",
    tolerance: float = 1e-4,
    restarts: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> NDArray[np.float64]:
    """The ``k`` largest eigenvalues, largest first, by implicitly restarted Lanczos (ARPACK, Lehoucq et al., 1998).

    Args:
        hessian: a `LossLandscape`, or anything with ``size`` and ``hvp(vector)``.
        k: how many, less than ``size``.
        by: "value": the most positive; "magnitude": the largest absolute values.
        tolerance: of the residual ``|H v - e v|`` of an eigenvalue ``e``, relative to ``|e| + |H|`` (with "magnitude",
            to ``|e|``), where ``|H|`` is the largest absolute eigenvalue. ``e`` is off by no more, and usually by far
            less. Products in float32 are good to 1e-6.
        restarts: how often Lanczos may start again, each time with about ``k`` products.
        seed: of the first vector.
        progress: called after each product with the number of products so far; for k = 50 there are 250 or so.

    Returns:
        ``[k]``, float64.

    Raises:
        CRCoreError: ``k`` is not below ``size``; a product is not finite; no convergence within ``restarts``.
    """
    check_count("k", k)
    check_count("restarts", restarts)
    if by not in ("value", "magnitude"):
        raise CRCoreError(f"by must be 'value' or 'magnitude', got {by!r}")
    n = hessian.size
    if k >= n:
        raise CRCoreError(
            f"k must be below the number of weights, got k={k} with {n}; with so few, multiply the identity, "
            "np.linalg.eigvalsh([hvp(row) for row in np.eye(size)])"
        )
    product = counted(hessian, progress)
    start = np.random.default_rng(seed).normal(size=n)
    shift = 0.0
    if by == "value":
        # ARPACK's tolerance is relative to each eigenvalue, which small ones among many, or zeros, never meet in
        # float32. H + |H| has the same order, and none of its large eigenvalues is small.
        shift = float(np.abs(eigh_tridiagonal(*_lanczos(product, start, _NORM_STEPS), eigvals_only=True)).max())
        if shift == 0.0:
            return np.zeros(k)
    operator = LinearOperator(
        (n, n), matvec=lambda vector: product(vector) + shift * np.ravel(vector), dtype=np.float64
    )
    try:
        found = eigsh(
            operator,
            k,
            which="LA" if by == "value" else "LM",
            v0=start,
            ncv=min(n, max(2 * k + 1, 20)),
            maxiter=restarts,
            tol=tolerance,
            return_eigenvectors=False,
        )
    except ArpackNoConvergence as error:
        found = np.sort(error.eigenvalues - shift)[::-1]
        raise CRCoreError(
            f"{len(found)} of {k} eigenvalues converged to tolerance={tolerance:g} within restarts={restarts}: "
            f"{np.array2string(found, precision=4, threshold=8)}; ask for fewer, or raise restarts or tolerance"
        ) from None
    found = found - shift
    return found[np.argsort(-(np.abs(found) if by == "magnitude" else found))]


def trace(hessian: Hessian, *, probes: int = 50, seed: int = 0, progress: Progress | None = None) -> Estimate:
    """The sum of all eigenvalues: the mean of ``r H r`` over random signs ``r`` (Hutchinson, 1990).

    Args:
        hessian: a `LossLandscape`, or anything with ``size`` and ``hvp(vector)``.
        probes: how many ``r``, at least 2; one product each. The interval shrinks with their square root.
        seed, progress: as in `top_eigenvalues`.

    Returns:
        the mean over probes and half of its 95 % confidence interval.

    Raises:
        CRCoreError: fewer than two probes; a product is not finite.
    """
    check_count("probes", probes, 2)
    product = counted(hessian, progress)
    random = np.random.default_rng(seed)
    return estimate([sign @ product(sign) for sign in (_signs(random, hessian.size) for _ in range(probes))])


@dataclass(frozen=True)
class SpectralDensity:
    """How the eigenvalues are distributed: a density over the real line that integrates to 1.

    Attributes:
        eigenvalues: ``[points]``, evenly spaced.
        density: ``[points]``, at these; times ``size * width`` it is the number of eigenvalues in an interval.
    """

    eigenvalues: NDArray[np.float64]
    density: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"eigenvalues": self.eigenvalues.tolist(), "density": self.density.tolist()}


def spectral_density(
    hessian: Hessian,
    *,
    probes: int = 5,
    steps: int = 80,
    points: int = 1024,
    width: float = 0.01,
    seed: int = 0,
    progress: Progress | None = None,
) -> SpectralDensity:
    """The density of all eigenvalues by stochastic Lanczos quadrature.

    Golub & Welsch (1969) for one probe: the eigenvalues of Lanczos' tridiagonal matrix, weighed by the squares of the
    first entries of its eigenvectors. The mean over probes, each eigenvalue widened to a Gaussian: Ghorbani et al.
    (2019, arXiv 1901.10159), algorithm 1; Yao et al. (2020, PyHessian, arXiv 1912.07145), section 3.

    Args:
        hessian: a `LossLandscape`, or anything with ``size`` and ``hvp(vector)``.
        probes: random vectors; ``steps`` products each.
        steps: of Lanczos, orthogonalised in full: ``steps * size`` numbers are held.
        points: of the grid.
        width: the Gaussian's standard deviation, relative to the range of the eigenvalues.
        seed, progress: as in `top_eigenvalues`.

    Raises:
        CRCoreError: a number below 1 (for ``points``, below ``4 / width``); a product is not finite.
    """
    check_count("probes", probes)
    check_count("steps", steps)
    if not 0.0 < width <= 1.0:
        raise CRCoreError(f"width must lie in (0, 1], got {width!r}")
    check_count("points", points, int(np.ceil(4.0 / width)))  # or the grid would step over the Gaussians
    product = counted(hessian, progress)
    random = np.random.default_rng(seed)
    nodes, shares = [], []
    for _ in range(probes):
        values, vectors = eigh_tridiagonal(*_lanczos(product, _signs(random, hessian.size), steps))
        nodes.append(values)
        shares.append(vectors[0] ** 2 / probes)
    node, share = np.concatenate(nodes), np.concatenate(shares)
    spread = node.max() - node.min()
    if spread <= 1e-12 * np.abs(node).max():  # one eigenvalue, however often
        spread = np.abs(node).max() or 1.0
    sigma = width * spread
    grid = np.linspace(node.min() - 6 * sigma, node.max() + 6 * sigma, points)
    gaussians = np.exp(-(((grid[:, None] - node) / sigma) ** 2) / 2) / (sigma * np.sqrt(2 * np.pi))
    return SpectralDensity(grid, gaussians @ share)


def _signs(random: np.random.Generator, size: int) -> NDArray[np.float64]:
    return random.choice((-1.0, 1.0), size)


def _lanczos(
    product: Product, start: NDArray[np.float64], steps: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Diagonal and off-diagonal of the tridiagonal matrix, at most ``steps`` rows; fewer where the space ends."""
    basis = np.empty((min(steps, len(start)), len(start)))
    diagonal: list[float] = []
    beside: list[float] = []
    vector = start / np.linalg.norm(start)
    while True:
        row = len(diagonal)
        basis[row] = vector
        image = product(vector)
        diagonal.append(float(vector @ image))
        known = basis[: row + 1]
        for _ in range(2):  # twice is enough (Parlett): rounding leaves something of them in the difference
            image = image - known.T @ (known @ image)
        norm = float(np.linalg.norm(image))
        scale = max(abs(d) for d in diagonal) + sum(beside[-1:])
        if len(diagonal) == len(basis) or norm <= 1e-10 * scale or norm == 0.0:
            return np.array(diagonal), np.array(beside)
        beside.append(norm)
        vector = image / norm
