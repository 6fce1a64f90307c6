"""Where the time of a run went: in its record, on the screen, and nowhere else."""

import json

import pytest
import torch
from conftest import results

from crcore.cli import _clock, _training
from crcore.cli._clock import Clock
from crcore.cli._report import time_spent

TORCH_PARTS = {
    "fp32": {"data", "student", "update", "evaluation"},
    "qat": {"data", "student", "update", "evaluation"},
    "qat+kd": {"data", "student", "teacher", "update", "evaluation"},
    "qat+cr": {"data", "student", "teacher", "update", "evaluation"},
}


def test_each_run_says_where_its_time_went(finished) -> None:
    for run in results(finished)["runs"]:
        parts = run["seconds_by_part"]
        assert parts.keys() == TORCH_PARTS.get(run["method"], parts.keys())
        assert min(parts.values()) > 0
        assert sum(parts.values()) <= run["seconds"]
        stored = json.loads((finished / f"seed{run['seed']}/{run['method']}/run.json").read_text())
        assert stored["seconds_by_part"] == parts


def test_the_files_that_are_the_same_on_every_machine_have_no_times(finished) -> None:
    assert "Time:" not in (finished / "table.md").read_text()


@pytest.mark.parametrize(("command", "method"), [("compare", "--methods"), ("train", "--method")])
def test_the_screen_shows_shares_of_all_runs(crcore, tmp_path, command, method) -> None:
    outcome = crcore(command, method, "qat+cr", "--epochs", 2, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    (line,) = [line for line in outcome.out.splitlines() if line.startswith("Time:")]
    for part in ("data and augmentation", "teacher", "student", "optimizer and average", "tests"):
        assert part in line


def test_a_record_of_an_earlier_version_still_counts(crcore, tmp_path) -> None:
    arguments = ("compare", "--methods", "fp32", "--seeds", 1, "--epochs", 1, "--out", tmp_path / "out")
    assert crcore(*arguments).status == 0
    file = tmp_path / "out/seed0/fp32/run.json"
    record = json.loads(file.read_text())
    del record["seconds_by_part"]
    file.write_text(json.dumps(record))
    outcome = crcore(*arguments, "--resume")
    assert outcome.status == 0, outcome.err
    assert "finished earlier" in outcome.out
    assert "Time:" not in outcome.out


def test_an_unfinished_run_of_an_earlier_version_goes_on(crcore, tmp_path, monkeypatch) -> None:
    saved = _training.save_progress

    def save_as_before_and_stop(path, modules, optimizer, record) -> None:
        saved(path, modules, optimizer, {key: value for key, value in record.items() if key != "seconds_by_part"})
        raise KeyboardInterrupt

    arguments = ("compare", "--methods", "qat", "--seeds", 1, "--epochs", 3, "--out", tmp_path / "out")
    monkeypatch.setattr(_training, "save_progress", save_as_before_and_stop)
    assert crcore(*arguments).status == 130
    monkeypatch.setattr(_training, "save_progress", saved)
    outcome = crcore(*arguments, "--resume")
    assert outcome.status == 0, outcome.err
    assert "continues after step" in outcome.out
    assert results(tmp_path / "out")["runs"][0]["seconds_by_part"].keys() == TORCH_PARTS["qat"]


def test_a_resumed_run_adds_to_its_parts(crcore, tmp_path, monkeypatch) -> None:
    saved = _training.save_progress
    kept: list[dict[str, float]] = []

    def save_and_stop(path, modules, optimizer, record) -> None:
        saved(path, modules, optimizer, record)
        kept.append(dict(record["seconds_by_part"]))
        raise KeyboardInterrupt

    arguments = ("compare", "--methods", "fp32", "--seeds", 1, "--epochs", 2, "--out", tmp_path / "out")
    monkeypatch.setattr(_training, "save_progress", save_and_stop)
    assert crcore(*arguments).status == 130
    monkeypatch.setattr(_training, "save_progress", saved)
    assert crcore(*arguments, "--resume").status == 0
    parts = results(tmp_path / "out")["runs"][0]["seconds_by_part"]
    assert all(parts[part] > seconds for part, seconds in kept[0].items())


def test_a_part_lasts_from_the_end_of_the_part_before_it(monkeypatch) -> None:
    now = iter([10.0, 11.0, 13.0, 16.0, 100.0, 104.0])
    monkeypatch.setattr(_clock.time, "perf_counter", lambda: next(now))
    seconds = {"data": 0.5}
    clock = Clock(torch.device("cpu"), seconds)
    clock.start()
    clock.lap("data")
    clock.lap("student")
    clock.settle()
    assert seconds == {"data": 1.5, "student": 2.0}
    clock.lap("data")
    clock.settle()
    assert seconds == {"data": 4.5, "student": 2.0}
    clock.start()  # what was between belongs to no part
    clock.lap("student")
    clock.settle()
    assert seconds == {"data": 4.5, "student": 6.0}


def test_shares_are_of_all_runs_that_have_them() -> None:
    runs = [{"seconds_by_part": {"student": 6.0, "data": 1.0}}, {}, {"seconds_by_part": {"network": 12.0, "data": 1.0}}]
    assert time_spent(runs) == "Time: 20 s; data and augmentation 10.0 %, student 30.0 %, network 60.0 %."
    assert time_spent([{}]) is None
