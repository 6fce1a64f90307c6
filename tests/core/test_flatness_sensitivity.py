"""Noise on inputs and weights of a network whose loss is known: a linear classifier in NumPy."""

from __future__ import annotations

import colorsys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crcore import CRCoreError, cross_entropy
from crcore.flatness import (
    CORRUPTIONS,
    corrupt,
    corruption_sensitivity,
    noise_sensitivity,
    sharpness,
    weight_sensitivity,
)


class Linear:
    """Images [N, C, H, W] times a matrix [classes, C * H * W], plus a bias [classes]; remembers what it was asked."""

    def __init__(self, images: np.ndarray, classes: int = 3, seed: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.x, self.y = images, random.integers(0, classes, len(images))
        features = images[0].size
        self.weights = random.normal(size=classes * (features + 1))
        self.size, self.classes = self.weights.size, classes
        self.filters = np.concatenate([np.repeat(np.arange(classes), features), np.full(classes, -1)])
        self.asked: list[Any] = []

    def logits(self, x: np.ndarray, weights: np.ndarray) -> np.ndarray:
        matrix, bias = np.split(weights, [-self.classes])
        return x.reshape(len(x), -1) @ matrix.reshape(self.classes, -1).T + bias

    def evaluate(self, x: Any = None, weights: Any = None) -> tuple[np.ndarray, np.ndarray]:
        self.asked.append((x, weights))
        logits = self.logits(self.x if x is None else x, self.weights if weights is None else weights)
        return cross_entropy(logits, np.eye(self.classes)[self.y]), logits

    def gradient(self, weights: Any = None) -> np.ndarray:
        weights = self.weights if weights is None else weights
        logits = self.logits(self.x, weights)
        p = np.exp(logits - logits.max(1, keepdims=True))
        d = (p / p.sum(1, keepdims=True) - np.eye(self.classes)[self.y]) / len(self.x)
        return np.concatenate([(d.T @ self.x.reshape(len(self.x), -1)).ravel(), d.sum(0)])


def images(n: int = 20, seed: int = 0, channels: int = 3, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).random((n, channels, size, size))


def linear() -> Linear:
    return Linear(images())


CURVES = {
    "inputs": lambda landscape, **options: noise_sensitivity(landscape, landscape.x, **options),
    "weights": weight_sensitivity,
    "corruption": lambda landscape, **options: corruption_sensitivity(
        landscape, landscape.x, corruptions=["shot_noise"], **options
    )["shot_noise"],
}
CURVE = pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)


@CURVE
def test_without_noise_it_is_the_network_as_it_is(curve: Any) -> None:
    landscape = linear()
    losses, logits = landscape.evaluate()
    found = curve(landscape, draws=3)
    assert found.levels[0] == 0
    assert found.loss.mean[0] == losses.mean()
    assert found.accuracy.mean[0] == 100 * (logits.argmax(1) == landscape.y).mean()
    assert found.loss.half_width[0] == found.accuracy.half_width[0] == 0.0


@CURVE
def test_the_band_is_student_s_over_draws_of_the_mean_over_samples(curve: Any) -> None:
    landscape = linear()
    landscape.asked.clear()
    found = curve(landscape, draws=4)
    given = landscape.asked[1:5]  # the first level above zero; at zero it is asked once
    losses = [landscape.evaluate(*each)[0].mean() for each in given]
    np.testing.assert_allclose(found.loss.mean[1], np.mean(losses))
    # scipy.stats.t.ppf(0.975, 3) = 3.182446
    np.testing.assert_allclose(found.loss.half_width[1], 3.182446 * np.std(losses, ddof=1) / 2, rtol=1e-6)


@CURVE
def test_the_seed_decides_the_noise(curve: Any) -> None:
    first, again, other = (curve(linear(), draws=2, seed=seed).loss.mean for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first[1:] != other[1:]).all()


@CURVE
def test_progress_counts_the_evaluations(curve: Any) -> None:
    landscape, calls = linear(), []
    found = curve(landscape, draws=3, progress=calls.append)
    assert calls == list(range(1, 1 + 1 + 3 * (len(found.levels) - 1)))
    assert len(landscape.asked) == len(calls)


@CURVE
def test_one_draw_has_no_interval(curve: Any) -> None:
    with pytest.raises(CRCoreError, match="draws must be a whole number from 2, got 1"):
        curve(linear(), draws=1)


def test_noise_on_a_filter_has_the_norm_that_was_asked_for() -> None:
    landscape = linear()
    landscape.asked.clear()
    weight_sensitivity(landscape, levels=[0.1, 0.5], draws=2)
    for level, (_, weights) in zip([0.1, 0.1, 0.5, 0.5], landscape.asked, strict=True):
        noise = weights - landscape.weights
        for each in range(3):
            own = landscape.filters == each
            norms = np.linalg.norm(noise[own]), np.linalg.norm(landscape.weights[own])
            np.testing.assert_allclose(norms[0], level * norms[1])
        np.testing.assert_array_equal(noise[landscape.filters < 0], 0.0)


def test_a_filter_of_zeros_stays() -> None:
    landscape = linear()
    landscape.weights[landscape.filters == 1] = 0.0
    landscape.asked.clear()
    weight_sensitivity(landscape, levels=[0.5], draws=2)
    assert all((weights[landscape.filters == 1] == 0.0).all() for _, weights in landscape.asked)


def test_noise_on_images_has_its_standard_deviation_in_pixels_and_comes_before_normalization() -> None:
    landscape = Linear(np.full((50, 3, 8, 8), 0.5))
    landscape.asked.clear()
    noise_sensitivity(landscape, landscape.x, lambda x: (x - 0.5) / 0.25, levels=[0.02, 0.1], draws=2)
    for level, (x, _) in zip([0.02, 0.02, 0.1, 0.1], landscape.asked, strict=True):
        np.testing.assert_allclose(x.std() * 0.25, level, rtol=0.03)
    stacked = np.array([x for x, _ in landscape.asked])
    np.testing.assert_allclose(stacked[0] * 5, stacked[2])  # a draw is one direction, at every level
    assert (stacked[0] != stacked[1]).all()


@given(st.sampled_from(sorted(CORRUPTIONS)), st.integers(0, 5), st.sampled_from([1, 3]), st.sampled_from([1, -1]))
def test_corrupted_images_are_images(name: str, severity: int, channels: int, axis: int) -> None:
    given = np.moveaxis(images(2, severity, channels, size=9), 1, axis).astype("float32")
    found = corrupt(given, name, severity, channel_axis=axis)
    assert found.shape == given.shape
    assert found.dtype == given.dtype
    assert (found >= 0).all()
    assert (found <= 1).all()
    assert (found == given).all() == (severity == 0)


@given(st.sampled_from(sorted(CORRUPTIONS)), st.integers(1, 5))
def test_where_the_channels_are_makes_no_difference(name: str, severity: int) -> None:
    first = images(3)
    found = corrupt(first, name, severity)
    last = corrupt(np.moveaxis(first, 1, -1), name, severity, channel_axis=-1)
    np.testing.assert_allclose(np.moveaxis(last, -1, 1), found, atol=1e-12)


@pytest.mark.parametrize("name", sorted(CORRUPTIONS))
def test_severity_grows(name: str) -> None:
    smooth = np.clip(0.5 + 0.1 * np.cumsum(np.random.default_rng(0).normal(size=(20, 3, 32, 32)), axis=-1), 0, 1)
    distance = [np.mean((corrupt(smooth, name, severity) - smooth) ** 2) for severity in range(6)]
    assert distance == sorted(distance)
    assert len(set(distance)) == 6


def test_brightness_is_the_value_of_hsv() -> None:
    given = images(1, size=4)
    found = corrupt(given, "brightness", 3)
    for pixel, brighter in zip(given[0].reshape(3, -1).T, found[0].reshape(3, -1).T, strict=True):
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        np.testing.assert_allclose(brighter, colorsys.hsv_to_rgb(hue, saturation, min(value + 0.15, 1.0)), atol=1e-12)
    np.testing.assert_allclose(corrupt(np.zeros((1, 3, 4, 4)), "brightness", 3), 0.15)


@pytest.mark.parametrize("severity", range(1, 6))
def test_pixelate_is_that_of_pil(severity: int) -> None:
    from PIL import Image

    given = (255 * images(1, size=32)[0]).round()
    small = int(32 * [0.95, 0.9, 0.85, 0.75, 0.65][severity - 1])
    picture = Image.fromarray(np.moveaxis(given, 0, -1).astype("uint8"))
    expected = picture.resize((small, small), Image.Resampling.BOX).resize((32, 32), Image.Resampling.BOX)
    found = corrupt(given[None] / 255, "pixelate", severity)[0] * 255
    np.testing.assert_allclose(found, np.moveaxis(np.asarray(expected, float), -1, 0), atol=1.01)  # PIL rounds twice


def test_impulse_noise_replaces_its_share_by_black_and_white() -> None:
    given = np.full((20, 3, 32, 32), 0.5)
    found = corrupt(given, "impulse_noise", 5)
    np.testing.assert_allclose([(found == 0).mean(), (found == 1).mean()], 0.035, rtol=0.1)
    assert ((found != 0.5) == ((found == 0) | (found == 1))).all()


def test_contrast_shrinks_each_channel_towards_its_own_mean() -> None:
    given = images(2)
    found, mean = corrupt(given, "contrast", 4), given.mean(axis=(2, 3), keepdims=True)
    np.testing.assert_allclose(found - mean, 0.3 * (given - mean), atol=1e-12)


def test_blur_spreads_a_point_within_its_channel() -> None:
    given = np.zeros((2, 3, 15, 15))
    given[0, 1, 7, 7] = 1.0
    found = corrupt(given, "gaussian_blur", 5)
    weights = np.exp(-(np.arange(-4, 5) ** 2) / 2)
    weights /= weights.sum()
    np.testing.assert_allclose(found[0, 1, 3:12, 3:12], np.outer(weights, weights), atol=1e-12)
    np.testing.assert_allclose([found[0, 1].sum(), found.sum()], 1.0)


def test_shot_noise_is_poisson() -> None:
    found = corrupt(np.full((20, 3, 32, 32), 0.4), "shot_noise", 5)
    np.testing.assert_allclose([found.mean(), found.var()], [0.4, 0.4 / 50], rtol=0.05)


def test_only_noise_is_drawn_more_than_once() -> None:
    found = corruption_sensitivity(linear(), linear().x, draws=3)
    assert {name: curve.loss.draws for name, curve in found.items()} == {
        name: 3 if name.endswith("_noise") else 1 for name in CORRUPTIONS
    }
    assert all((curve.loss.half_width == 0).all() for curve in found.values() if curve.loss.draws == 1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((255 * images()).astype("uint8"), "array of floats .* got uint8"),
        (255 * images(), "divide pixels by 255"),
        (images() - 0.1, r"images must lie in \[0, 1\]"),
        (images()[0], "four axes"),
        (images(3), "got 3 for 20 labels"),
        (np.full((20, 3, 8, 8), np.nan), r"images must lie in \[0, 1\]"),
    ],
)
def test_images_of_another_kind_are_refused(given: np.ndarray, message: str) -> None:
    for curve in (noise_sensitivity, corruption_sensitivity):
        with pytest.raises(CRCoreError, match=message):
            curve(linear(), given)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(CRCoreError, match=r"corruption must be one of gaussian_noise, .* got 'fog'"):
        corruption_sensitivity(linear(), linear().x, corruptions=["fog"])
    with pytest.raises(CRCoreError, match="severity must be"):
        corrupt(images(), "contrast", 6)
    with pytest.raises(CRCoreError, match=r"one or three channels, got \[20, 8, 8, 3\] with channels on axis 1"):
        corruption_sensitivity(linear(), np.moveaxis(images(), 1, -1))
    with pytest.raises(CRCoreError, match=r"levels must be numbers from 0, got \[-0.1\]"):
        weight_sensitivity(linear(), levels=[-0.1])


def test_targets_that_are_no_labels_have_no_accuracy() -> None:
    landscape = linear()
    landscape.evaluate = lambda x=None, weights=None: (np.zeros(20), np.zeros((20, 3)))  # type: ignore[method-assign]
    landscape.y = landscape.y.astype("float32")
    found = weight_sensitivity(landscape, draws=2)
    assert found.accuracy is None
    assert found.to_dict()["accuracy"] is None


def test_one_step_of_sharpness_is_that_of_sam() -> None:
    landscape = linear()
    gradient, weights = landscape.gradient(), landscape.weights
    moved = weights + 0.05 * np.linalg.norm(weights) * gradient / np.linalg.norm(gradient)
    found = sharpness(landscape, 0.05, steps=1)
    np.testing.assert_allclose(found.loss + found.increase, landscape.evaluate(weights=moved)[0].mean())


@given(st.floats(0.001, 1.0), st.integers(1, 20), st.integers(0, 100))
def test_ascent_stays_in_the_ball_and_never_finds_less_than_nothing(radius: float, steps: int, seed: int) -> None:
    landscape = Linear(images(seed=seed), seed=seed)
    found = sharpness(landscape, radius, steps)
    assert found.increase >= 0.0
    for _, weights in landscape.asked[1:]:
        distance = np.linalg.norm(weights - landscape.weights)
        assert distance <= radius * np.linalg.norm(landscape.weights) * (1 + 1e-12)


def test_more_steps_find_the_highest_point_of_the_border() -> None:
    """Of 1/2 (w - c) H (w - c) it lies along the largest eigenvalue."""
    landscape = linear()
    curvature = np.ones(landscape.size)
    curvature[7] = 5.0
    centre = landscape.weights - 1e-3

    def loss(x: Any = None, weights: Any = None) -> tuple[np.ndarray, np.ndarray]:
        d = (landscape.weights if weights is None else weights) - centre
        return np.full(20, 0.5 * d @ (curvature * d)), np.zeros((20, 3))

    landscape.evaluate = loss  # type: ignore[method-assign]
    landscape.gradient = lambda weights=None: curvature * (weights - centre)  # type: ignore[method-assign]
    reach = 0.1 * np.linalg.norm(landscape.weights)
    np.testing.assert_allclose(sharpness(landscape, 0.1, steps=20).increase, 0.5 * 5.0 * reach**2, rtol=0.02)
    assert sharpness(landscape, 0.1, steps=1).increase < 0.5 * 2.0 * reach**2


def test_a_step_that_leads_down_does_not_count() -> None:
    """Over the top of a hill."""
    landscape = linear()
    top = landscape.weights + 1e-3

    def loss(x: Any = None, weights: Any = None) -> tuple[np.ndarray, np.ndarray]:
        d = (landscape.weights if weights is None else weights) - top
        return np.full(20, -d @ d), np.zeros((20, 3))

    landscape.evaluate = loss  # type: ignore[method-assign]
    landscape.gradient = lambda weights=None: -2 * (weights - top)  # type: ignore[method-assign]
    assert sharpness(landscape, 0.5, steps=1).increase == 0.0


@pytest.mark.parametrize("options", [{"radius": 0.0}, {"radius": np.nan}, {"steps": 0}])
def test_a_ball_that_cannot_be_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(CRCoreError, match=f"{next(iter(options))} must"):
        sharpness(linear(), **options)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_loss_that_overflows_is_no_result(value: float) -> None:
    landscape = linear()
    here = landscape.evaluate()
    away = np.where(np.arange(20) == 3, value, here[0]), here[1]
    landscape.evaluate = lambda x=None, weights=None: here if weights is None else away  # type: ignore[method-assign]
    for instrument in (sharpness, weight_sensitivity):
        with pytest.raises(CRCoreError, match="a loss has NaN or infinity"):
            instrument(landscape)


def test_a_gradient_that_overflows_is_no_direction() -> None:
    landscape = linear()
    landscape.gradient = lambda weights=None: np.full(landscape.size, np.nan)  # type: ignore[method-assign]
    with pytest.raises(CRCoreError, match="a gradient has NaN or infinity"):
        sharpness(landscape)
