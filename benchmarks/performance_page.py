"""Write the tables of docs/performance.md and README.md from the measurements of torch_step.py.

A table stands between two lines of the page, `<!-- table MEASURE NAME -->` and `<!-- end -->`; its numbers come from
torch_step-NAME.json in benchmarks/results, or, for other machines, in a folder of docs/results. Ratios have their
quartiles beside them, and are sorted; on a CPU they are of CPU time, on CUDA of the wall.

examples:
  python benchmarks/performance_page.py            rewrite the tables
  python benchmarks/performance_page.py --check    say whether they are what the results give
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shared import rewrite

ROOT = Path(__file__).parents[1]
PAGES = (ROOT / "docs" / "performance.md", ROOT / "README.md")
RESULTS = (
    ROOT / "benchmarks" / "results",
    *sorted(path for path in (ROOT / "docs" / "results").iterdir() if path.is_dir()),
)
TABLE = re.compile(r"(<!-- table (?P<measure>\w+) (?P<name>[\w.-]+) -->\n).*?(<!-- end -->)", re.S)
TITLES = {
    "crcore": "**crcore**",
    "crcore-core": "crcore, kernel core",
    "crcore-blocked": "crcore, kernel blocked",
    "crcore-cpp": "crcore, kernel cpp",
    "crcore-triton": "crcore, kernel triton",
    "detach": "LSQ by detach",
    "function": "LSQ as autograd.Function",
    "torch-learnable": "torch's learnable operator",
    "brevitas": "Brevitas",
    "torchao": "torchao",
    "nncf": "NNCF",
    "modelopt": "Model Optimizer",
    "resnet18": "ResNet-18",
    "mobilenetv2": "MobileNetV2",
    "vit": "ViT",
}


def main() -> None:
    """Rewrite the pages, or check them."""
    rewrite(PAGES, updated, __doc__)


def updated(page: str) -> str:
    """The page with its tables made anew."""

    def made(match: re.Match[str]) -> str:
        file = f"torch_step-{match['name']}.json"
        if match["measure"] not in TABLES:
            raise SystemExit(f"no table {match['measure']!r}; there are {', '.join(TABLES)}")
        path = next((folder / file for folder in RESULTS if (folder / file).exists()), None)
        if path is None:
            raise SystemExit(
                f"{file} is missing; make it with: python benchmarks/torch_step.py --out {RESULTS[0] / file}"
            )
        text = TABLES[match["measure"]](json.loads(path.read_text(encoding="utf-8")))
        return f"{match[1]}\n{text}\n\n{match[4]}"

    return TABLE.sub(made, page)


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def with_spread(value: dict[str, Any] | None) -> str:
    """A median and its quartiles."""
    if value is None:
        return "-"
    low, high = value["quartiles"]
    return f"{value['median']:.2f} ({low:.2f}-{high:.2f})"


def clock(found: dict[str, Any]) -> str:
    """The one that other processes disturb least."""
    return "cpu" if "cpu" in found["ratios"] else "wall"


def title(name: str) -> str:
    """For people."""
    first, comma, rest = name.partition(", ")
    return TITLES.get(first, first) + comma + rest


def case(entry: dict[str, Any], entries: list[dict[str, Any]]) -> str:
    """What a column is about; the batch is named where it differs."""
    several = len({other["batch"] for other in entries}) > 1
    return title(entry["network"]) + (f", batch {entry['batch']}" if several else "")


def by_variant(entries: list[dict[str, Any]], cell: Callable[[dict[str, Any], str], str], names: list[str]) -> str:
    """Variants down, networks across, and below what was not measured."""
    head = ["", *(case(entry, entries) for entry in entries)]
    text = grid(head, [[title(name), *(cell(entry, name) for entry in entries)] for name in names])
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        for name, reason in entry.get("not measured", {}).items():
            reasons.setdefault(f"{title(name)} ({reason})", []).append(case(entry, entries))
    listed = [
        reason + ("" if len(where) == len(entries) else f" for {', '.join(where)}") for reason, where in reasons.items()
    ]
    return text + (f"\n\nNot measured: {'; '.join(listed)}." if listed else "")


def ratios_of(entry: dict[str, Any]) -> dict[str, Any]:
    """By the clock of the table."""
    return entry["ratios"][clock(entry)]  # type: ignore[no-any-return]


def sorted_names(entries: list[dict[str, Any]], value: Callable[[dict[str, Any], str], float | None]) -> list[str]:
    """All variants, by the mean over the networks where they were measured."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        for name in entry_names(entry):
            if (number := value(entry, name)) is not None:
                found.setdefault(name, []).append(number)
    return sorted(found, key=lambda name: sum(found[name]) / len(found[name]))


def entry_names(entry: dict[str, Any]) -> list[str]:
    """The variants that have a ratio."""
    return list(ratios_of(entry) if "median seconds" in entry else entry["ratios"])


def of_steps(entries: list[dict[str, Any]]) -> str:
    """Over the float step; and what that took."""
    names = sorted_names(entries, lambda entry, name: ratios_of(entry)[name]["median"])
    base = ", ".join(
        f"{case(entry, entries)} {1e3 * entry['median seconds'][clock(entry)]['float']:.3g}" for entry in entries
    )
    table = by_variant(entries, lambda entry, name: with_spread(ratios_of(entry).get(name)), names)
    return f"{table}\n\nThe float step, ms: {base}."


def step(found: dict[str, Any]) -> str:
    """Eager."""
    return of_steps(found["step"])


def throughput(found: dict[str, Any]) -> str:
    """Images per second, by the wall."""
    entries = found["step"]
    names = sorted_names(entries, lambda entry, name: ratios_of(entry)[name]["median"])

    def cell(entry: dict[str, Any], name: str) -> str:
        return f"{entry['images per second'][name]:,.0f}" if name in entry["images per second"] else "-"

    return by_variant(entries, cell, ["float", *names])


def compiled(found: dict[str, Any]) -> str:
    """Compiled over compiled."""
    entries = found["compiled"]
    rows = [
        [
            title(entry["network"]),
            str(entry["batch"]),
            title(name),
            with_spread(ratios_of(entry).get(name)),
            f"{seconds:.0f}",
            str(entry["graph breaks"][name]),
        ]
        for entry in entries
        for name, seconds in entry["seconds of the first steps"].items()
    ]
    again = sum(entry["recompilations after the first steps"] for entry in entries)
    head = ["network", "batch", "", "over float", "first two steps, s", "graph breaks"]
    return f"{grid(head, rows)}\n\nRecompilations after the first steps: {again}."


def parts(found: dict[str, Any]) -> str:
    """Over the QAT step."""
    entries = found["parts"]
    names = ["consistency", "average", "teacher's forward alone", "update alone"]

    def cell(entry: dict[str, Any], name: str) -> str:
        value = ratios_of(entry)[name]
        return with_spread(value) if value["median"] > 0.1 else f"{value['median']:.4f}"

    return by_variant(entries, cell, names)


def memory(found: dict[str, Any]) -> str:
    """At the peak, and saved for backward."""
    entries = found["memory"]
    names = sorted_names(entries, lambda entry, name: entry["ratios"][name]["peak"])

    def cell(entry: dict[str, Any], name: str) -> str:
        ratio = entry["ratios"].get(name)
        return ", ".join(f"{value:.2f}" for value in ratio.values()) if ratio else "-"

    base = ", ".join(
        f"{case(entry, entries)} " + " and ".join(f"{value / 2**20:.0f}" for value in entry["bytes"]["float"].values())
        for entry in entries
    )
    return f"{by_variant(entries, cell, names)}\n\nThe float step, MiB: {base}. Batch {entries[0]['batch']}."


def summary(found: dict[str, Any]) -> str:
    """Time and memory in one."""
    steps, memories = found["step"], {entry["network"]: entry for entry in found["memory"]}
    names = sorted_names(steps, lambda entry, name: ratios_of(entry)[name]["median"])

    def cell(entry: dict[str, Any], name: str) -> str:
        ratio = ratios_of(entry).get(name)
        kept = memories[entry["network"]]["ratios"].get(name)
        return f"{ratio['median']:.2f}, {kept['peak']:.2f}" if ratio and kept else "-"

    return by_variant(steps, cell, names)


def scaling(found: dict[str, Any]) -> str:
    """As one thing grows."""
    rows = [
        [
            row["what"],
            str(row["value"]),
            f"{row['layers']} layers, batch {row['batch']}",
            with_spread(ratios_of(row)["crcore"]),
        ]
        for row in found["scaling"]
    ]
    return grid(["what grows", "to", "network", "over float"], rows)


def quantizer(found: dict[str, Any]) -> str:
    """In copies of the tensor, and as a share of the copy's bandwidth."""
    texts = []
    for entry in found["quantizer"]:
        copies, share = entry["in copies"], entry["share of the copy's bandwidth"]
        names = sorted(copies["both"], key=lambda name: copies["both"][name]["median"])
        rows = [
            [
                title(name),
                *(f"{copies[way][name]['median']:.2f}" for way in ("forward", "backward")),
                with_spread(copies["both"][name]),
                *(f"{100 * share[way][name]:.0f} %" for way in ("forward", "backward")),
            ]
            for name in names
        ]
        head = ["copies of the tensor", "forward", "backward", "both", "of the copy's bandwidth: forward", "backward"]
        bandwidth = f"{entry['copy, bytes per second'] / 1e9:,.1f} GB/s"
        shape = "x".join(map(str, entry["shape"]))
        missing = "; ".join(f"{title(name)} ({reason})" for name, reason in entry["not measured"].items())
        texts.append(
            f"{grid(head, rows)}\n\n{shape}, {entry['dtype']}; the copy moves {bandwidth}."
            + (f" Not measured: {missing}." if missing else "")
        )
    return "\n\n".join(texts)


def settings(found: dict[str, Any]) -> str:
    """What was measured with."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    given = found["settings"]
    options = [f"--{name.replace('_', '-')}" for name in ("channels_last",) if given[name]]
    options += [f"--{name.replace('_', '-')} {given[name]}" for name in ("autocast", "compile_mode") if given[name]]
    extra = f" {' '.join(options)}." if options else ""
    return f"{found['machine']['device']}; {given['rounds']} rounds of {given['steps']} step(s).{extra} {versions}."


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "step": step,
    "throughput": throughput,
    "compiled": compiled,
    "parts": parts,
    "memory": memory,
    "summary": summary,
    "scaling": scaling,
    "quantizer": quantizer,
    "settings": settings,
}

if __name__ == "__main__":
    main()
