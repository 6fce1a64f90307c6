"""A sweep is the comparisons of its points, with each run trained once; it is resumed, extended and reported."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import contents, results
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from crcore.cli import _sweep, main
from crcore.cli._arguments import build_parser, sweep_settings
from crcore.cli._methods import METHODS, READ_BY
from crcore.cli._sweep import sweep_line
from crcore.cli._sweep_plot import _scale
from crcore.cli._sweep_report import Grid, Point

TINY = ["--labels", "100", "--batch-size", "50", "--epochs", "2"]
VARY = ["--vary", "consistency-weight=0,0.5", "--vary", "ramp=0.1,0.5"]
METHODS_ = ["--methods", "fp32,qat,qat+ema,qat+cr", "--seeds", "2"]


def swept(out: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return loaded


def trained(printed: str) -> list[str]:
    """The runs that were trained, by the lines of their last epochs."""
    return re.findall(r"^(seed .*): epoch 2/2", printed, re.MULTILINE)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sweep."""
    folder = tmp_path_factory.mktemp("sweep") / "out"
    assert main(["sweep", *TINY, *VARY, *METHODS_, "--out", str(folder)]) == 0
    return folder


def test_runs_that_points_have_in_common_are_trained_once(crcore, tmp_path) -> None:
    outcome = crcore("sweep", *TINY, *VARY, "--methods", "qat,qat+ema,qat+cr", "--seeds", 1, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert trained(outcome.out) == [
        "seed 0 fp32",
        "seed 0 qat",
        "seed 0 qat+ema",
        "seed 0 qat+cr, consistency-weight 0",  # a weight of zero has no ramp
        "seed 0 qat+cr, consistency-weight 0.5, ramp 0.1",
        "seed 0 qat+cr, consistency-weight 0.5, ramp 0.5",
    ]
    assert "4 points, 6 runs for each of 1 seeds" in " ".join(outcome.out.split())
    assert len(list((tmp_path / "out").rglob("run.json"))) == 6


@pytest.mark.parametrize(
    "options",
    [
        ["--vary", "freezing=none,0.01", "--vary", "bits=4,2", "--student-view", "strong", "--seeds", "5-6"],
        ["--vary", "labels=30,60", "--weight-bits", "3", "--epochs", "7", "--float-epochs", "9"],
        ["--vary", "epochs=1,2", "--model", "resnet20", "--dampening", "0.5"],
        ["--vary", "flip=yes,no", "--methods", "qat,qat+cr"],
        ["--vary", "bits=2"],
        ["--vary", "labels=50,all", "--vary", "unlabeled=50,all"],
        ["--vary", "ema-decay=0.9999999,0.99", "--vary", "lr=0.0123456,0.01234561", "--labels", "all"],
        ["--vary", "backend=torch,keras", "--data", "my images"],
    ],
)
def test_the_table_names_the_command_that_gives_it(options) -> None:
    def points_of(words):
        parser = build_parser("")
        return parser.parse_args(words).vary, sweep_settings(parser, words, parser.parse_args(words).vary)

    axes, settings = points_of(["sweep", *options])
    line = shlex.split(sweep_line(axes, settings, engine="jax"))
    assert line[:2] == ["KERAS_BACKEND=jax", "crcore"]
    assert points_of(line[2:]) == (axes, settings)
    assert not {f"--{name.replace('_', '-')}" for axis in axes for name in axis.settings} & {*line}


@pytest.mark.parametrize("point", [{"consistency-weight": 0.5, "ramp": 0.5}, {"consistency-weight": 0.0, "ramp": 0.1}])
def test_a_point_is_the_comparison_with_its_settings_bit_for_bit(crcore, out, tmp_path, point) -> None:
    options = [f"--{name}={value}" for name, value in point.items()]
    outcome = crcore("compare", *TINY, *METHODS_, *options, "--out", tmp_path / "compare")
    assert outcome.status == 0, outcome.err
    (found,) = [entry for entry in swept(out)["points"] if entry["values"] == point]
    assert swept(out)["settings"] | found["settings"] == results(tmp_path / "compare")["settings"]
    for run in results(tmp_path / "compare")["runs"]:
        method = found["methods"][run["method"]]
        here, there = (
            out / method["runs"] / f"seed{run['seed']}",
            tmp_path / f"compare/seed{run['seed']}/{run['method']}",
        )
        assert {file.name for file in here.iterdir()} == {file.name for file in there.iterdir()}
        for file in there.glob("*.safetensors"):
            assert (here / file.name).read_bytes() == file.read_bytes(), file
        assert method["accuracy"][str(run["seed"])] == run["accuracy"]
        assert method["task_loss"][str(run["seed"])] == run["history"][-1]["task"]
        if run["teacher_accuracy"] is not None:
            assert method["teacher_accuracy"][str(run["seed"])] == run["teacher_accuracy"]
        mine = json.loads((here / "run.json").read_text())
        assert mine["history"] == run["history"]
        assert [str(out / name) for name in mine["checkpoints"]] == [str(file) for file in sorted(here.glob("*.safe*"))]


OTHERWISE = {
    "quantizer": "minmax",
    "weight_bits": 2,
    "activation_bits": 3,
    "epochs": 3,
    "lr": 0.3,
    "ema_decay": 0.5,
    "kd_weight": 7.0,
    "kd_temperature": 5.0,
    "consistency_weight": 3.0,
    "ramp": 0.9,
    "ramp_shape": "linear",
    "temperature": 2.0,
    "threshold": 0.2,
    "teacher_view": "strong",
    "unlabeled": 60,
    "teacher_batchnorm": "copy",
    "reestimate_batchnorm": 2,
    "dampening": 0.1,
    "freezing": 0.01,
}


@pytest.mark.parametrize("method", ["fp32", "qat", "qat+ema", "qat+kd", "qat+cr"])
def test_a_run_does_not_depend_on_what_its_method_is_said_not_to_read(crcore, tmp_path, method) -> None:
    assert OTHERWISE.keys() == {name for names in READ_BY.values() for name in names}
    unread = [name for trait, names in READ_BY.items() if not getattr(METHODS[method], trait) for name in names]
    options = [f"--{name.replace('_', '-')}={OTHERWISE[name]}" for name in unread]
    common = ("--methods", method, "--seeds", 1, "--float-epochs", 2)
    assert crcore("compare", *TINY, *common, "--out", tmp_path / "a").status == 0
    assert crcore("compare", *TINY, *common, *options, "--evaluate-every", 2, "--out", tmp_path / "b").status == 0
    files = sorted((tmp_path / "a/seed0" / method).glob("*.safetensors"))
    assert files
    for file in files:
        assert (tmp_path / "b/seed0" / method / file.name).read_bytes() == file.read_bytes()


def test_settings_that_no_method_is_said_not_to_read_decide_every_run() -> None:
    settings = _settings()
    everywhere = {"labels", "model", "float_epochs", "float_lr", "batch_size", "weight_decay", "student_view", "amp"}
    for method in METHODS.values():
        assert everywhere <= method.deciding(settings).keys()
        assert not {"methods", "seeds", "evaluate_every"} & method.deciding(settings).keys()
    assert "ramp" in METHODS["qat+cr"].deciding(settings)
    for exempt in ({"consistency_weight": 0.0}, {"ramp_shape": "constant"}):
        assert "ramp" not in METHODS["qat+cr"].deciding(replace(settings, **exempt))


def _settings() -> Any:
    from crcore.cli._arguments import build_parser, settings_from

    return settings_from(build_parser("0").parse_args(["compare"]))


def test_the_json_holds_the_gains_over_qat_and_over_the_control(out) -> None:
    found = swept(out)
    assert found["complete"] is True
    assert found["axes"] == {"consistency-weight": [0.0, 0.5], "ramp": [0.1, 0.5]}
    assert found["settings"]["labels"] == 100
    assert {"torch", "numpy", "python"} <= found["versions"].keys()
    assert [point["values"] for point in found["points"]] == [
        {"consistency-weight": weight, "ramp": ramp} for weight in (0.0, 0.5) for ramp in (0.1, 0.5)
    ]
    methods = found["points"][3]["methods"]
    pairs = {
        ("gain_over_qat", "student"): ("accuracy", methods["qat"]["accuracy"]),
        ("gain_over_qat", "teacher"): ("teacher_accuracy", methods["qat"]["accuracy"]),
        ("gain_over_control", "student"): ("accuracy", methods["qat+ema"]["teacher_accuracy"]),
        ("gain_over_control", "teacher"): ("teacher_accuracy", methods["qat+ema"]["teacher_accuracy"]),
    }
    for (kind, role), (column, baseline) in pairs.items():
        differences = [methods["qat+cr"][column][seed] - baseline[seed] for seed in ("0", "1")]
        gain = methods["qat+cr"][kind][role]
        assert gain["mean"] == pytest.approx(sum(differences) / 2)
        interval = stats.t.interval(0.95, 1, sum(differences) / 2, stats.sem(differences))
        assert gain["interval"] == pytest.approx(interval)
    assert methods["fp32"]["gain_over_qat"] == {"student": None, "teacher": None}
    assert methods["qat"]["gain_over_control"] == {"student": None, "teacher": None}
    assert methods["qat"]["teacher_accuracy"] is None


def test_the_table_names_a_shared_run_once(out) -> None:
    table = (out / "table.md").read_text()
    rows = [line.split(" | ")[:3] for line in table.splitlines() if line.startswith(("| qat", "| fp32"))]
    assert rows == [
        ["| fp32", "any", "any"],
        ["| qat", "any", "any"],
        ["| qat+ema", "any", "any"],
        ["| qat+cr", "0", "any"],
        ["| qat+cr", "0.5", "0.1"],
        ["| qat+cr", "0.5", "0.5"],
    ]
    assert "95 % t confidence interval" in table
    assert "Not finished" not in table


def test_the_plot_is_a_readable_picture(out) -> None:
    with Image.open(out / "sweep.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) >= 400
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1, 20], "linear"),
        ([1, 21], "log"),
        ([0.0, 0.5, 5.0], "linear"),
        ([0.0, 0.1, 5.0], "symlog"),
        (["weak", "strong"], "linear"),
        ([True, False], "linear"),
        ([0.0], "linear"),
    ],
)
def test_an_axis_is_logarithmic_where_values_span_more_than_twentyfold(values: Sequence[Any], scale: str) -> None:
    axes = Figure().add_subplot()
    _scale(axes, values)
    assert axes.get_xscale() == scale
    assert len(axes.get_xticks()) == len(values)


def test_a_gain_is_paired_over_the_seeds_that_both_have() -> None:
    def record(accuracy: float, average: float | None = None) -> dict[str, Any]:
        return {"accuracy": accuracy, "teacher_accuracy": average}

    point = Point({}, {"seeds": (0, 1, 2)}, "digits", {"qat": "q", "qat+kd": "k", "qat+ema": "e", "qat+cr": "c"})
    runs = {"q": {0: record(50.0), 1: record(60.0)}, "c": {1: record(63.0, 64.0), 0: record(51.0, 52.0)}}
    runs |= {"e": {0: record(50.0, 40.0)}, "k": {1: record(61.0), 2: record(9.0)}}
    grid = Grid((), [point], [], {}, runs, "crcore sweep")
    assert str(grid.gain(point, "qat+cr", "accuracy", "qat")).startswith("+2.00 [")
    assert str(grid.gain(point, "qat+cr", "teacher_accuracy", "qat+ema")) == "+12.00"
    assert str(grid.gain(point, "qat+kd", "accuracy", "qat")) == "+1.00"
    assert grid.gain(point, "qat+kd", "accuracy", "qat+ema") is None
    assert grid.gain(point, "qat", "accuracy", "qat") is None


def test_two_widths_at_once_a_switch_and_data_that_are_read_once(crcore, tmp_path, monkeypatch) -> None:
    read: list[str] = []

    def load_data(name: str, *, image_size: int | None) -> Any:
        read.append(name)
        return loader(name, image_size=image_size)

    loader = _sweep.load_data
    monkeypatch.setattr(_sweep, "load_data", load_data)
    options = ("--labels", 50, "--batch-size", 50, "--epochs", 1, "--seeds", 1, "--methods", "qat")
    outcome = crcore("sweep", *options, "--vary", "bits=2,4", "--vary", "flip=yes,no", "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert read == ["digits"]
    found = swept(tmp_path / "out")
    assert [point["values"] for point in found["points"]] == [
        {"bits": bits, "flip": flip} for bits in (2, 4) for flip in (True, False)
    ]
    assert [point["settings"]["activation_bits"] for point in found["points"]] == [2, 2, 4, 4]
    assert len(list((tmp_path / "out").rglob("float.safetensors"))) == 2
    assert "no confidence interval" in (tmp_path / "out/table.md").read_text()


def test_fewer_labels_and_fewer_unlabeled_images(crcore, tmp_path) -> None:
    options = ("--batch-size", 50, "--epochs", 1, "--seeds", 1, "--methods", "qat,qat+cr+unlabeled")
    axes = ("--vary", "labels=50,100", "--vary", "unlabeled=60,all")
    outcome = crcore("sweep", *options, *axes, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    values = [point["values"] for point in swept(tmp_path / "out")["points"]]
    assert [value["unlabeled"] for value in values] == [60, 1148, 60, 1098]
    assert len(list((tmp_path / "out").rglob("run.json"))) == 2 + 2 + 4


# Resume


KILLED = ["sweep", *TINY, "--vary", "consistency-weight=0.5,2", "--methods", "qat,qat+cr", "--seeds", "1"]


def process(folder: Path, *more: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "crcore.cli", *KILLED, "--out", str(folder), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_sweep_resumes_to_the_same_bits(crcore, tmp_path) -> None:
    assert crcore(*KILLED, "--out", tmp_path / "whole").status == 0
    running = process(tmp_path / "halves")
    assert running.stdout is not None
    for printed in running.stdout:
        if "qat+cr, consistency-weight 0.5: epoch 1/2" in printed:
            os.kill(running.pid, signal.SIGKILL)
            break
    running.communicate(timeout=60)
    assert running.returncode == -signal.SIGKILL
    assert swept(tmp_path / "halves")["complete"] is False
    assert "Not finished: 1 of 3 runs" in (tmp_path / "halves/table.md").read_text()
    outcome = crcore(*KILLED, "--out", tmp_path / "halves", "--resume")
    assert outcome.status == 0, outcome.err
    assert "seed 0 qat: finished earlier" in outcome.out
    assert "seed 0 qat+cr, consistency-weight 0.5: continues after step 2 of 4" in outcome.out
    whole, halves = contents(tmp_path / "whole"), contents(tmp_path / "halves")
    assert whole.keys() == halves.keys()
    for name, content in whole.items():
        assert halves[name] == content or name.endswith("run.json"), name  # which has the seconds


def test_ctrl_c_says_how_to_continue(crcore, tmp_path, monkeypatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_sweep, "_train_seed", interrupt)
    outcome = crcore(*KILLED, "--out", tmp_path / "out")
    assert outcome.status == 130
    assert f"--out {tmp_path / 'out'} --resume" in outcome.err


def test_a_finished_sweep_trains_nothing_and_values_axes_methods_and_seeds_may_be_added(crcore, tmp_path) -> None:
    folder = tmp_path / "out"
    base = ("sweep", *TINY, "--out", folder)
    assert crcore(*base, "--vary", "consistency-weight=0.5", "--methods", "qat", "--seeds", 1).status == 0
    first = contents(folder / "runs")
    again = crcore(*base, "--vary", "consistency-weight=0.5", "--methods", "qat", "--seeds", "0-0", "--resume")
    assert (again.status, trained(again.out)) == (0, [])
    more = ("--vary", "consistency-weight=0.5,2", "--vary", "temperature=1,2", "--methods", "qat,qat+cr")
    outcome = crcore(*base, *more, "--seeds", 2, "--resume")
    assert outcome.status == 0, outcome.err
    assert first.items() <= contents(folder / "runs").items()
    assert len(trained(outcome.out)) == 2 + 2 * 4 + 2 - 2
    assert swept(folder)["complete"] is True


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--vary", "consistency-weight=0.5", "--vary", "ramp=0.1,0.5"], ["--consistency-weight 0, which", "missing"]),
        (["--vary", "consistency-weight=0,0.5"], ["--ramp 0.1, 0.5, which", "missing"]),
        ([*VARY, "--lr", "0.5"], ["--lr 0.02"]),
        ([*VARY, "--seeds", "1"], ["--seeds 1"]),
        ([*VARY, "--methods", "qat"], ["--methods fp32"]),
    ],
)
def test_resuming_without_a_value_names_it(crcore, out, options, words) -> None:
    before = contents(out)
    outcome = crcore("sweep", *TINY, *METHODS_, *options, "--out", out, "--resume")
    refused(outcome, "--resume", *words)
    assert contents(out) == before


def test_what_an_earlier_version_did_not_store_counts_as_its_default(crcore, out) -> None:
    before = contents(out)
    stored = swept(out)
    assert stored["settings"].pop("teacher_batchnorm") == "average"
    assert stored["settings"].pop("freezing") is stored["settings"].pop("dampening") is None
    (out / "sweep.json").write_text(json.dumps(stored))
    arguments = ("sweep", *TINY, *METHODS_, *VARY, "--out", out, "--resume")
    refused(crcore(*arguments, "--teacher-batchnorm", "copy"), "--teacher-batchnorm average, which is now missing")
    outcome = crcore(*arguments)
    assert outcome.status == 0, outcome.err
    assert contents(out) == before


def test_other_images_are_noticed(crcore, out, parquet_folder) -> None:
    outcome = crcore("sweep", *TINY, *METHODS_, *VARY, "--data", parquet_folder, "--out", out, "--resume")
    refused(outcome, "--data digits")


def test_a_folder_that_is_no_sweep_of_ours(crcore, out, tmp_path) -> None:
    refused(crcore("sweep", *VARY, "--out", out), "not empty", "--resume")
    (tmp_path / "file").write_text("mine")
    refused(crcore("sweep", *VARY, "--out", tmp_path, "--resume"), "no sweep of crcore")
    (tmp_path / "sweep.json").write_text('{"points": [')
    refused(crcore("sweep", *VARY, "--out", tmp_path, "--resume"), "sweep.json is damaged")
    (tmp_path / "sweep.json").write_text('{"points": [3], "settings": {}, "data": []}')
    refused(crcore("sweep", *VARY, "--out", tmp_path, "--resume"), "sweep.json is damaged")


# Bad input


def refused(outcome: Any, *words: str) -> None:
    assert outcome.status == 2
    assert outcome.err.startswith("crcore: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.out == ""
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], ["--vary"]),
        (["--vary", "ramp"], ["NAME=V1,V2", "'ramp'"]),
        (["--vary", "ramp="], ["NAME=V1,V2"]),
        (["--vary", "ramp=0.1,,0.2"], ["NAME=V1,V2"]),
        (["--vary", "colour=red"], ["'colour' cannot be varied", "consistency-weight", "bits"]),
        (["--vary", "seeds=1,2"], ["'seeds' cannot be varied"]),
        (["--vary", "out=a,b"], ["'out' cannot be varied"]),
        (["--vary", "ramp=0.1,0.1"], ["twice"]),
        (["--vary", "temperature=1,1.0"], ["same point twice"]),
        (["--vary", "ramp=0.1", "--vary", "ramp=0.2"], ["--vary ramp and --vary ramp"]),
        (["--vary", "bits=2", "--vary", "weight-bits=2"], ["--vary bits and --vary weight-bits"]),
        (["--vary", "epochs=2,many"], ["--epochs", "'many'"]),
        (["--vary", "quantizer=lsq,int4"], ["--quantizer", "'int4'", "minmax"]),
        (["--vary", "flip=yes,maybe"], ["flip", "'maybe'", "yes or no"]),
        (["--vary", "ramp=0.1,2"], ["--ramp", "(0, 1]", "2"]),
        (["--vary", "bits=2,17"], ["--weight-bits", "17"]),
        (["--vary", "labels=100,5000"], ["--labels 5000", "1198"]),
        (["--vary", "unlabeled=100,1199"], ["--unlabeled 1199", "998"]),
        (["--vary", "labels=100,all", "--methods", "qat+cr+unlabeled"], ["unlabeled", "--labels N"]),
        (["--vary", "model=resnet8,resnet9000"], ["'resnet9000'"]),
        (["--vary", "ramp=0.1,0.2", "--seeds", "0"], ["--seeds"]),
        (["--vary", "epochs=99,100"], ["--vary epochs", "--student-view"]),
    ],
)
def test_every_point_is_checked_before_the_first_step(crcore, tmp_path, options, words) -> None:
    refused(crcore("sweep", "--epochs", 1, *options, "--out", tmp_path / "out"), *words)
    assert contents(tmp_path) == {}
