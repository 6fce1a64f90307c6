"""What `crcore report` is made of: words for intervals, statistics of quantizers, hooks, figures."""

from __future__ import annotations

import math
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import crcore_torch as crt
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import crcore as cr
from crcore.cli._arguments import build_parser, settings_from
from crcore.cli._figures.landscape import flatness_panels, sensitivity_panels
from crcore.cli._figures.style import COLOURS, OTHER, Panel, colour, inline_svg, write_png
from crcore.cli._figures.training import gains_panel, history_panels
from crcore.cli._quantizer_statistics import Quantized, signal_to_noise, statistics_of
from crcore.cli._report import Gain, rows
from crcore.cli._torch_backend import TorchBackend
from crcore.cli._verdict import command_line, in_words, verdict

BOTH = [cr.LSQ(3), cr.LSQ(8), cr.LSQ(1, signed=True), cr.DoReFa(3), cr.DoReFa(1), cr.MinMax(5)]
CASES = [
    *((quantizer, role) for quantizer in BOTH for role in ("weight", "activation")),
    (cr.LSQPlus(4), "activation"),
    (cr.PACT(4), "activation"),
]


def quantized(quantizer: Any, values: Any, *, role: str = "activation") -> Quantized:
    """A tensor and its codes, by NumPy and the core."""
    quantizer = quantizer.for_role(role)
    if quantizer.signed is None:
        quantizer = replace(quantizer, signed=bool((values < 0).any()))
    arrays = quantizer.init(values, axes=tuple(range(values.ndim)))
    scale, zero_point = map(np.asarray, quantizer.affine(*arrays))
    far = np.full_like(values, 1e30)
    ends = [quantizer.codes(end, *arrays) for end in (-far, far)]
    limits = int(ends[0].min()), int(ends[1].max())
    return Quantized(quantizer, values, quantizer.codes(values, *arrays), scale, zero_point, limits)


# The verdict


@given(st.floats(-20, 20), st.floats(0.01, 20))
def test_a_gain_or_a_loss_is_named_only_where_the_interval_leaves_out_zero(mean: float, half: float) -> None:
    words = in_words(Gain(mean, half))
    assert words.endswith("a gain.") == (mean - half > 0)
    assert words.endswith("a loss.") == (mean + half < 0)
    assert words.endswith("no difference shown.") == (mean - half <= 0 <= mean + half)
    assert f"{mean - half:+.2f} to {mean + half:+.2f}" in words


@given(st.floats(-20, 20), st.sampled_from([None, 0.0, 1e-9]))
def test_without_a_width_nothing_is_claimed(mean: float, half: float | None) -> None:
    words = in_words(Gain(mean, half))
    assert "a gain" not in words
    assert "a loss" not in words
    assert "chance" in words if half is None else "too few" in words


def record(method: str, seed: int, accuracy: float, teacher: float | None = None, **more: Any) -> dict[str, Any]:
    entry = {"epoch": 1, "step": 3, "task": 1.0, "consistency": 0.5, "weight": 0.1, "decay": 0.9}
    entry |= {"accuracy": accuracy, "teacher_accuracy": teacher}
    run = {"method": method, "seed": seed, "accuracy": accuracy, "teacher_accuracy": teacher, "steps": 3}
    return run | {"float_steps": 3, "differs": "", "history": [entry]} | more


def test_the_verdict_is_on_quantized_methods_and_their_averages() -> None:
    records = [
        *(record("fp32", seed, 99.0 + seed) for seed in (0, 1, 2)),
        *(record("qat", seed, 90.0 + seed) for seed in (0, 1, 2)),
        *(record("qat+ema", seed, 90.0 + seed, 91.0 + 1.1 * seed) for seed in (0, 1, 2)),
        *(record("qat+cr", seed, 85.0 + 1.2 * seed, 90.0 - seed) for seed in (0, 1, 2)),
    ]
    lines = verdict(rows(records))
    assert [line.partition(" is ")[0] for line in lines] == [
        "The average of qat+ema", "qat+cr", "The average of qat+cr"
    ]  # fmt: skip
    assert [line.rpartition(": ")[2] for line in lines] == ["a gain.", "a loss.", "no difference shown."]


def test_without_plain_qat_nothing_is_compared() -> None:
    assert verdict(rows([record("qat+cr", 0, 90.0, 91.0)]))[0].startswith("Nothing to compare")


# The command line

WORDS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12).filter(
    lambda word: not word.startswith("-")
)


@given(
    data=WORDS,
    model=WORDS,
    epochs=st.integers(1, 99),
    float_epochs=st.integers(1, 99),
    flip=st.sampled_from([None, True, False]),
    amp=st.booleans(),
    threshold=st.none() | st.floats(0, 0.99),
    seeds=st.builds(range, st.integers(0, 5), st.integers(6, 9)).map(tuple),
    seed=st.integers(0, 9),
    command=st.sampled_from(["compare", "train"]),
)
def test_the_command_line_parses_to_its_settings(
    data, model, epochs, float_epochs, flip, amp, threshold, seeds, seed, command
) -> None:
    parsed = build_parser("").parse_args([command])
    given = {"data": data, "model": model, "epochs": epochs, "float_epochs": float_epochs, "flip": flip, "amp": amp}
    vars(parsed).update(given, threshold=threshold)
    vars(parsed).update({"seeds": seeds, "methods": "qat,qat+kd"} if command == "compare" else {"seed": seed})
    settings = settings_from(parsed)
    again = shlex.split(command_line(command, settings.to_dict(), engine=None))
    assert again[:2] == ["crcore", command]
    assert settings_from(build_parser("").parse_args(again[1:])) == settings


def test_the_engine_of_keras_stands_before_the_command() -> None:
    settings = settings_from(build_parser("").parse_args(["compare", "--methods", "qat", "--backend", "keras"]))
    line = command_line("compare", settings.to_dict(), engine="jax")
    assert line == "KERAS_BACKEND=jax crcore compare --methods qat --backend keras"


# Statistics of quantizers


@given(st.integers(0, 2**32 - 1), st.floats(-3, 3))
def test_the_ratio_is_that_of_energies(seed: int, exponent: float) -> None:
    generator = np.random.default_rng(seed)
    values, noise = generator.normal(size=500), generator.normal(size=500) * 10**exponent
    found = signal_to_noise(values, values + noise)
    assert found == pytest.approx(20 * np.log10(np.linalg.norm(values) / np.linalg.norm(noise)), abs=1e-6)
    assert signal_to_noise(7 * values, 7 * (values + noise)) == pytest.approx(found)


def test_the_ratio_of_no_noise_is_infinite_and_that_of_no_signal_is_none() -> None:
    assert signal_to_noise(np.ones(3), np.ones(3)) == math.inf
    assert signal_to_noise(np.zeros(3), np.ones(3)) is None


def test_one_bit_more_gives_six_decibels() -> None:
    values = np.random.default_rng(0).uniform(-1, 1, 100_000).astype(np.float32)
    ratios = [statistics_of(quantized(cr.MinMax(bits), values)).ratio for bits in (4, 5, 6)]
    assert np.diff(np.array(ratios, float)) == pytest.approx(6.02, abs=0.6)


@pytest.mark.parametrize(("quantizer", "role"), CASES, ids=lambda value: str(value))
@given(seed=st.integers(0, 2**32 - 1), signed=st.booleans())
def test_each_level_of_the_histogram_holds_the_values_of_its_code(quantizer, role, seed, signed) -> None:
    values = np.random.default_rng(seed).normal(size=(40, 7)).astype(np.float32)
    values = values if signed or role == "weight" else np.abs(values)
    tensor = quantized(quantizer, values, role=role)
    found = statistics_of(tensor)
    assert found.histogram.sum() == values.size
    assert (found.levels[0], found.levels[-1]) == tensor.limits
    assert set(tensor.codes.ravel().tolist()) <= set(found.levels.tolist())
    half = (found.levels[1] - found.levels[0]) / 2
    centres = (found.edges[1:] + found.edges[:-1]) / 2
    for level in found.levels:
        low = -np.inf if level == found.levels[0] else level - half
        high = np.inf if level == found.levels[-1] else level + half
        inside = found.histogram[(centres > low) & (centres < high)].sum()
        assert abs(inside - (tensor.codes == level).sum()) <= 1  # a value on the threshold itself
    assert found.used == len(set(tensor.codes.ravel().tolist()))
    assert found.at_lowest == pytest.approx((tensor.codes == tensor.limits[0]).mean())
    assert found.at_highest == pytest.approx((tensor.codes == tensor.limits[1]).mean())


def test_weights_that_are_squashed_have_no_ratio() -> None:
    values = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    found = statistics_of(quantized(cr.DoReFa(3), values, role="weight"))
    assert (found.squashed, found.ratio, len(found.levels)) == (True, None, 8)


def test_each_channel_is_measured_on_its_own_grid() -> None:
    values = np.array([[-4.0, 3.0], [-400.0, 300.0]], np.float32)
    scale = np.array([[1.0], [100.0]], np.float32)
    tensor = Quantized(cr.LSQ(3, signed=True), values, values / scale, scale, np.zeros((2, 1), np.int32), (-4, 3))
    found = statistics_of(tensor)
    assert (found.at_lowest, found.at_highest, found.used, found.ratio) == (0.5, 0.5, 2, math.inf)


# What the torch backend hands over


class Twice(nn.Module):
    """One layer that runs twice, and a quantizer of the user's own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.Conv2d(5, 3, 3, padding=1))
        self.own = crt.FakeQuantize(cr.LSQ(4))
        self.last = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.own(self.inner(self.inner(x)).mean((2, 3))))


@pytest.mark.parametrize("quantizer", [cr.LSQ(4, per_channel=True), cr.MinMax(4), cr.DoReFa(4)], ids=repr)
def test_each_quantizer_is_visited_once_with_what_it_makes(quantizer) -> None:
    torch.manual_seed(0)
    activations = cr.LSQ(4) if isinstance(quantizer, cr.LSQ) else quantizer
    network = crt.prepare(Twice(), cr.Recipe(weights=quantizer, activations=activations, first_last_bits=None))
    images = torch.randn(6, 3, 5, 5)
    network.train()(images)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found: dict[tuple[str, str], Quantized] = {}

    def visit(layer: str, place: str, tensor: Quantized) -> None:
        assert (layer, place) not in found
        found[layer, place] = tensor

    TorchBackend("cpu").visit_quantizers(network, images, visit)
    layers = ("inner.0", "inner.2", "last")
    assert found.keys() == {(layer, place) for layer in layers for place in ("weight", "input")} | {("", "own")}
    assert np.array_equal(found["inner.0", "input"].values, images.numpy())  # of the first of two passes
    for layer in layers:
        module = network.get_submodule(layer)
        tensor = found[layer, "weight"]
        made = (tensor.codes - tensor.zero_point) * tensor.scale
        np.testing.assert_allclose(made, module.weight.detach().numpy(), rtol=1e-6)
        assert tensor.codes.shape == tensor.values.shape
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_network_that_fails_is_left_as_it_was() -> None:
    network = crt.prepare(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), cr.Recipe(cr.LSQ(4), cr.LSQ(4)))
    with pytest.raises(cr.CRCoreError, match="not initialized"):
        TorchBackend("cpu").visit_quantizers(network, torch.ones(2, 4), lambda *_: None)
    assert network.training
    assert not any(module._forward_hooks for module in network.modules())


# Figures


def test_each_method_has_a_colour_of_its_own() -> None:
    assert len(set(COLOURS.values()) | {OTHER}) == len(COLOURS) + 1
    assert colour("a method that is not known") == OTHER


def test_a_figure_is_the_same_each_time_and_refers_to_nothing_outside() -> None:
    panels = history_panels([record("qat", seed, 90.0 + seed) for seed in (0, 1)])
    first, second = ([inline_svg(panel) for panel in panels] for _ in range(2))
    assert first == second
    for svg in first:
        assert svg.startswith("<svg viewBox=")
        assert not any(word in svg for word in ("http", "<image", "<style", "DejaVu", "$"))


def test_text_in_figures_is_escaped_and_no_formula() -> None:
    panel = Panel('<b>"$', lambda axes: axes.set(xlabel="$x <script>", ylabel="a$b$"))
    svg = inline_svg(panel)
    assert 'aria-label="&lt;b&gt;&quot;$"' in svg
    assert "$x &lt;script&gt;" in svg
    assert ">a$b$<" in svg


def test_gains_of_one_seed_are_drawn_without_a_bar() -> None:
    panel = gains_panel(rows([record("qat", 0, 90.0), record("qat+cr", 0, 91.0, 92.0)]))
    assert panel is not None
    assert "qat+cr, average" in inline_svg(panel)
    assert gains_panel(rows([record("qat+cr", 0, 91.0, 92.0)])) is None


def axes_of(panel: Panel) -> Any:
    axes = Figure().add_subplot()
    panel.draw(axes)
    return axes


def test_the_density_is_drawn_of_those_that_have_one() -> None:
    head = {"role": "float", "method": None, "checkpoint": "float.safetensors", "eigenvalues": [1.0]}
    none, some = ({"values": places, "density": places} for places in ([], [0.5, 1.0]))
    panels = flatness_panels([head | {"density": none}, head | {"density": some}])
    assert len(axes_of(panels[1]).lines) == 1
    assert len(flatness_panels([head | {"density": none}])) == 1


def measured(folder: str, values: list[float], *, role: str = "student") -> dict[str, Any]:
    """What was measured of a network, all of it by the same numbers."""
    curve = {"name": "noise", "group": "corruption", "unit": "std", "levels": list(range(len(values)))}
    interval = {"mean": values, "low": [value - 9.0 for value in values], "high": [value + 9.0 for value in values]}
    return {
        "role": role,
        "method": "qat",
        "checkpoint": f"{folder}/{role}.safetensors",
        "eigenvalues": values,
        "density": {"values": values, "density": values},
        "curves": [curve | {"loss": interval, "accuracy": interval}],
        "sharpness": {"radius": curve["levels"], "increase": values},
    }


def test_seeds_are_one_line_with_their_deviation() -> None:
    files = [measured("seed0/qat", [30.0, 10.0]), measured("seed12/qat", [50.0, 20.0])]
    eigenvalues, density = flatness_panels(files)
    mean, std = np.array([40.0, 15.0]), np.sqrt([200.0, 50.0])
    for panel in (eigenvalues, *sensitivity_panels(files)):
        axes = axes_of(panel)
        (line,), (band,) = axes.lines, axes.collections
        np.testing.assert_array_equal(line.get_ydata(), mean)
        corners = np.array(band.get_paths()[0].vertices)
        np.testing.assert_allclose(sorted({*corners[:, 1].round(6)}), sorted({*(mean - std), *(mean + std)}), atol=1e-6)
    axes = axes_of(density)
    assert [list(line.get_ydata()) for line in axes.lines] == [[30.0, 10.0], [50.0, 20.0]]
    assert axes.get_legend_handles_labels()[1] == ["qat"]


def test_runs_averages_and_abscissae_are_lines_of_their_own() -> None:
    files = [
        measured("a/seed0", [3.0, 1.0]),
        measured("b/seed0", [4.0, 1.0]),
        measured("a/seed0", [2.0, 1.0], role="teacher"),
        measured("a/seed1", [9.0, 8.0, 7.0]),
        measured("a/seed0", [5.0, 1.0]),  # of another folder, which has such folders in it too
    ]
    axes = axes_of(flatness_panels(files)[0])
    assert axes.get_legend_handles_labels()[1] == ["qat", "qat (2)", "qat, average", "qat", "qat (3)"]
    assert sorted(list(line.get_ydata()) for line in axes.lines) == sorted(file["eigenvalues"] for file in files)
    assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == 4


def test_a_run_has_its_number_in_every_panel() -> None:
    first, second = measured("a/seed0", [3.0, 1.0]), measured("b/seed0", [4.0, 1.0])
    panels = flatness_panels([first | {"density": {"values": [], "density": []}}, second])
    assert axes_of(panels[1]).get_legend_handles_labels()[1] == ["qat (2)"]


def test_a_band_ends_at_what_an_accuracy_can_be() -> None:
    wide = {"mean": [50.0, 60.0], "low": [-30.0, -40.0], "high": [130.0, 140.0]}
    curve = {"name": "noise", "group": "input", "unit": "std", "levels": [0, 1], "loss": wide, "accuracy": wide}
    file = {
        "role": "float",
        "method": "fp32",
        "checkpoint": "c",
        "curves": [curve],
        "sharpness": {"radius": [], "increase": []},
    }
    ends = [
        axes_of(panel).collections[0].get_paths()[0].get_extents().intervaly for panel in sensitivity_panels([file])
    ]
    assert [list(end) for end in ends] == [[0, 100], [0, 140]]


def test_the_same_panels_make_a_picture(tmp_path: Path) -> None:
    head = {"role": "student", "method": None, "checkpoint": "student.safetensors"}
    density = {"values": [0.0, 1.0], "density": [1.0, 0.5]}
    values = {"mean": [1.0, 2.0], "low": [1.0, 2.0], "high": [1.0, 3.0]}
    curve = {"unit": "std", "levels": [0, 1], "loss": values, "accuracy": values}
    curves = [curve | {"name": "noise", "group": "input"}, curve | {"name": "blur", "group": "corruption"}]
    panels = [
        *flatness_panels([head | {"eigenvalues": [3.0, 1.0], "density": density}]),
        *sensitivity_panels([head | {"curves": curves, "sharpness": {"radius": [0.1], "increase": [0.2]}}]),
    ]
    assert [panel.title for panel in panels] == [
        "Largest eigenvalues of the Hessian",
        "Density of the eigenvalues",
        "Accuracy under noise",
        "Loss under noise",
        "Accuracy under blur",  # of corruptions, which are many, the accuracy alone
        "Sharpness",
    ]
    assert "student.safetensors" in axes_of(panels[0]).get_legend_handles_labels()[1]  # no run says its method
    write_png(tmp_path / "both.png", panels, "a $title")
    with Image.open(tmp_path / "both.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 500
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert [file.name for file in tmp_path.iterdir()] == ["both.png"]
