"""What all figures share: a colour for each method, panels, and the two ways out, PNG and inline SVG."""

import hashlib
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from crcore.cli._files import put_in_place

# Okabe and Ito (2008): told apart with any colour vision, on white and on black. By method, not by order, so that a
# method has its colour whichever others were run.
COLOURS = {
    "fp32": "#888888",
    "qat": "#0072B2",
    "qat+ema": "#56B4E9",
    "qat+kd": "#009E73",
    "qat+cr": "#D55E00",
    "qat+cr+unlabeled": "#E69F00",
}
OTHER = "#CC79A7"  # a method that is not listed
INK = "#3b3b3b"  # of text and axes; becomes the page's own text colour there

_PNG: Any = {
    "text.parse_math": False,  # names of data and layers may hold a $
    "grid.alpha": 0.3,
}
_SVG: Any = _PNG | {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "crcore",  # the same figure gives the same bytes
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": INK,
    "grid.alpha": 0.15,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes and what is drawn in it."""

    title: str  # plain text; also the text alternative
    draw: Callable[[Axes], None]
    size: tuple[float, float] = (4.6, 3.0)  # inches, on a page
    edges: tuple[float, float, float, float] | None = None  # left, bottom, right, top in [0, 1]; None: as text needs


def colour(method: str) -> str:
    """Of a method, the same in every figure."""
    return COLOURS.get(method, OTHER)


def label(method: str, *, average: bool) -> str:
    """What a line of a method, or of the average of its weights, is called."""
    return f"{method}, average" if average else method


def inline_svg(panel: Panel) -> str:
    """A panel as an `<svg>` element: no reference to the outside, text in the page's font and colour."""
    with matplotlib.rc_context(_SVG):
        # Finding out what the text needs takes longer than drawing it.
        figure = Figure(figsize=panel.size, layout="constrained" if panel.edges is None else None)
        axes = figure.add_subplot()
        if panel.edges is not None:
            left, bottom, right, top = panel.edges
            figure.subplots_adjust(left, bottom, right, top)
        panel.draw(axes)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    return _shortened(buffer.getvalue(), panel.title)


def _shortened(svg: str, title: str) -> str:
    """A file of matplotlib's as a part of a page."""
    box = re.search(r'viewBox="[^"]*"', svg)
    assert box is not None
    svg = svg[svg.index(">", box.end()) + 1 :]
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.S)
    svg = re.sub(r"\s*\n\s*", " ", svg).replace("> <", "><").replace("<defs></defs>", "")
    svg = f'<svg {box[0]} role="img" aria-label="{html.escape(title)}">{svg}'
    # Names of groups are the same in every figure, and those of clips and markers would be: a page needs them unique.
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    own = hashlib.blake2b(svg.encode(), digest_size=4).hexdigest()
    svg = re.sub(r'(\bid="|url\(#|href="#)(\w+)', rf"\g<1>f{own}\g<2>", svg)
    svg = re.sub(r"(font: [^;\"]*?px) '[^;\"]*", r"\1 var(--font)", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg).replace(INK, "currentColor")
    return re.sub(r' (d|x|y|transform)="[^"]*"', lambda found: re.sub(r"(\.\d)\d+", r"\1", found[0]), svg).strip()


def log_axis(axes: Axes) -> None:
    """A logarithmic ordinate whose labels are plain numbers; call it when all is drawn."""
    axes.set_yscale("log")
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if highest < 100 * lowest else (1,)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def write_png(path: Path, panels: Sequence[Panel], title: str) -> None:
    """Panels side by side in one picture, written whole or not at all.

    Args:
        path: of the .png file.
        panels: one or more.
        title: above them.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_PNG):
        figure = Figure(figsize=(5.2 * columns, 3.8 * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)  # no pyplot: no global state, and no display is asked for
        for number, panel in enumerate(panels):
            axes = figure.add_subplot(rows, columns, number + 1)
            panel.draw(axes)
            axes.set_title(panel.title, fontsize="medium")
            if axes.get_legend_handles_labels()[1]:
                axes.legend(fontsize="small")
        figure.suptitle(title, fontsize="medium")
        save_png(path, figure)


def save_png(path: Path, figure: Figure) -> None:
    """Write one figure, whole or not at all."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with put_in_place(path) as temporary:
        temporary.write_bytes(buffer.getvalue())
