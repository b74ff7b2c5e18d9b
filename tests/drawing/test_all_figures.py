"""The list of all figures, which the browser tests go through, is complete, and every figure of a made-up result can be drawn."""

from functools import partial
from importlib import import_module

import all_figures
import pytest

from sepcap import plots
from sepcap.studies.catalog import STUDIES


def figures_of_studies():
    """Name -> the function of every figure of every study."""
    for study, place in STUDIES.items():
        module, name = place.rsplit(".", 1)
        for kind, (_, function) in getattr(import_module(f"sepcap.{module}"), name).FIGURES.items():
            yield f"{study}: {kind}", function.func if isinstance(function, partial) else function


def test_every_figure_of_the_package_is_listed():
    listed = [function for function, _ in all_figures.FIGURES.values()]
    wanted = {f"plots.{name}": getattr(plots, name) for name in plots.__all__ if name != "save"} | dict(figures_of_studies())
    missing = sorted(name for name, function in wanted.items() if function not in listed)
    assert missing == [], (
        f"add {', '.join(missing)} to FIGURES in tests/helpers/all_figures.py, each drawn of a small made-up result (see "
        "tests/helpers/planted_results.py): the browser tests then look at it as PDF and SVG"
    )


NEWER = {"planted_results", "planted_newer"}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """The sweep is made once."""
    return all_figures.Planted(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("name", [name for name, (_, of) in all_figures.FIGURES.items() if NEWER & set(of.__code__.co_names)])
def test_figures_of_newer_studies_are_drawn_at_both_widths(name, planted):
    function, of = all_figures.FIGURES[name]
    given, options = of(planted)
    for width in (3.3, 6.9):
        assert len(function(*given, width=width, **options).data) > 0


def test_the_legend_of_a_score_without_error_names_its_line():
    function, of = all_figures.FIGURES["importances-ranks"]
    figure = function(*of(None)[0])
    dashes = {shape.line.dash for shape in figure.layout.shapes if shape.line.dash}
    assert dashes == {"dot"}
    assert "dotted: a score without error" in figure.layout.legend.title.text


def test_chosen_layers_keep_their_own_numbers():
    function, of = all_figures.FIGURES["single-ablations-score-of-layers"]
    given, options = of(None)
    figure = function(*given, **options)
    assert [text for a in figure.layout.annotations if (text := a.text).startswith("Layer ")] == ["Layer 1", "Layer 3", "Layer 5"]
    for trace, layer in zip(figure.data, (1, 3, 5), strict=True):
        assert all(f"layer {layer}," in hover for hover in trace.hovertext)
