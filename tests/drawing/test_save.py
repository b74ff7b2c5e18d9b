"""Files at their printed size, and what is said when one cannot be written."""

import re
import struct

import plotly.graph_objects as go
import pytest
from planted_runs import maker

from sepcap import plots
from sepcap.drawing.save import _in_millimetres, _with_resolution
from sepcap.drawing.style import plain, width_px


@pytest.fixture
def make_run(tmp_path):
    return maker(tmp_path)


@pytest.fixture
def fig(make_run):
    return plots.trajectory(make_run([0.5, 0.1], [0.4, 0.3]))


def test_html_holds_everything(fig, tmp_path):
    path = plots.save(fig, tmp_path / "new" / "t.html")
    page = path.read_text(encoding="utf-8")
    assert "unpruned" in page
    assert len(page) > 1_000_000  # plotly.js itself
    assert not re.search(r'<script[^>]+src="', page)


def test_widths_in_print(fig):
    # 12 px are 7.5 pt = 7.5 · 25.4 / 72 mm
    mm_per_px = 7.5 * 25.4 / 72 / 12
    assert width_px("column") * mm_per_px == pytest.approx(3.3 * 25.4)
    assert width_px("page") * mm_per_px == pytest.approx(6.9 * 25.4)
    assert width_px(5) * mm_per_px == pytest.approx(5 * 25.4)
    assert fig.layout.width == width_px("column")


def test_saving_for_the_page_leaves_the_figure_as_it_was(fig, tmp_path):
    before = fig.to_json()
    page = plots.save(fig, tmp_path / "t.html", width="page").read_text(encoding="utf-8")
    assert fig.to_json() == before
    assert f'"width":{width_px("page")}' in page


def test_the_plane_of_a_trajectory_is_square_at_any_width(make_run):
    for width in ("column", "page"):
        layout = plots.trajectory(make_run([0.5, 0.1], [0.4, 0.3]), width=width).layout
        across = layout.width - layout.margin.l - layout.margin.r
        assert across == pytest.approx(layout.height - layout.margin.t - layout.margin.b)


def test_any_figure_can_be_saved(tmp_path):
    other = go.Figure(go.Scatter(y=[1, 2]))
    page = plots.save(other, tmp_path / "o.html", width="column").read_text(encoding="utf-8")
    assert f'"width":{width_px("column")}' in page
    assert other.layout.width is None


def test_unknown_suffix_and_width(fig, tmp_path):
    with pytest.raises(ValueError, match=r"suffix='\.pgn' is not known\. Did you mean '\.png'"):
        plots.save(fig, tmp_path / "t.pgn")
    with pytest.raises(ValueError, match="suffix=''"):
        plots.save(fig, tmp_path / "t")
    with pytest.raises(ValueError, match=r"width='colum' is not known\. Did you mean 'column'"):
        plots.save(fig, tmp_path / "t.html", width="colum")
    for wrong in (0, -3.3, 1e9, float("nan"), True):
        with pytest.raises(ValueError, match=r"width=.*give inches from 2 to 20"):
            width_px(wrong)
    assert not list(tmp_path.glob("t*"))


def test_without_kaleido_the_extra_is_named(fig, tmp_path):
    with pytest.raises(ImportError, match=r"sepcap\[export\].*\.html"):
        plots.save(fig, tmp_path / "t.pdf")
    assert plots.save(fig, tmp_path / "t.html").exists()


@pytest.mark.browser
def test_without_a_browser_what_to_install_is_said(fig, tmp_path, monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", str(tmp_path / "nothing"))
    with pytest.raises(RuntimeError, match=r"Chrome or Chromium.*nothing.*plotly_get_chrome.*\.html"):
        plots.save(fig, tmp_path / "t.svg")
    assert not (tmp_path / "t.svg").exists()


def test_svg_in_millimetres():
    svg = b'<svg width="96" height="48" viewBox="0 0 9 9"><rect width="5" height="5"/></svg>'
    assert _in_millimetres(svg) == b'<svg width="25.40mm" height="12.70mm" viewBox="0 0 9 9"><rect width="5" height="5"/></svg>'


def chunks(png: bytes) -> dict[bytes, bytes]:
    found, at = {}, 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        found[png[at + 4 : at + 8]] = png[at + 8 : at + 8 + length]
        at += 12 + length
    return found


def test_png_resolution_is_a_valid_chunk():
    import zlib

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    bare = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0\0\0")) + chunk(b"IEND", b"")
    body = struct.pack(">IIB", 11811, 11811, 1)  # 300 dots per 0.0254 m
    with_resolution = _with_resolution(bare, 300)
    assert list(chunks(with_resolution)) == [b"IHDR", b"pHYs", b"IDAT", b"IEND"]
    assert chunk(b"pHYs", body) in with_resolution


def test_long_names_lose_their_middle_and_stay_escaped():
    assert plain("a" * 30 + "b" * 30, 11) == "aaaaa…bbbbb"
    assert plain("<" * 60, 5) == "&lt;&lt;…&lt;&lt;"
    assert plain("two\n lines") == "two lines"


@pytest.mark.browser
@pytest.mark.parametrize(("width", "mm"), [("column", 83.82), ("page", 175.26), (5.0, 127)])
def test_static_files_have_their_printed_size(fig, tmp_path, width, mm):
    png = plots.save(fig, tmp_path / "t.png", width).read_bytes()
    pixels = struct.unpack(">I", chunks(png)[b"IHDR"][:4])[0]
    per_metre = struct.unpack(">I", chunks(png)[b"pHYs"][:4])[0]
    assert pixels / per_metre * 1000 == pytest.approx(mm, abs=0.2)
    pdf = plots.save(fig, tmp_path / "t.pdf", width).read_bytes()
    box = re.search(rb"MediaBox\s*\[\s*0 0 ([\d.]+)", pdf)
    assert float(box[1]) / 72 * 25.4 == pytest.approx(mm, abs=0.5)
    svg = plots.save(fig, tmp_path / "t.svg", width).read_text(encoding="utf-8")
    assert f'width="{mm:.2f}mm"' in svg


@pytest.mark.browser
def test_names_come_out_letter_by_letter(make_run, tmp_path):
    """Read back from what the browser has drawn: whatever plotly makes of a name, the reader sees the name."""
    import html

    name = "<b>x</b> & $a$ %{y}"
    run = make_run([0.5, 0.1], [0.4, 0.3], tasks=(name, "prose"))
    svg = plots.save(plots.trajectory({name: run}), tmp_path / "t.svg").read_text(encoding="utf-8")
    texts = [html.unescape(re.sub("<[^>]+>", "", text)) for text in re.findall(r"<text[^>]*>.*?</text>", svg)]
    assert sum(name in text for text in texts) == 2  # the legend and the x axis


def test_the_home_folder_is_meant(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    plots.save(go.Figure(), "~/page.html")
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert (tmp_path / "home" / "page.html").exists()
