"""The benchmarks of PyTorch run, and docs/performance.md is what their results give. Nothing here depends on time."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SETTINGS = [
    "--networks",
    "tiny",
    "--rounds",
    "1",
    "--batch",
    "2",
    "--memory-batch",
    "2",
    "--shape",
    "2,4,8,8",
    "--small",
]
LIBRARIES = ("detach", "function", "torch-learnable", "brevitas", "torchao")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("results") / "torch_step-tiny.json"
    everything: dict[str, Any] = {}
    for measures, variants in (  # compilers take long, and so do processes
        ("compiled", ("crcore", "crcore-triton")),
        ("memory", ("crcore", "crcore-triton", "detach")),
        ("step,parts,scaling,quantizer", ("crcore", "crcore-triton", *LIBRARIES)),
    ):
        run(*SETTINGS, "--measure", measures, "--variants", ",".join(variants), "--out", str(path))
        everything |= json.loads(path.read_text())
    return everything


def run(*arguments: str, script: str = "torch_step.py") -> None:
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    environment = os.environ | {"TORCH_COMPILE_DISABLE": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def numbers(value: Any) -> list[float]:
    if isinstance(value, dict):
        value = [*value.values()]
    if isinstance(value, list):
        return [number for each in value for number in numbers(each)]
    return [value] if isinstance(value, (int, float)) and not isinstance(value, bool) else []


MEASURED = {"crcore", *LIBRARIES}


def test_steps_have_their_ratios(found: Any) -> None:
    for measure, variants in (("step", MEASURED), ("compiled", {"crcore"})):
        (entry,) = found[measure]
        assert (entry["network"], entry["batch"]) == ("tiny", 2)
        for clock in ("cpu", "wall"):
            assert entry["ratios"][clock].keys() == variants
            assert entry["median seconds"][clock].keys() == {"float", *variants}
            assert all(len(rounds) == 1 for rounds in entry["seconds by round"][clock].values())
        of_times = [entry[field] for field in ("ratios", "median seconds", "seconds by round")]
        assert all(math.isfinite(number) and number > 0 for number in numbers(of_times))


def test_what_cannot_be_measured_says_why(found: Any) -> None:
    for measure in ("step", "memory", "quantizer"):
        assert "triton" in found[measure][0]["not measured"]["crcore-triton"]


def test_compiled_networks_are_whole(found: Any) -> None:
    (entry,) = found["compiled"]
    assert entry["fullgraph"] is True
    assert entry["graph breaks"] == {"float": 0, "crcore": 0}
    assert entry["recompilations after the first steps"] == 0
    assert all(seconds > 0 for seconds in entry["seconds of the first steps"].values())


def test_parts_and_scaling(found: Any) -> None:
    (entry,) = found["parts"]
    alone = {"update alone", "teacher's forward alone"}
    assert entry["ratios"]["cpu"].keys() == {"average", "consistency"} | alone
    (row,) = found["scaling"]
    assert (row["what"], row["value"], row["ratios"]["cpu"].keys()) == ("batch", 2, {"crcore"})
    times = numbers([entry["ratios"], row["ratios"]])
    assert all(math.isfinite(number) and number > 0 for number in times)


def test_memory_is_that_of_the_step(found: Any) -> None:
    (entry,) = found["memory"]
    assert entry["bytes"].keys() == {"float", "crcore", "detach"}
    assert entry["ratios"].keys() == {"crcore", "detach"}
    assert all(number > 0 for number in numbers([entry["bytes"], entry["ratios"]]))
    saved = {name: sizes["saved"] for name, sizes in entry["bytes"].items()}
    assert saved["float"] < saved["crcore"] < saved["detach"]  # counted, not timed


def test_the_quantizer_alone(found: Any) -> None:
    (entry,) = found["quantizer"]
    assert (entry["shape"], entry["dtype"], entry["clock"]) == ([2, 4, 8, 8], "float32", "cpu")
    for way in ("forward", "backward", "both"):
        assert entry["in copies"][way].keys() >= MEASURED
        assert entry["share of the copy's bandwidth"][way].keys() == entry["in copies"][way].keys()
    assert all(math.isfinite(number) and number > 0 for number in numbers(entry["in copies"]))
    assert entry["copy, bytes per second"] > 0


def test_settings_and_versions_are_kept(found: Any) -> None:
    assert found["settings"]["rounds"] == 1
    assert found["threads"] == 1
    assert found["versions"].keys() >= {"python", "torch", "brevitas", "torchao"}
    assert found["machine"]["device"]


def test_the_page_is_what_the_results_give(found: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import performance_page

    for path in performance_page.PAGES:
        page = path.read_text(encoding="utf-8")
        assert performance_page.updated(page) == page, f"{path.name}: run python benchmarks/performance_page.py"

    monkeypatch.setattr(performance_page, "RESULTS", (tmp_path,))
    (tmp_path / "torch_step-tiny.json").write_text(json.dumps(found))
    blank = "\n".join(f"<!-- table {name} tiny -->\n<!-- end -->" for name in performance_page.TABLES)
    filled = performance_page.updated(blank)
    assert filled.count("| **crcore** |") >= 4
    assert performance_page.updated(filled) == filled


def test_students_of_other_libraries_are_trained_once(tmp_path: Path) -> None:
    few = ["--labels", "30", "--epochs", "2", "--float-epochs", "1", "--seeds", "1", "--consistency-weight", "5"]
    students = ["--libraries", "brevitas,torchao", "--students", "qat+ema,qat+cr+unlabeled"]
    run(*few, *students, "--out", str(tmp_path), script="other_students.py")
    runs = json.loads((tmp_path / "results.json").read_text())["runs"]
    assert [(each["library"], each["method"]) for each in runs] == [
        (library, method) for library in ("brevitas", "torchao") for method in ("qat+ema", "qat+cr+unlabeled")
    ]
    assert all(each["steps"] == 2 for each in runs)
    one = next((tmp_path / "seed0/torchao").glob("qat+cr*.json"))
    one.write_text(json.dumps(json.loads(one.read_text()) | {"accuracy": 12.5}))
    run(*few, *students, "--out", str(tmp_path), "--resume", script="other_students.py")
    assert json.loads((tmp_path / "results.json").read_text())["runs"][-1]["accuracy"] == 12.5
    assert "| 12.50 |" in (tmp_path / "table.md").read_text()


def test_students_of_other_libraries_are_trained_as_the_command_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import crcore_torch as crt
    import other_students

    import crcore as cr
    from crcore.cli import main
    from crcore.cli._recipes import quantizers

    # Without weight decay, which is on other parameters there; and with the student that the command makes.
    few = ["--labels", "60", "--epochs", "4", "--seeds", "1", "--weight-decay", "0", "--batch-size", "20"]
    recipe = cr.Recipe(*quantizers("lsq", 4, 4))
    monkeypatch.setattr(other_students.torch_students, "student", lambda library, net, x: crt.prepare(net, recipe))
    methods = ["qat+ema", "qat+cr", "qat+cr+unlabeled"]
    command = ["other_students.py", *few, "--libraries", "crcore", "--students", ",".join(methods)]
    monkeypatch.setattr(sys, "argv", [*command, "--out", str(tmp_path / "others")])
    other_students.main()
    assert main(["compare", *few, "--methods", ",".join(methods), "--out", str(tmp_path / "command")]) == 0
    others, own = (json.loads((tmp_path / name / "results.json").read_text())["runs"] for name in ("others", "command"))
    for column in ("accuracy", "teacher_accuracy"):
        found = [[run[column] for run in runs] for runs in (others, own)]
        assert found[0] == pytest.approx(found[1], abs=0.2)  # an image is 0.17 %
        assert len({round(value, 1) for value in found[0]}) == 3


@pytest.mark.parametrize(
    "wrong", [["--rounds", "0"], ["--batch", "32,x"], ["--shape", "3,3"], ["--variants", "lsq"], ["--measure", "time"]]
)
def test_wrong_arguments_are_refused(wrong: list[str]) -> None:
    command = [sys.executable, str(BENCHMARKS / "torch_step.py"), *wrong]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert wrong[0] in done.stderr


def test_only_what_is_still_there_counts_as_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import torch
    from torch_memory import Made

    with Made() as made:
        kept = [torch.zeros(1000) + 1.0]
        kept.append(kept[0][:10])  # a view keeps nothing of its own
        torch.zeros(5000) + 1.0
    assert sum(made.alive().values()) == 4000
