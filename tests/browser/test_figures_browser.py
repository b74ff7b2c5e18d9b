"""Every figure of the package as PDF and SVG in both printed widths: nothing is cut, nothing is missing, no text lies on another."""

import html
import io
import math
import re
import subprocess
from collections import Counter
from itertools import combinations

import all_figures
import numpy as np
import pytest
from PIL import Image

from sepcap.drawing.save import static

pytestmark = pytest.mark.browser

SIZES = ((3.3, 7.5), (6.9, 7.5), (3.3, 8.0))
"""Inches, and points of the text."""
POINTS = 72
ROUNDING_PT = 0.75
"""Chromium prints pages of whole CSS pixels, which are 0.75 points."""
DARK = 200
EDGE = 2
"""Pixels at 100 dpi: a figure ends up to 0.75 points before its page."""
TEXTS = """() => {
  const paper = document.querySelector("svg").getBoundingClientRect();
  return [...document.querySelectorAll("text")].map((text) => {
    const box = text.getBoundingClientRect(), lines = [...text.querySelectorAll("tspan.line")];
    return {
      lines: (lines.length ? lines : [text]).map((line) => line.textContent),
      box: [box.left - paper.left, box.top - paper.top, paper.right - box.right, paper.bottom - box.bottom],
      size: [box.width, box.height, parseFloat(getComputedStyle(text).fontSize)],
    };
  }).filter((text) => text.size[0] && text.size[1]);
}"""
"""Of every text: what it says line by line, and how far its box lies from the left, upper, right and lower edge."""


@pytest.fixture(scope="module")
def figures(tmp_path_factory):
    """Figure by name and width."""
    table = all_figures.figures(tmp_path_factory.mktemp("figures"))
    return {
        f"{name}, {inches} inches, {points} pt": draw(width=inches, font_size=points)
        for name, draw in table.items()
        for inches, points in SIZES
    }


@pytest.fixture(scope="module")
def printed(figures, tmp_path_factory):
    """Path of the PDF by name and width."""
    folder, paths = tmp_path_factory.mktemp("pdf"), {}
    for i, (name, data) in enumerate(zip(figures, static(list(figures.values()), ".pdf"), strict=True)):
        paths[name] = folder / f"{i}.pdf"
        paths[name].write_bytes(data)
    return paths


@pytest.fixture(scope="module")
def texts(figures, browser):
    """What a browser measures in the SVG, by name and width."""
    page = browser.new_page()
    measured = {}
    for name, data in zip(figures, static(list(figures.values()), ".svg"), strict=True):
        page.set_content(f"<body style='margin: 0'>{data.decode()}</body>")
        measured[name] = page.evaluate(TEXTS)
    page.close()
    return measured


def output(*command: object) -> bytes:
    return subprocess.run([str(part) for part in command], check=True, capture_output=True).stdout


def letters(lines: list[str]) -> Counter[str]:
    return Counter("".join(plain_letters(line) for line in lines))


def plain_letters(line: str) -> str:
    """Without blanks, and without what plotly puts around indices."""
    return "".join(line.replace("\u200b", "").split())


def said(text: object) -> set[str]:
    """The lines of a text as the reader sees them, without blanks."""
    lines = (html.unescape(re.sub("<[^>]+>", "", line)) for line in str(text or "").split("<br>"))
    return {line for line in map(plain_letters, lines) if line}


def wanted(fig) -> set[str]:
    """Every line of text that the figure was given: titles, named ticks, annotations and the legend."""
    drawn = fig.to_plotly_json()
    layout, traces = drawn["layout"], drawn["data"]
    found = set().union(*(said(note["text"]) for note in layout.get("annotations", ())))
    for axis in [layout[name] for name in layout if re.fullmatch(r"[xy]axis\d*", name)]:
        low, high = sorted(axis.get("range", (-np.inf, np.inf)))
        for at, text in zip(axis.get("tickvals", ()), axis.get("ticktext", ()), strict=False):
            inside = isinstance(at, str) or low <= (np.log10(at) if axis.get("type") == "log" else at) <= high
            found |= said(text) if inside and axis.get("showticklabels", True) else set()
        found |= said(axis.get("title", {}).get("text"))
    scales = [layout.get("coloraxis", {}), *(trace.get("marker", {}) for trace in traces)]
    for bar in (scale["colorbar"] for scale in scales if "colorbar" in scale):
        found |= said(bar["title"]["text"]).union(*map(said, bar.get("ticktext", ())))
    if layout["showlegend"]:
        found |= said(layout.get("legend", {}).get("title", {}).get("text"))
        lines = [trace for trace in traces if trace["type"] == "scatter" and trace.get("showlegend", True)]
        found |= set().union(*(said(trace.get("name")) for trace in lines))
    return found


def test_pages_have_the_size_of_the_figure_and_hold_all_its_words(figures, printed, texts):
    faults = {}
    for name, path in printed.items():
        page = output("pdftotext", "-bbox", path, "-").decode()
        pages = re.findall(r'<page width="([\d.]+)" height="([\d.]+)"', page)
        assert len(pages) == 1, f"{name} has {len(pages)} pages"
        width, height = map(float, pages[0])
        assert width == pytest.approx(float(name.split(", ")[1].split()[0]) * POINTS, abs=ROUNDING_PT), name
        words = re.findall(r'xMin="(.+?)" yMin="(.+?)" xMax="(.+?)" yMax="(.+?)">(.*?)</word>', page)
        cut = [html.unescape(word) for *box, word in words if not _inside(list(map(float, box)), width, height)]
        # poppler leaves out what lies beyond the page, and parts words in its own way: letters are counted
        drawn = letters([line for text in texts[name] for line in text["lines"]])
        missing = drawn - letters([html.unescape(word) for *_, word in words])
        if cut or missing:
            faults[name] = {"cut": cut, "missing": "".join(missing.elements())}
    assert not faults, faults


def _inside(box: list[float], width: float, height: float) -> bool:
    return 0 <= box[0] < box[2] <= width and 0 <= box[1] < box[3] <= height


ROUNDED = 0.35
"""Sizes are given as whole thirds of a point, rounded down."""


def test_the_fonts_of_a_page_have_the_size_that_was_asked_for(printed):
    """Titles have it exactly, ticks 7/7.5 of it; only indices and marks are smaller than 5/7.5."""
    faults = {}
    for name, path in printed.items():
        points = float(name.split(", ")[-1].split()[0])
        xml = output("pdftohtml", "-xml", "-i", "-stdout", "-zoom", 3, path).decode()
        sizes = {int(font): int(size) / 3 for font, size in re.findall(r'<fontspec id="(\d+)" size="(\d+)"', xml)}
        # poppler rounds the size of rotated text, which has no width here, up to whole points
        texts = re.findall(r'<text [^>]*width="(\d+)"[^>]*font="(\d+)">(.*?)</text>', xml)
        used = {
            rotated: {sizes[int(font)] for width, font, words in texts if words.strip() and (width == "0") == rotated}
            for rotated in (False, True)
        }
        wrong = not used[False] or abs(max(used[False]) - points) > ROUNDED or min(used[False]) < points * 5 / 7.5 - ROUNDED
        if wrong or max(used[True], default=0) > math.ceil(points) + ROUNDED:
            faults[name] = used
    assert not faults, faults


def test_nothing_dark_touches_the_edge_of_a_page(printed):
    faults = []
    for name, path in printed.items():
        pixels = np.asarray(Image.open(io.BytesIO(output("pdftoppm", "-r", 100, "-gray", "-singlefile", path))))
        assert pixels.min() < 50, f"{name} is blank"
        if min(edge.min() for edge in (pixels[:EDGE], pixels[-EDGE:], pixels[:, :EDGE], pixels[:, -EDGE:])) < DARK:
            faults.append(name)
    assert not faults, faults


def test_every_text_that_a_figure_was_given_is_drawn(figures, texts):
    faults = {}
    for name, fig in figures.items():
        drawn = {plain_letters(line) for text in texts[name] for line in text["lines"]}
        if missing := wanted(fig) - drawn:
            faults[name] = missing
    assert not faults, faults


def test_every_text_of_an_svg_lies_inside_it(texts):
    outside = [(name, text["lines"]) for name, of in texts.items() for text in of if min(text["box"]) < 0]
    assert not outside, outside


def test_no_text_lies_on_another(figures, texts):
    faults = {}
    for name, of in texts.items():
        met = [(a["lines"], b["lines"]) for a, b in combinations(of, 2) if _meet(a, b)]
        if met:
            faults[name] = met
    assert not faults, faults


def _meet(a, b) -> bool:
    """Whether the boxes share more than the air above and below letters."""
    (left, top, _, _), (other_left, other_top, _, _) = a["box"], b["box"]
    across = min(left + a["size"][0], other_left + b["size"][0]) - max(left, other_left)
    down = min(top + a["size"][1], other_top + b["size"][1]) - max(top, other_top)
    air = 0.25 * min(a["size"][2], b["size"][2])
    return across > air and down > air
