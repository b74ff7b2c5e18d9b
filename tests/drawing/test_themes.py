"""Every figure takes a width, a size of text and a theme; dark figures can be read, and their numbers are the same."""

import inspect

import all_figures
import pytest
from planted_runs import maker

from sepcap import plots
from sepcap.drawing.save import _options
from sepcap.drawing.style import INK, WIDTHS, width_px
from sepcap.drawing.themes import DARK

FUNCTIONS = sorted({function for function, _ in all_figures.FIGURES.values()}, key=lambda one: (one.__module__, one.__name__))


@pytest.fixture
def make_run(tmp_path):
    return maker(tmp_path)


def luminance(colour):
    """Relative luminance of WCAG 2."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: f"{function.__module__}.{function.__name__}")
def test_every_figure_takes_width_font_size_and_theme(function):
    options = inspect.signature(function).parameters
    for name in ("width", "font_size", "theme"):
        assert options[name].kind is inspect.Parameter.KEYWORD_ONLY
    assert (options["font_size"].default, options["theme"].default) == (7.5, "light")


def test_larger_text_is_a_figure_with_fewer_pixels_per_inch(make_run):
    run = make_run([0.5, 0.1], [0.4, 0.3])
    for width, inches in WIDTHS.items():
        fig = plots.trajectory(run, width=width, font_size=9)
        # 12 px are 9 pt, so an inch of 72 pt is 96 px
        assert fig.layout.width == pytest.approx(inches * 96)
        assert _options(fig, ".pdf")["scale"] == pytest.approx(1)
        assert fig.layout.template.layout.font.size == 12
    assert plots.trajectory(run, font_size=7.5).to_json() == plots.trajectory(run).to_json()


def test_a_width_that_a_figure_chooses_itself_is_kept():
    one = plots.score_histograms(all_figures.scores("mlp"), font_size=6)
    two = plots.score_histograms(all_figures.scores(), font_size=6)
    assert one.layout.width == pytest.approx(width_px("column") * 7.5 / 6)
    assert two.layout.width == pytest.approx(width_px("page") * 7.5 / 6)


def test_saving_at_another_width_keeps_the_size_of_the_text(make_run, tmp_path):
    fig = plots.trajectory(make_run([0.5, 0.1], [0.4, 0.3]), font_size=9)
    page = plots.save(fig, tmp_path / "t.html", width="page").read_text(encoding="utf-8")
    assert f'"width":{6.9 * 96:.1f}'.rstrip("0") in page


def test_the_dark_theme_replaces_colours_and_nothing_else(make_run):
    run = make_run([0.5, 0.1], [0.4, 0.3], tasks=("white", "prose"))
    light, dark = plots.trajectory({"white": run}), plots.trajectory({"white": run}, theme="dark")
    assert [trace.name for trace in dark.data] == [trace.name for trace in light.data]
    assert [list(trace.x) for trace in dark.data] == [list(trace.x) for trace in light.data]
    assert "white" in dark.layout.xaxis.title.text
    look = dark.layout.template.layout
    assert (look.paper_bgcolor, look.font.color) == (DARK["white"], DARK[INK])
    assert (luminance(look.font.color) + 0.05) / (luminance(look.paper_bgcolor) + 0.05) > 7
    assert INK not in dark.to_json()


def test_heat_maps_grow_lighter_in_the_dark():
    function, of = all_figures.FIGURES["similarity"]
    given, options = of(None)
    scales = [dict(function(*given, **options, theme=theme).layout.coloraxis.colorscale) for theme in ("light", "dark")]
    light, dark = ([luminance({"white": "#ffffff"}.get(c, c)) for _, c in sorted(scale.items())] for scale in scales)
    middle = len(light) // 2 if len(light) > 7 else 0
    assert light[-1] < light[middle]
    assert dark[-1] > dark[middle]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"font_size": 30}, "font_size=30"),
        ({"theme": "drak"}, "Did you mean 'dark'"),
        ({"font_size": 12, "width": 2}, r"font_size=12: a figure of 2 inches has space for at most 7\.5 points"),
    ],
)
def test_bad_sizes_and_themes_are_named(make_run, options, says):
    with pytest.raises(ValueError, match=says):
        plots.trajectory(make_run([0.5, 0.1], [0.4, 0.3]), **options)
