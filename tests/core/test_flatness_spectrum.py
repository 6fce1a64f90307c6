"""Eigenvalues, trace and density against dense linear algebra."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcore import CRCoreError
from crcore.flatness import Estimate, spectral_density, top_eigenvalues, trace


def of(matrix: np.ndarray) -> Any:
    return SimpleNamespace(size=len(matrix), hvp=lambda vector: matrix @ vector)


@st.composite
def symmetric(draw: Any) -> np.ndarray:
    """Matrices of any rank, any signs, any scale, some with eigenvalues that are equal."""
    n = draw(st.integers(4, 40))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    values = random.normal(size=n)
    values[: draw(st.integers(0, n - 1))] = draw(st.sampled_from([0.0, 0.5, -3.0]))
    basis, _ = np.linalg.qr(random.normal(size=(n, n)))
    matrix = 10.0 ** draw(st.integers(-6, 6)) * (basis * values) @ basis.T
    return (matrix + matrix.T) / 2


@given(symmetric(), st.data())
def test_top_eigenvalues_are_those_of_the_dense_matrix(matrix: np.ndarray, data: Any) -> None:
    k = data.draw(st.integers(1, len(matrix) - 1))
    dense = np.linalg.eigvalsh(matrix)
    scale = np.abs(dense).max()
    found = top_eigenvalues(of(matrix), k, tolerance=1e-10)
    np.testing.assert_allclose(found, dense[::-1][:k], rtol=0, atol=1e-8 * scale)


@given(symmetric())
def test_by_magnitude_counts_negative_eigenvalues_too(matrix: np.ndarray) -> None:
    dense = np.linalg.eigvalsh(matrix)
    found = top_eigenvalues(of(matrix), 1, by="magnitude", tolerance=1e-10)
    np.testing.assert_allclose(np.abs(found), np.abs(dense).max(), rtol=1e-8)


def test_by_magnitude_is_sorted_by_magnitude() -> None:
    found = top_eigenvalues(of(np.diag([5.0, -7.0, 1.0, 2.0, 0.5])), 3, by="magnitude", tolerance=1e-10)
    np.testing.assert_allclose(found, [-7.0, 5.0, 2.0])


def test_zeros_among_the_top_converge_in_float32() -> None:
    """A network has fewer directions of curvature than weights; ARPACK's own tolerance is never met by zeros."""
    random = np.random.default_rng(0)
    factor = random.normal(size=(60, 4)).astype("float32")
    found = top_eigenvalues(SimpleNamespace(size=60, hvp=lambda v: factor @ (factor.T @ v.astype("float32"))), 20)
    dense = np.linalg.eigvalsh((factor @ factor.T).astype("float64"))[::-1][:20]
    np.testing.assert_allclose(found, dense, rtol=0, atol=1e-4 * dense[0])


def test_a_flat_loss_has_zeros() -> None:
    np.testing.assert_array_equal(top_eigenvalues(of(np.zeros((6, 6))), 3), np.zeros(3))


def test_the_same_seed_gives_the_same_bits() -> None:
    matrix = of(np.diag(np.arange(30.0)))
    for instrument in (lambda: top_eigenvalues(matrix, 5), lambda: trace(matrix).mean):
        np.testing.assert_array_equal(instrument(), instrument())


def test_progress_counts_the_products() -> None:
    made: list[int] = []
    calls: list[int] = []
    matrix = np.diag(np.arange(30.0))
    hessian = SimpleNamespace(size=30, hvp=lambda vector: (made.append(1), matrix @ vector)[1])
    top_eigenvalues(hessian, 5, progress=calls.append)
    assert calls == list(range(1, len(made) + 1))


@pytest.mark.parametrize("k", [0, 5, 6, True, 2.0])
def test_k_must_be_below_the_size(k: Any) -> None:
    with pytest.raises(CRCoreError, match="k must be"):
        top_eigenvalues(of(np.eye(5)), k)


def test_what_has_converged_is_said() -> None:
    """Eigenvalues that lie too close to be told apart in one restart."""
    matrix = np.diag(np.concatenate([[5.0], 1.0 + 1e-4 * np.arange(400)]))
    with pytest.raises(CRCoreError, match=r"\d of 9 eigenvalues converged to tolerance=1e-12 within restarts=2"):
        top_eigenvalues(of(matrix), 9, tolerance=1e-12, restarts=2)


@pytest.mark.parametrize("instrument", [top_eigenvalues, trace, spectral_density])
def test_a_product_that_is_not_finite_is_an_error(instrument: Any) -> None:
    options = {"k": 2} if instrument is top_eigenvalues else {}
    with pytest.raises(CRCoreError, match="NaN or infinity"):
        instrument(of(np.full((9, 9), np.nan)), **options)


@given(symmetric())
def test_the_trace_of_a_diagonal_matrix_needs_one_probe(matrix: np.ndarray) -> None:
    """r H r is the same for all signs r: nothing is random."""
    found = trace(of(np.diag(np.diag(matrix))), probes=3)
    np.testing.assert_allclose(found.mean, np.trace(matrix), atol=1e-12 * np.abs(matrix).sum())
    assert found.half_width <= 1e-12 * np.abs(matrix).sum()


def test_the_interval_of_the_trace_holds_it_nineteen_times_in_twenty() -> None:
    random = np.random.default_rng(0)
    matrix = random.normal(size=(20, 20))
    matrix = matrix + matrix.T
    found = [trace(of(matrix), probes=8, seed=seed) for seed in range(2000)]
    held = np.mean([each.low <= np.trace(matrix) <= each.high for each in found])
    assert 0.93 < held < 0.97


@given(symmetric())
def test_the_density_integrates_to_one(matrix: np.ndarray) -> None:
    found = spectral_density(of(matrix), probes=2, steps=10)
    assert (found.density >= 0.0).all()
    np.testing.assert_allclose(np.trapezoid(found.density, found.eigenvalues), 1.0, rtol=1e-6)


@given(symmetric())
def test_the_first_moments_of_the_density_are_those_of_the_matrix(matrix: np.ndarray) -> None:
    """With as many steps as rows, quadrature is exact: moment m of one probe is r H^m r / n."""
    scale, square = np.abs(matrix).sum() or 1.0, matrix @ matrix
    found = spectral_density(of(matrix), probes=4, steps=len(matrix), width=0.005)
    for power, matrix_power in ((1, matrix), (2, square)):
        moment = np.trapezoid(found.density * found.eigenvalues**power, found.eigenvalues)
        expected = trace(of(matrix_power), probes=4).mean / len(matrix)  # of the same signs
        np.testing.assert_allclose(moment, expected, rtol=0, atol=1e-4 * scale**power)


def test_the_density_has_its_mass_at_the_eigenvalues() -> None:
    matrix = np.diag(np.concatenate([np.zeros(90), np.full(10, 10.0)]))
    found = spectral_density(of(matrix), probes=20, steps=30)
    near = found.eigenvalues > 5.0
    np.testing.assert_allclose(np.trapezoid(found.density[near], found.eigenvalues[near]), 0.1, atol=1e-3)
    assert abs(found.eigenvalues[near][found.density[near].argmax()] - 10.0) < 0.02


@pytest.mark.parametrize("matrix", [np.zeros((5, 5)), 3.0 * np.eye(5)])
def test_one_eigenvalue_is_a_peak(matrix: np.ndarray) -> None:
    found = spectral_density(of(matrix))
    np.testing.assert_allclose(np.trapezoid(found.density, found.eigenvalues), 1.0, rtol=1e-6)
    np.testing.assert_allclose(found.eigenvalues[found.density.argmax()], matrix[0, 0], atol=0.01)


@pytest.mark.parametrize("options", [{"probes": 0}, {"steps": 0}, {"points": 100}, {"width": 0.0}])
def test_a_density_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CRCoreError, match=f"{next(iter(options))} must"):
        spectral_density(of(np.eye(5)), **options)


def test_results_become_json() -> None:
    assert Estimate(np.array([1.0]), np.array([0.5]), 3).to_dict() == {"mean": [1.0], "half_width": [0.5], "draws": 3}
    assert set(spectral_density(of(np.eye(5))).to_dict()) == {"eigenvalues", "density"}
