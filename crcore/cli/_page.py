"""What a page is made of, and the page as HTML: one file, with no reference to another and no script."""

from dataclasses import dataclass, field
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from crcore.cli._figures.style import Panel, colour, inline_svg


@dataclass(frozen=True)
class Figure:
    """A drawing and what is written above it."""

    svg: Markup
    caption: str
    wide: bool = False  # takes a row of its own


@dataclass(frozen=True)
class Table:
    """Text in rows; the first cell of each names it."""

    caption: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


@dataclass(frozen=True)
class Network:
    """What can be unfolded: one network, with a table, and figures for each layer."""

    name: str
    table: Table
    layers: list[tuple[str, list[Figure]]]


@dataclass
class Section:
    """One chapter of the page."""

    id: str
    title: str
    how_to_read: str
    statements: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    methods: list[str] = field(default_factory=list)  # for a legend
    averages: bool = False  # dashed lines in the legend
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    folded: list[Table] = field(default_factory=list)
    networks: list[Network] = field(default_factory=list)


def drawn(panel: Panel, caption: str | None = None) -> Figure:
    """A panel as a figure of the page, under its title or a caption of its own."""
    return Figure(
        Markup(inline_svg(panel)), caption or panel.title, wide=panel.size[0] > 5
    )  # its text is escaped by the drawing library


def render(title: str, sections: list[Section], *, unfinished: str | None) -> str:
    """The page, as HTML. All text is escaped here, drawings apart."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals["colour"] = colour
    template = environment.from_string(files("crcore.cli").joinpath("_page.html").read_text(encoding="utf-8"))
    return template.render(title=title, sections=sections, unfinished=unfinished) + "\n"
