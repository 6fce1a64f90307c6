"""`crcore report`: the page in a real browser, its words and numbers, and what it says of files that are gone."""

from __future__ import annotations

import html
import json
import re
import shlex
import shutil
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import contents, results
from playwright.sync_api import Browser, Page, sync_playwright

from crcore.cli import main
from crcore.cli._arguments import build_parser, settings_from
from crcore.cli._verdict import command_line

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync")  # fmt: skip
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(1)>&amp;$x^2$'.replace("/", ":")  # no / in file names
SECTIONS = ["run", "table", "training", "layers", "flatness", "sensitivity", "oscillation"]


def browser_path(own: str) -> str:
    """A Chromium on this machine; `own` is where Playwright would have put one."""
    found = next(filter(None, map(shutil.which, (*NAMES, own))), None)
    if found is None:
        pytest.fail(
            f"no browser to show the page in: none of {', '.join(NAMES)} is installed. As root on Debian or Ubuntu, "
            "`make browser` installs one; elsewhere install one of these"
        )
    return found


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        path = browser_path(playwright.chromium.executable_path)
        opened = playwright.chromium.launch(executable_path=path, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, parquet_folder: Path) -> Path:
    """A comparison on data whose name a page must not take for markup."""
    folder = tmp_path_factory.mktemp("report")
    data = folder / HOSTILE
    shutil.copytree(parquet_folder, data)
    options = ["--methods", "fp32,qat,qat+cr", "--seeds", "2", "--epochs", "2", "--labels", "30"]
    out = folder / "out"
    assert main(["compare", "--data", str(data), *options, "--batch-size", "15", "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="session")
def page_file(run: Path) -> Path:
    before = contents(run)
    assert main(["report", str(run)]) == 0
    after = contents(run)
    assert after.keys() - before.keys() == {"report.html"}
    assert before.items() <= after.items()
    return run / "report.html"


@pytest.fixture
def changed(run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return Path(shutil.copytree(run, tmp_path / "changed"))


@pytest.fixture
def bare(run: Path, tmp_path: Path) -> Path:
    """A copy without checkpoints, whose page is made quickly."""
    return Path(shutil.copytree(run, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors")))


def opened(browser: Browser, file: Path, *, width: int = 1280, scheme: Any = "light") -> tuple[Page, list[str]]:
    """The page without a network, and all that it asked for, complained of or ran into."""
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page, events = context.new_page(), []
    page.on("console", lambda message: events.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: events.append(f"error: {error}"))
    page.on("dialog", lambda dialog: events.append(f"dialog: {dialog.message}"))
    page.on("request", lambda request: events.append(f"request: {request.url}"))
    page.goto(file.as_uri())
    return page, events


def text_of(crcore: Any, run: Path, *options: object) -> str:
    """The words of a page that is written now."""
    outcome = crcore("report", run, "--out", run / "page.html", *options)
    assert outcome.status == 0, outcome.err
    source = (run / "page.html").read_text(encoding="utf-8")
    without = re.sub(r"<svg.*?</svg>|<style.*?</style>", "", source, flags=re.S)
    return html.unescape(re.sub(r"<[^>]*>", " ", without)).replace("\xa0", " ")


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (400, "light")])
def test_a_browser_shows_every_section_and_figure(browser, page_file, width, scheme) -> None:
    page, events = opened(browser, page_file, width=width, scheme=scheme)
    assert events == [f"request: {page_file.as_uri()}"]
    page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert page.evaluate("[...document.querySelectorAll('section')].map(each => each.id)") == SECTIONS
    for name in SECTIONS:
        box = page.locator(f"section#{name}").bounding_box()
        assert box is not None
        assert box["width"] > 300
        assert box["height"] > 100
        assert page.locator(f"section#{name} h2").is_visible()
    boxes = page.evaluate(
        "[...document.querySelectorAll('svg')].map(each => [each.getBoundingClientRect(), each.getBBox()])"
        ".map(([shown, drawn]) => [shown.width, shown.height, shown.right, drawn.width])"
    )
    assert len(boxes) == 40 + 2 + 5 + 1  # two networks of ten layers, their errors, training, gains
    assert all(shown > 100 and high > 60 and right <= width and drawn > 50 for shown, high, right, drawn in boxes)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_print_shows_what_is_folded(browser, page_file) -> None:
    page, _ = opened(browser, page_file, scheme="dark")
    page.emulate_media(media="print")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    folded = page.locator("details:not([open]) svg")
    assert folded.count() == 20
    assert all(folded.nth(number).bounding_box()["height"] > 50 for number in range(20))


def test_text_and_lines_of_figures_stand_out_from_the_page(browser, page_file) -> None:
    for scheme, dark in (("light", False), ("dark", True)):
        page, _ = opened(browser, page_file, scheme=scheme)
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        ink = page.evaluate("getComputedStyle(document.querySelector('svg text')).fill")
        brightness = [statistics.fmean(map(float, re.findall(r"[\d.]+", colour)[:3])) for colour in (back, ink)]
        assert (brightness[0] < brightness[1]) == dark
        assert abs(brightness[0] - brightness[1]) > 128


def test_the_table_holds_the_numbers_of_the_results(browser, page_file, run) -> None:
    page, _ = opened(browser, page_file)
    rows = page.evaluate(
        "[...document.querySelectorAll('#table tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
    )
    runs = results(run)["runs"]
    assert [row[0] for row in rows] == ["fp32", "qat", "qat+cr"]
    for row in rows:
        for column, cell in (("accuracy", row[1]), ("teacher_accuracy", row[2])):
            values = [each[column] for each in runs if each["method"] == row[0]]
            expected = "-" if None in values else f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"
            assert cell == expected


def test_names_from_files_are_text(browser, page_file) -> None:
    page, events = opened(browser, page_file)
    assert HOSTILE in page.title()
    assert HOSTILE in page.locator("h1").inner_text()
    assert page.evaluate("document.querySelectorAll('script, img, iframe, link, object').length") == 0
    assert not [event for event in events if event.startswith(("dialog", "error", "console"))]


def test_each_name_stands_once_and_links_lead_to_one(browser, page_file) -> None:
    page, _ = opened(browser, page_file)
    names = page.evaluate("[...document.querySelectorAll('[id]')].map(each => each.id)")
    assert len(names) == len(set(names))
    links = page.evaluate("[...document.querySelectorAll('[href]')].map(each => each.getAttribute('href'))")
    used = re.findall(r'(?:xlink:href="|url\()#(\w+)', page_file.read_text())
    assert [f"#{name}" for name in SECTIONS] == [link for link in links if link[1:] in SECTIONS]
    assert {*used, *(link[1:] for link in links)} <= set(names)


def test_every_figure_says_what_it_shows(page_file) -> None:
    source = page_file.read_text()
    labels = re.findall(r'<svg [^>]*role="img" aria-label="([^"]+)"', source)
    assert len(labels) == source.count("<svg")
    assert "weight of blocks.0.residual.0, qat+cr" in labels
    assert len(set(labels)) == len(labels)


def test_a_usual_page_is_small(page_file) -> None:
    assert page_file.stat().st_size < 1_000_000


def test_the_command_on_the_page_gives_the_same_settings(run, page_file) -> None:
    settings = results(run)["settings"]
    line = command_line("compare", settings, engine=None)
    assert line in html.unescape(page_file.read_text())
    again = settings_from(build_parser("").parse_args(shlex.split(line)[1:]))
    assert again.to_dict() | {"engine": "torch"} == settings


def test_a_run_of_train_is_shown_too(crcore, run, tmp_path) -> None:
    init = run / "seed1/fp32/float.safetensors"
    options = ("--method", "qat+ema", "--seed", 1, "--init", init, "--epochs", 1, "--labels", 30, "--batch-size", 15)
    outcome = crcore("train", "--data", run.parent / HOSTILE, *options, "--out", tmp_path / "one")
    assert outcome.status == 0, outcome.err
    text = text_of(crcore, tmp_path / "one")
    assert "Nothing to compare" in text
    assert "crcore train" in text
    assert "qat+ema, average, seed 1" in text


def test_an_unfinished_run_is_shown_and_named_so(crcore, bare) -> None:
    found = results(bare)
    found |= {"complete": False, "runs": [*found["runs"][:3], found["runs"][5]]}  # of seed 1, qat is not there yet
    (bare / "results.json").write_text(json.dumps(found))
    text = text_of(crcore, bare)
    assert "not finished: 4 of 6 networks" in text
    assert "with one seed, which gives no interval" in text
    assert text.count("no checkpoint is left to measure") == 2


def test_what_is_gone_is_said_and_the_rest_is_shown(crcore, changed) -> None:
    shutil.rmtree(changed / "seed0/qat")
    (changed / "seed0/qat+cr/student.safetensors").write_bytes(b"not a network")
    text = text_of(crcore, changed)
    assert re.search(r"qat: \S*student.safetensors: no such checkpoint", text)
    assert re.search(r"qat\+cr: \S*student.safetensors cannot be read", text)
    assert "What was run" in text
    assert "Quantizers of" not in text


def test_data_that_are_gone_are_said_so(crcore, changed, run, tmp_path) -> None:
    moved = tmp_path / "moved"
    data = run.parent / HOSTILE
    data.rename(moved)
    try:
        text = text_of(crcore, changed)
        assert "no such folder" in text
        assert "Quantizers of" not in text
        text = text_of(crcore, changed, "--data", moved, "--seed", 1)
        assert "Quantizers of qat, student, seed 1" in text
        assert "are not those of the run" not in text
    finally:
        moved.rename(data)


def test_other_images_than_those_of_the_run_are_named(crcore, changed) -> None:
    found = results(changed)
    found["data"]["fingerprint"] = "another"
    (changed / "results.json").write_text(json.dumps(found))
    shutil.rmtree(changed / "seed0/qat+cr")
    assert "are not those of the run" in text_of(crcore, changed)


def head(kind: str, **values: Any) -> str:
    common = {"format": 1, "kind": kind, "checkpoint": "c", "model": "resnet8", "role": "teacher", "method": "qat+cr"}
    return json.dumps(common | {"data": "d", "samples": 64, "settings": {"split": "test"}, "versions": {}} | values)


def measurements(folder: Path) -> None:
    """What `crcore flatness` and `crcore sensitivity` leave beside a checkpoint."""
    density = {"values": [0.0, 1.0, 2.0], "density": [0.9, 0.0, 0.1]}
    trace = {"mean": 41.5, "half": 2.25}
    flat = head("flatness", parameters=9, eigenvalues=[12.125, 3.0], trace=trace, density=density)
    (folder / "teacher-flatness.json").write_text(flat)
    values = {"mean": [0.1, 0.4], "low": [0.1, 0.3], "high": [0.1, 0.5]}
    curve = {"group": "input", "unit": "std", "levels": [0, 1], "loss": values, "accuracy": values}
    curves = [curve | {"name": name} for name in ("gaussian noise", "<b>blur</b>")]
    sharp = {"radius": [0.1, 0.2], "increase": [1.0, 3.0]}
    (folder / "teacher-sensitivity.json").write_text(head("sensitivity", curves=curves, sharpness=sharp))


def test_measurements_beside_checkpoints_are_shown(crcore, browser, bare) -> None:
    measurements(bare / "seed0/qat+cr")
    (bare / "seed1/qat+cr/teacher-flatness.json").write_text('{"format": 1, "kind": "flatness"}')
    (bare / "seed1/qat+cr/teacher-sensitivity.json").write_text("[")
    text = text_of(crcore, bare)
    assert "seed0/qat+cr/teacher 12.12 41.5 ± 2.2 64 of d, test" in " ".join(text.split())
    for kind in ("flatness", "sensitivity"):
        assert f"seed1/qat+cr/teacher-{kind}.json cannot be read" in text
    page, events = opened(browser, bare / "page.html")
    assert page.locator("#flatness svg").count() == 2
    assert page.locator("#sensitivity svg").count() == 5
    assert page.locator("svg[aria-label='Loss under <b>blur</b>'] text").filter(has_text="<b>blur</b> (std)").count()
    assert len(events) == 1


def test_measurements_that_lack_what_is_drawn_are_named(crcore, bare) -> None:
    measurements(bare / "seed0/qat+cr")
    for kind, damage in (("flatness", {"eigenvalues": []}), ("sensitivity", {"curves": [{"name": "noise"}]})):
        file = bare / f"seed0/qat+cr/teacher-{kind}.json"
        (bare / f"seed1/qat+cr/teacher-{kind}.json").write_text(json.dumps(json.loads(file.read_text()) | damage))
    text = text_of(crcore, bare)
    for kind in ("flatness", "sensitivity"):
        assert f"seed1/qat+cr/teacher-{kind}.json cannot be read" in text
    assert "seed0/qat+cr/teacher 12.12" in " ".join(text.split())


def test_measurements_that_are_missing_are_named_with_their_command(run, page_file) -> None:
    assert html.unescape(page_file.read_text()).count(f"<code>crcore report {run} --measure</code>") == 2


@pytest.mark.parametrize(
    ("shape", "words"),
    [("constant", "lambda 1.0, from the first step;"), ("cosine", "reached after 0.3 of the steps (cosine)")],
)
def test_the_rise_of_lambda_is_told_as_it_was(crcore, bare, shape, words) -> None:
    _with(bare, shape, "settings", "ramp_shape")
    assert words in text_of(crcore, bare)


def test_oscillation_is_shown_where_it_was_recorded(crcore, bare) -> None:
    found = results(bare)
    for each in found["runs"]:
        if each["method"] == "qat":
            each["oscillation"] = {"flipped": 0.05 + 0.01 * each["seed"], "oscillating": 0.02}
        if each["method"] == "qat+cr":
            each["oscillation"] = {"flipped": 0.5, "oscillating": 0.25, "frozen": 0.125}
    (bare / "results.json").write_text(json.dumps(found))
    words = " ".join(text_of(crcore, bare).split())
    assert "qat 5.50 ± 0.71 2.00 ± 0.00 -" in words
    assert "qat+cr 50.00 ± 0.00 25.00 ± 0.00 12.50 ± 0.00" in words


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda out: shutil.rmtree(out), "no such folder"),
        (lambda out: (out / "results.json").unlink(), "no finished run yet"),
        (lambda out: [file.unlink() for file in out.glob("*.json")], "no results.json"),
        (lambda out: (out / "results.json").write_text("{"), "damaged"),
        (lambda out: (out / "results.json").write_text("[]"), "damaged"),
        (lambda out: (out / "results.json").write_bytes(b"\xff\xfe"), "damaged"),
        (lambda out: _without(out, "settings", "model"), "model missing in settings"),
        (lambda out: _without(out, "data", "test"), "test missing in data"),
        (lambda out: _without(out, "runs", 0, "history"), "history missing in a run"),
        (lambda out: _without(out, "runs", 0, "history", 0, "task"), "task missing in the history"),
        (lambda out: _without(out, "runs"), "runs missing in the file"),
        (lambda out: _without(out, "runs", 0, "history", 0), "history of fp32 is not as long"),
        (lambda out: _with(out, [], "runs"), "no run in it"),
        (lambda out: _with(out, "high", "runs", 1, "accuracy"), "accuracy in a run is 'high'"),
        (lambda out: _with(out, 3, "settings", "seeds"), "seeds in settings is 3"),
        (lambda out: _with(out, "sweep", "command"), "written by sweep"),
        (lambda out: (out / "results.json").rename(out / "sweep.json"), "is a sweep"),
    ],
)
def test_a_folder_that_holds_no_run_is_refused(crcore, bare, tmp_path, make, words) -> None:
    make(bare)
    outcome = crcore("report", bare, "--out", tmp_path / "page.html")
    assert (outcome.status, outcome.out) == (2, "")
    assert words in outcome.err
    assert not list(tmp_path.glob("page.html*"))


def _with(out: Path, value: Any, *place: Any) -> None:
    found = inner = results(out)
    for key in place[:-1]:
        inner = inner[key]  # type: ignore[assignment]
    inner[place[-1]] = value
    (out / "results.json").write_text(json.dumps(found))


def _without(out: Path, *place: Any) -> None:
    found = inner = results(out)
    for key in place[:-1]:
        inner = inner[key]  # type: ignore[assignment]
    del inner[place[-1]]
    (out / "results.json").write_text(json.dumps(found))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--out", "page.txt"), "must end in .html"),
        (("--out", "nowhere/page.html"), "there is no folder nowhere"),
        (("--seed", 7), "finished runs of seed 0, 1"),
    ],
)
def test_an_option_that_cannot_be_followed_is_refused(crcore, run, monkeypatch, tmp_path, options, words) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = crcore("report", run, *options)
    assert outcome.status == 2
    assert words in outcome.err
    assert contents(tmp_path) == {}


def test_a_missing_browser_fails_with_what_to_install(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pytest.fail.Exception, match="make browser"):
        browser_path(str(tmp_path / "none"))
