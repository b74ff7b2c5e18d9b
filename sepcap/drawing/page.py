"""A self-contained HTML page that loads nothing from a network."""

import base64
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import pandas as pd

from sepcap.drawing.style import GREY, capital, width_px
from sepcap.drawing.themes import DARK
from sepcap.storage import output_path, write_atomically


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure, or the reason why there is none.

    Attributes:
        id: of its element in the page.
        title: heading above it.
        figure: a `go.Figure`.
        reason: a sentence.
        width: width in pixels at which it was drawn.
        narrow: the same figure drawn for a column, shown on narrow screens instead of a wide one.
    """

    id: str
    title: str
    figure: Any = None
    reason: str = ""
    width: float = 0.0
    narrow: Any = None

    @property
    def wide(self) -> bool:
        """Whether it needs the full width of the page."""
        return self.width > 1.2 * width_px("column")


@dataclasses.dataclass(frozen=True)
class Table:
    """A table with a name and a note.

    Attributes:
        frame: its columns and rows as shown in the page.
        name: its title.
        note: a sentence below it.
    """

    frame: pd.DataFrame
    name: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Section:
    """A heading with the content below it."""

    title: str
    words: str = ""
    pictures: tuple[Picture, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclasses.dataclass(frozen=True)
class Page:
    """The content of a page, in order.

    Attributes:
        title: heading.
        subtitle: its subject in one line.
        summary: sentences.
        sections: figures and tables.
        generations: texts before and after, or None if the page is not about a run.
        configuration: everything that determines the result.
        again: heading above the command that reproduces or reads the result.
        command: lines to type.
        command_note: a sentence below them.
    """

    title: str
    subtitle: str
    summary: Sequence[str]
    sections: Sequence[Section]
    generations: Mapping[str, Any] | None
    configuration: Mapping[str, Any]
    again: str
    command: str
    command_note: str


def write_page(path: Path, page: Page) -> None:
    """Write a page, atomically."""
    write_atomically(path, _html(page).encode("utf-8", "replace"))


def page_path(path: str | Path) -> Path:
    """Path of a page; an existing path that is not a regular file is an error."""
    return output_path(path, "report.html")


def picture(id: str, title: str, make: Callable[[], Any], narrow: Callable[[], Any] | None = None) -> Picture:
    """A figure, or the error message of its function; `narrow` draws a wide figure for a column."""
    try:
        figure = make()
        drawn = Picture(id, title, figure, width=float(figure.layout.width or width_px("column")))
        return dataclasses.replace(drawn, narrow=narrow()) if drawn.wide and narrow is not None else drawn
    except ValueError as error:  # the result has nothing to show; errors of damaged files propagate
        return Picture(id, title, reason=f"{capital(str(error).rstrip('.'))}.")


def _html(page: Page) -> str:
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    assets = files("sepcap") / "assets"
    frame, style, drawing = ((assets / f"report.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js"))
    plotly = get_plotlyjs()
    drawn = {p.id: _for_page(p.figure) for section in page.sections for p in section.pictures if p.figure is not None}
    narrow = {p.id: _for_page(p.narrow) for section in page.sections for p in section.pictures if p.narrow is not None}
    # the page allows only these two scripts, whatever external text contains
    allowed = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in (plotly, drawing))
    # every value is escaped except those in Markup
    template = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(frame)
    return template.render(
        page=page,
        configuration=configuration_rows(page.configuration),
        allowed=Markup(allowed),
        style=Markup(style),
        plotly=Markup(plotly),
        drawing=Markup(drawing),
        # inside a script element only "<" can begin markup
        data=Markup(json.dumps({"figures": drawn, "narrow": narrow, "dark": DARK}).replace("<", "\\u003c")),
    )


def _for_page(figure: Any) -> Any:
    """A figure as JSON that fills its place in the page and has a transparent background."""
    clear = "rgba(0,0,0,0)"
    figure.update_layout(width=None, autosize=True, paper_bgcolor=clear, plot_bgcolor=clear, modebar={"bgcolor": clear, "color": GREY})
    return json.loads(figure.to_json())


def configuration_rows(config: Mapping[str, Any]) -> pd.DataFrame:
    """Every value of a configuration, including nested ones, with its name."""
    rows: list[dict[str, str]] = []

    def add(name: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{name}, {key}" if name else str(key), inner)
        elif isinstance(value, list | tuple) and len(value) > 8:
            rows.append({"Field": name, "Value": f"{', '.join(map(str, value[:8]))}, … ({len(value)} in all)"})
        else:
            rows.append({"Field": name, "Value": str(value)})

    add("", config)
    return pd.DataFrame(rows, columns=["Field", "Value"], dtype=object)  # arrow strings reject text that UTF-8 cannot encode
