"""The command report: everything about a run on one page, which needs no other file and no network."""

import sys
from pathlib import Path

from rich.console import Console

from crcore.cli import _sections
from crcore.cli._errors import CommandError
from crcore.cli._files import write_text
from crcore.cli._measure_command import measure_missing
from crcore.cli._page import render
from crcore.cli._report import title
from crcore.cli._results import Results, read_results


def report(run: Path, *, out: Path | None, seed: int | None, data_name: str | None, measure: bool) -> None:
    """Write the page of a run and name it."""
    results = read_results(run)
    out = _checked_out(run, out)
    seeds = list(dict.fromkeys(record["seed"] for record in results.records))
    if seed is not None and seed not in seeds:
        raise CommandError(f"--seed {seed}: {run} has finished runs of seed {', '.join(map(str, seeds))}; give one")
    seed = seeds[0] if seed is None else seed
    if measure:
        measure_missing(run / f"seed{seed}", data_name=data_name)
    with Console(stderr=True).status(f"writing {out}"):
        sections = [
            _sections.overview(results),
            _sections.table(results),
            _sections.history(results),
            _sections.layers(results, seed=seed, data_name=data_name),
            _sections.flatness(results),
            _sections.sensitivity(results),
            *_sections.oscillation(results),
        ]
        page = render(title(results.settings, results.data), sections, unfinished=_unfinished(results))
    write_text(out, page)
    sys.stdout.write(f"wrote {out} ({out.stat().st_size / 1e6:.2f} MB); open it in a browser\n")


def _unfinished(results: Results) -> str | None:
    if results.complete:
        return None
    asked = len(results.settings["seeds"]) * len(results.settings["methods"])
    return f"This run is not finished: {len(results.records)} of {asked} networks are trained; the page shows these."


def _checked_out(run: Path, out: Path | None) -> Path:
    if out is None:
        return run / "report.html"
    if out.suffix not in (".html", ".htm"):
        raise CommandError(f"--out {out}: the name must end in .html")
    if out.is_dir() or not out.parent.is_dir():
        why = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise CommandError(f"--out {out}: {why}; name a file in a folder that exists")
    return out
