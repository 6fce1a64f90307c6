"""The chapters of the page of `crcore report`, each from the results of a run."""

import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from crcore.cli._errors import CommandError, one_line
from crcore.cli._figures.landscape import flatness_panels, name_of, sensitivity_panels
from crcore.cli._figures.layers import error_panel, histogram_panel
from crcore.cli._figures.style import Panel
from crcore.cli._figures.training import by_method, gains_panel, history_panels
from crcore.cli._layers import SAMPLES, NetworkLayers, measure_layers
from crcore.cli._measure import FORMAT
from crcore.cli._measure_command import is_repeated
from crcore.cli._methods import METHODS
from crcore.cli._page import Network, Section, Table, drawn
from crcore.cli._quantizer_statistics import QuantizerStatistics
from crcore.cli._report import HEADER, cells, notes, rows, spread, time_spent
from crcore.cli._results import Results
from crcore.cli._verdict import command_line, verdict

_SQUASHED = ("Weights of DoReFa pass a tanh before they are rounded: their codes are shown, and no ratio.",)


def overview(results: Results) -> Section:
    """What was run, how to run it again, and what came out."""
    s, data = results.settings, results.data
    facts = {
        "data": f"{data['name']}: {data['train']} training and {data['test']} test images "
        f"({data['size'][1]}x{data['size'][0]}, {data['channels']} channel{'s' * (data['channels'] > 1)}), "
        f"{len(data['classes'])} classes, {s['labels']} labels",
        "network": f"{s['model']}, trained with {s.get('backend', 'torch')} on {s.get('engine', 'torch')}",
        "quantization": f"{s['quantizer']}, weights {s['weight_bits']} bit, activations {s['activation_bits']} bit, "
        "first and last layer 8 bit",
        "methods": ", ".join(s["methods"]),
        "seeds": ", ".join(map(str, s["seeds"])),
        "training": f"{s.get('epochs')} epochs, batch {s.get('batch_size')}, learning rate {s['lr']} "
        f"(float: {s['float_lr']}), weight decay {s.get('weight_decay')}",
        "consistency": f"lambda {s.get('consistency_weight')}, {_ramp(s)}; temperature {s.get('temperature')}; views: "
        f"student {s.get('student_view')}, teacher {s.get('teacher_view')}",
    }
    time = time_spent(results.records)
    return Section(
        "run",
        "What was run, and what it shows",
        "The sentences are computed from the table below. A difference is called a gain or a loss only where its 95 % "
        "confidence interval leaves out zero; each interval stands for itself, so of twenty comparisons without any "
        "difference one is expected to look like one.",
        statements=verdict(rows(results.records)),
        notes=[time] if time else [],
        commands=[command_line(results.command, s, engine=s["engine"] if s.get("backend") == "keras" else None)],
        tables=[Table("What was run", ("what", "value"), list(facts.items()))],
        folded=[
            Table("All settings", ("setting", "value"), [(name, _text(value)) for name, value in s.items()]),
            Table("Versions", ("package", "version"), [(name, str(value)) for name, value in results.versions.items()]),
        ],
    )


def table(results: Results) -> Section:
    """The table of table.md, and the gains as a figure."""
    lines = rows(results.records)
    panel = gains_panel(lines)
    return Section(
        "table",
        "Accuracy and gain over plain QAT",
        "Dots are means of the differences to qat seed by seed, bars their 95 % confidence intervals; hollow dots are "
        "averages of the weights. A bar that crosses the line at zero shows no difference.",
        notes=notes(results.records, results.settings, results.data),
        figures=[drawn(panel)] if panel else [],
        tables=[Table("Results by method", HEADER, [cells(line) for line in lines])],
    )


def history(results: Results) -> Section:
    """Training curves."""
    return Section(
        "training",
        "Training",
        "Lines are means over seeds, bands one standard deviation; dashed lines are averages of the weights. Epochs of "
        "fp32 are those of the float training that the other methods start from. The consistency term of qat+kd is its "
        "distillation term.",
        methods=list(by_method(results.records)),
        averages=any(record["teacher_accuracy"] is not None for record in results.records),
        figures=[drawn(panel) for panel in history_panels(results.records)],
    )


def layers(results: Results, *, seed: int, data_name: str | None) -> Section:
    """What each quantizer gets and what it loses, for the networks of one seed."""
    methods = [
        record["method"]
        for record in results.records
        if record["seed"] == seed and getattr(METHODS.get(record["method"]), "quantized", True)
    ]
    networks, problems = measure_layers(results, seed=seed, data_name=data_name, methods=methods)
    return Section(
        "layers",
        f"Layer by layer, seed {seed}",
        "The signal-to-quantization-noise ratio (SQNR) is the energy of a tensor by that of its rounding error, in "
        "decibel; one bit more gives about 6 dB. Histograms show the share of the values (logarithmic) by their place "
        "on the grid, in codes, with a line for each level, or for its two ends where there are many. What lies beyond "
        "the ends is clipped, and counted in the outermost bins; after a ReLU the lowest code is zero. Inputs are "
        f"those of up to {SAMPLES} test images.",
        notes=[
            *problems,
            *_SQUASHED[: any(found.squashed for network in networks for *_, found in _each(network))],
        ],
        methods=[network.method for network in networks],
        figures=[drawn(panel) for panel in _error_panels(networks)],
        networks=[_network(network, seed) for network in networks],
    )


def flatness(results: Results) -> Section:
    """Eigenvalues of the Hessian, where they were measured."""
    return _measured(
        results,
        "flatness",
        "Curvature of the loss",
        "Eigenvalues of the Hessian of the loss at the trained weights. Smaller ones mean a flatter minimum, which the "
        "average and the consistency term aim at. The Hessian of a quantized network is that of the straight-through "
        "surrogate which it is trained with. Lines are means over seeds, bands one standard deviation.",
        flatness_panels,
        lambda file: (
            f"{file['eigenvalues'][0]:.4g}",
            f"{file['trace']['mean']:.4g} ± {file['trace']['half']:.2g}",
            _images(file),
        ),
        ("largest eigenvalue", "trace, 95 % interval", "images"),
    )


def sensitivity(results: Results) -> Section:
    """Loss and accuracy under disturbances, where they were measured."""
    return _measured(
        results,
        "sensitivity",
        "Sensitivity to disturbances",
        "Loss and accuracy where inputs or weights are disturbed, the more the further to the right. Lines are means "
        "over seeds, bands one standard deviation; of a single network, the 95 % confidence interval of the mean over "
        "draws of the noise, on the same images. A line that stays level belongs to a network that does not mind.",
        sensitivity_panels,
        lambda file: (str(len(file["curves"])), _images(file)),
        ("disturbances", "images"),
    )


def oscillation(results: Results) -> list[Section]:
    """How many weights flip between integers, where the runs recorded it."""
    recorded = {
        method: [run["oscillation"] for run in runs if run.get("oscillation")]
        for method, runs in by_method(results.records).items()
    }
    columns = list(dict.fromkeys(name for runs in recorded.values() for run in runs for name in run))
    lines = [
        (method, *(str(spread([100 * run[name] for run in runs])) if name in runs[0] else "-" for name in columns))
        for method, runs in recorded.items()
        if runs
    ]
    if not lines:
        return []
    return [
        Section(
            "oscillation",
            "Oscillation of weights",
            "Percent of the quantized weights, in the last epoch: flipped are those whose integer changed at least "
            "once, oscillating those that went to and fro between two integers, which leaves it to chance on which of "
            "them training ends.",
            tables=[Table("Weights whose integer changed", ("method", *(f"{name} %" for name in columns)), lines)],
        )
    ]


def _measured(
    results: Results,
    kind: str,
    title: str,
    how_to_read: str,
    panels: Callable[[Sequence[dict[str, Any]]], list[Panel]],
    cells_of: Callable[[dict[str, Any]], tuple[str, ...]],
    columns: tuple[str, ...],
) -> Section:
    """A chapter of the files that another command writes beside checkpoints, or the way to get them."""
    found: list[tuple[dict[str, Any], Path]] = []
    problems = []
    for path in sorted(results.folder.glob(f"seed*/*/*-{kind}.json")):
        if is_repeated(path):
            continue
        try:
            file = json.loads(path.read_text(encoding="utf-8"))
            if file["kind"] != kind or file["format"] != FORMAT:
                raise CommandError("it is of another kind or of a newer version")
            cells_of(file), name_of(file)
            for panel in panels([file]):  # drawn by itself, so that what a file lacks is its own fault
                panel.draw(Figure().add_subplot())
            found.append((file, path))
        except (CommandError, ValueError, LookupError, TypeError, OSError) as error:
            problems.append(f"{path.relative_to(results.folder)} cannot be read ({one_line(error)}); measure it again.")
    section = Section(kind, title, how_to_read, notes=problems)
    if not found:
        checkpoint = next(iter(sorted(results.folder.glob("seed*/*/student.*"))), None)
        if checkpoint is None:
            section.notes.append("Not measured, and no checkpoint is left to measure.")
        else:
            section.notes.append("Not measured. This measures the networks of one seed and makes the page again:")
            section.commands.append(shlex.join(["crcore", "report", str(results.folder), "--measure"]))
        return section
    files = [file for file, _ in found]
    section.methods = list(dict.fromkeys(name_of(file) for file in files))
    section.averages = any(file["role"] == "teacher" for file in files)
    section.figures = [drawn(panel) for panel in panels(files)]
    lines = [
        (str(path.relative_to(results.folder).with_name(path.stem.removesuffix(f"-{kind}"))), *cells_of(file))
        for file, path in found
    ]
    section.tables = [Table("Networks that were measured", ("network", *columns), lines)]
    return section


def _ramp(settings: dict[str, Any]) -> str:
    shape = settings.get("ramp_shape", "sigmoid")
    return (
        "from the first step" if shape == "constant" else f"reached after {settings.get('ramp')} of the steps ({shape})"
    )


def _images(file: dict[str, Any]) -> str:
    return f"{file['samples']} of {file['data']}, {file['settings']['split']}"


def _each(network: NetworkLayers) -> list[tuple[str, str, QuantizerStatistics]]:
    return [(layer, place, found) for layer, places in network.layers.items() for place, found in places.items()]


def _error_panels(networks: Sequence[NetworkLayers]) -> list[Panel]:
    names = list(dict.fromkeys(layer for network in networks for layer in network.layers))
    panels = []
    for place in ("weight", "input"):
        ratios = {
            network.method: [
                found.ratio if (found := network.layers.get(name, {}).get(place)) is not None else None
                for name in names
            ]
            for network in networks
        }
        if any(ratio is not None for line in ratios.values() for ratio in line):
            panels.append(error_panel(names, ratios, f"Signal-to-quantization-noise ratio of each layer's {place}"))
    return panels


def _network(network: NetworkLayers, seed: int) -> Network:
    name = f"{network.method}, {'average' if network.role == 'teacher' else 'student'}, seed {seed}"
    lines: list[tuple[str, ...]] = [
        (
            layer,
            place,
            str(found.bits),
            f"{found.used} of {len(found.levels)}",
            _percent(found.at_lowest),
            _percent(found.at_highest),
            "-" if found.ratio is None else f"{found.ratio:.1f}",
        )
        for layer, place, found in _each(network)
    ]
    header = ("layer", "tensor", "bits", "codes used", "at the lowest code", "at the highest", "SQNR in dB")
    figures = [
        (
            layer,
            [
                drawn(histogram_panel(found, f"{place} of {layer}, {network.method}", network.method), place)
                for place, found in places.items()
            ],
        )
        for layer, places in network.layers.items()
    ]
    return Network(name, Table(f"Quantizers of {name}", header, lines), figures)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


def _text(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "-" if value is None else str(value)
