"""README and docs: their Python runs, their commands parse, their links lead somewhere, every name is listed."""

import importlib.util
import json
import re
import shlex
from pathlib import Path

import crcore_keras
import crcore_torch
import pytest

import crcore
import crcore.flatness
import crcore.testing
from crcore.cli._arguments import build_parser, settings_from

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(ROOT.glob("docs/*.md"))
PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)

# A block may be preceded by code that readers do not see, or by the reason why it is not run.
BLOCK = re.compile(
    r"(?:^<!-- before:\n(?P<before>.*?)^-->\n)?(?P<skip>^<!-- not run: [^\n]*-->\n)?^```python\n(?P<code>.*?)^```$",
    re.M | re.S,
)
CONSOLE = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)


def blocks(text: str) -> list[tuple[int, str, bool]]:
    """First line, code, and whether it is run, of each Python block, in order."""
    found = []
    for match in BLOCK.finditer(text):
        for group in ("before", "code"):
            if match[group] is not None:
                line = text.count("\n", 0, match.start(group)) + 1
                found.append((line, match[group], match["skip"] is None))
    return found


@PAGE
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": page.stem}
    for line, code, runs in blocks(page.read_text(encoding="utf-8")):
        compiled = compile("\n" * (line - 1) + code, str(page), "exec")
        if runs:
            exec(compiled, namespace)


def test_a_block_is_found_with_its_line() -> None:
    text = "a\n<!-- before:\nx\n-->\n```python\ny\n```\n<!-- not run: slow -->\n```python\nz\n```\n```python\nz\n```\n"
    assert blocks(text) == [(3, "x\n", True), (6, "y\n", True), (10, "z\n", False), (13, "z\n", True)]


@PAGE
def test_commands_parse(page: Path) -> None:
    parser = build_parser("0")
    for block in CONSOLE.findall(page.read_text(encoding="utf-8")):
        for line in block.splitlines():
            words = shlex.split(line)
            if words[0] == "crcore":
                options = parser.parse_args(words[1:])
                if options.command in ("compare", "train"):
                    settings_from(options)
            elif words[0] == "make":
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), line
            else:
                assert words[:2] == ["pip", "install"], line


@PAGE
def test_links_lead_to_files_and_headings(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if re.match(r"https?://", target):
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M)
            assert heading in {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}, target


@pytest.mark.parametrize(
    "module", [crcore, crcore_torch, crcore_keras, crcore.flatness, crcore.testing], ids=lambda module: module.__name__
)
def test_every_public_name_is_listed(module: object) -> None:
    sections = (ROOT / "docs/api.md").read_text(encoding="utf-8").split("\n## ")
    (section,) = (s for s in sections if s.startswith(f"`{module.__name__}`\n"))
    listed = {name.strip("`") for row in re.findall(r"^\| \[(.*?)\]", section, re.M) for name in row.split(", ")}
    assert {name for name in listed if "." not in name} == set(module.__all__)


def test_the_parity_table_of_readme_is_that_of_the_parity_page() -> None:
    """The page's is made by benchmarks/training_parity.py; README shows its last step."""
    page = (ROOT / "docs/parity.md").read_text(encoding="utf-8")
    made = page.partition("<!-- training parity: begin -->")[2].partition("<!-- training parity: end -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in made.splitlines() if line.startswith("|")]
    last = [[row[0], *row[2:]] for row in rows if row[1] == "50"]
    shown = re.findall(r"^\| ((?:Keras on|PyTorch in) .*) \|$", (ROOT / "README.md").read_text(encoding="utf-8"), re.M)
    assert [row.split(" | ") for row in shown] == last
    assert len(last) == 4


def test_the_speed_table_is_that_of_the_result_files() -> None:
    page = (ROOT / "benchmarks/README.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (?:JAX|TensorFlow|torch)\b.*? \| ([\d. |]+) \|$", page, re.M)
    found = []
    for name in ("jax", "tensorflow-xla", "tensorflow", "torch"):
        result = json.loads((ROOT / f"benchmarks/results/keras_step-{name}.json").read_text(encoding="utf-8"))
        ratios = [
            result["ratios"][key] for key in ("qat / float", "consistency / qat", "average / qat", "hgq2 / float")
        ]
        found.append(" | ".join(f"{x:.2f}" for x in [*ratios, result["median seconds per step"]["float"]]))
    assert shown == found


def test_the_table_of_the_readme_is_that_of_the_result_file() -> None:
    rows = json.loads((ROOT / "benchmarks/results/verify_exports.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    chosen = [row for row in rows if row["model"] == "resnet18" and row["kind"] != "ONNX, sums in float"]
    assert len(chosen) == 8
    for row in chosen:
        found, width = row["result"], f"W{row['weights']}A{row['activations']}"
        percent = [f"{found[name]:.2f} %" for name in ("accuracy", "expected_accuracy", "agreement")]
        cells = [width, row["kind"].partition(",")[0], *percent, f"{found['size'] / found['float_size']:.3f}"]
        assert f"| {' | '.join(cells)} |" in page


@pytest.mark.parametrize(
    ("marker", "script", "function", "result"),
    [
        ("verification", "verify_exports", "table", "verify_exports"),
        ("vit", "verify_exports", "table", "verify_exports-vit"),
        ("speed", "deploy", "tables", "deploy"),
    ],
)
def test_the_tables_of_the_deploy_page_are_those_of_the_result_files(
    marker, script, function, result, monkeypatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))  # where scripts find what they share
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    shown = page.partition(f"<!-- {marker}: begin -->")[2].partition(f"<!-- {marker}: end -->")[0]
    described = importlib.util.spec_from_file_location(script, ROOT / f"benchmarks/{script}.py")
    module = importlib.util.module_from_spec(described)
    described.loader.exec_module(module)
    results = json.loads((ROOT / f"benchmarks/results/{result}.json").read_text(encoding="utf-8"))
    assert shown.strip() == getattr(module, function)(results).strip()
    assert shown.count("|") > 50


def test_the_table_of_where_time_goes_is_that_of_the_result_file() -> None:
    cases = json.loads((ROOT / "benchmarks/results/compare_breakdown.json").read_text(encoding="utf-8"))["cases"]
    page = (ROOT / "docs/compare.md").read_text(encoding="utf-8").partition("## Where the time goes")[2]
    shown = re.findall(r"^\| .*? \| ([\d. %|]+) \|$", page.partition("\n## ")[0], re.M)
    found = []
    for case in cases.values():
        steps = {
            method: {part: spent for part, spent in seconds.items() if part != "evaluation"}
            for method, seconds in case.items()
        }
        shares = (100 * steps[method]["data"] / sum(steps[method].values()) for method in ("fp32", "qat", "qat+cr"))
        found.append(" | ".join(f"{share:.1f} %" for share in shares))
    assert shown == found
    assert len(found) == 9


@pytest.mark.parametrize(("heading", "run"), [("Digits", "digits"), ("CIFAR-10", "cifar10-jpeg-4000")])
def test_the_results_of_the_readme_are_those_of_the_recorded_runs(heading, run) -> None:
    def rows(text: str) -> list[list[str]]:
        return [line.split(" | ")[:5] for line in text.splitlines() if re.match(r"\| (fp32|qat)", line)]

    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(f"### {heading}")[2].partition("\n#")[0]
    recorded = rows((ROOT / f"docs/results/{run}/table.md").read_text(encoding="utf-8"))
    assert rows(section) == recorded
    assert len(recorded) == 6


def test_the_tables_of_results_are_what_the_recorded_runs_give(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence
    import results_page

    for file in results_page.PAGES:
        text = file.read_text(encoding="utf-8")
        assert results_page.updated(text) == text
    page = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    shown = {match["name"] for match in results_page.PART.finditer(page) if match["kind"] != "overview"}
    assert shown <= set(evidence.RUNS)
    missing = page.partition("## What was not measured")[2]
    for name, run in evidence.RUNS.items():
        if name in shown:
            assert {file.name for file in (ROOT / "docs/results" / name).iterdir()} == set(run.kept)
        else:
            assert f"`{name}`" in missing


def test_the_commands_of_the_evidence_parse(monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import evidence

    for run in evidence.RUNS.values():
        program, *words = shlex.split(run.command.format(data="cifar10/", networks="a b"))
        if program == "crcore":
            build_parser("0").parse_args(words)
        else:
            assert (ROOT / words[0]).is_file()
