"""Write a figure to a file at its printed size."""

import asyncio
import math
import os
import re
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from plotly.basedatatypes import BaseFigure

from sepcap.checks import checked
from sepcap.drawing.style import Paper, font_size_of, lay_out, px_per_inch, without_slider
from sepcap.errors import missing_extra, unknown
from sepcap.storage import write_atomically

PNG_DPI = 300
STATIC = (".pdf", ".svg", ".png")
SUFFIXES = (*STATIC, ".html")


PRINTED = "@page { margin: 0 } html, body { margin: 0; padding: 0 } img { display: block }"
"""A printed page contains only the figure: by default Chromium applies the margins that kaleido sets, shrinks the figure to the
remaining width, and cuts off what does not fit the height."""


@checked()
def save(fig: BaseFigure, path: str | Path, width: str | float | None = None) -> Path:
    """Write a figure as .pdf, .svg, .png (300 dpi) or .html (one self-contained file).

    The first three need the extra `export` (kaleido) and Chrome or Chromium; .html needs neither. Only .html keeps sliders: the
    other formats show the figure as it opens.

    Args:
        fig: any plotly figure; it is not changed.
        path: the suffix determines the format.
        width: inches, or "column" (3.3) or "page" (6.9); default is the width at which the figure was drawn.

    Returns:
        The path.

    Raises:
        ValueError: an unknown suffix or width.
        ImportError: kaleido is not installed.
        RuntimeError: no browser for the export was found, or it did not start.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise unknown("suffix", path.suffix, SUFFIXES)
    # a copy, because the same figure may be shown in a notebook afterwards
    copy = go.Figure(fig)
    if width is not None:
        lay_out(copy, Paper(width, font_size_of(copy)))
    if path.suffix.lower() == ".html":
        page = copy.to_html(include_plotlyjs=True, config={"displaylogo": False, "toImageButtonOptions": {"format": "svg"}})
        write_atomically(path, page.encode())
        return path
    write_atomically(path, static([copy], path.suffix.lower())[0])
    return path


def static(figs: Sequence[go.Figure], suffixes: str | Sequence[str]) -> list[bytes]:
    """Figures as the contents of .pdf, .svg or .png files, all drawn by one browser. Sliders are left out.

    Args:
        figs: any plotly figures; they are not changed.
        suffixes: one for all, or one for each.

    Raises:
        ImportError: kaleido is not installed.
        RuntimeError: no browser for the export was found, or it did not start.
    """
    wanted = [suffixes] * len(figs) if isinstance(suffixes, str) else list(suffixes)
    named = " and ".join(dict.fromkeys(wanted))
    try:
        import kaleido
    except ImportError as error:
        raise _with_way_out(missing_extra("kaleido", "export", f"Writing {named}"), named) from error
    from kaleido.errors import BrowserClosedError, BrowserFailedError, ChromeNotFoundError

    # without MathJax, which kaleido would load from the network for every picture
    page = kaleido.PageGenerator(mathjax=False)
    page.header += f"<style>{PRINTED}</style>"

    async def draw() -> list[bytes]:
        async with kaleido.Kaleido(n=1, page_generator=page) as browser:
            still = [without_slider(go.Figure(fig)) for fig in figs]
            drawn = zip(still, wanted, strict=True)
            return [_finished(await browser.calc_fig(fig.to_plotly_json(), opts=_options(fig, suffix)), suffix) for fig, suffix in drawn]

    try:
        # in a separate thread: a notebook already has an event loop in this one
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(lambda: asyncio.run(draw())).result()
    except (ChromeNotFoundError, BrowserFailedError, BrowserClosedError) as error:
        where = f" (BROWSER_PATH is {os.environ['BROWSER_PATH']!r})" if "BROWSER_PATH" in os.environ else ""
        raise RuntimeError(
            f"Writing {named} needs Chrome or Chromium, and none was found that starts{where}. Install one with your package manager "
            "(chromium) or with the command plotly_get_chrome, or set BROWSER_PATH to it. Writing .html needs no browser."
        ) from error


def _finished(drawn: bytes, suffix: str) -> bytes:
    """The file content drawn by the browser, with its printed size."""
    if suffix == ".svg":
        return _in_millimetres(drawn)
    return _with_resolution(drawn, PNG_DPI) if suffix == ".png" else drawn


def _options(fig: go.Figure, suffix: str) -> Any:
    """Format and scale of a figure; for .pdf its size in whole points, the only page sizes that Chromium prints."""
    layout: Any = fig.layout
    inch = px_per_inch(fig)
    options: dict[str, Any] = {"format": suffix[1:], "scale": 96 / inch * (PNG_DPI / 96 if suffix == ".png" else 1)}
    if suffix == ".pdf":
        width, height = (size or default for size, default in ((layout.width, 700), (layout.height, 500)))
        options |= {"width": round(width * 72 / inch) * inch / 72}
        options |= {"height": math.ceil(height * 72 / inch) * inch / 72}
    return options


def _with_way_out(error: ImportError, suffix: str) -> ImportError:
    return ImportError(f"{error}, and Chrome or Chromium. Writing .html instead of {suffix} needs neither")


def _in_millimetres(svg: bytes) -> bytes:
    """The SVG with its size in millimetres: programs disagree about the size of a pixel."""
    head, tag, rest = svg.partition(b">")
    mm = 25.4 / 96

    def printed(match: re.Match[bytes]) -> bytes:
        return b'%s="%.2fmm"' % (match[1], float(match[2]) * mm)

    return re.sub(rb'\b(width|height)="([\d.]+)"', printed, head) + tag + rest


def _with_resolution(png: bytes, dpi: int) -> bytes:
    """The same PNG with its resolution, so that programs place it at its printed size."""
    per_metre = round(dpi / 0.0254)
    body = b"pHYs" + struct.pack(">IIB", per_metre, per_metre, 1)
    chunk = struct.pack(">I", 9) + body + struct.pack(">I", zlib.crc32(body))
    end_of_header = 8 + 25  # signature and IHDR, which is always first
    return png[:end_of_header] + chunk + png[end_of_header:]
