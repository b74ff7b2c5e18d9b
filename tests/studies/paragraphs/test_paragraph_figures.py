"""Figures of a transfer: what is drawn is what was measured."""

import json
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sepcap import plots
from sepcap.studies.paragraphs.result import ParagraphTransfer

CONDITIONS = ("original", "transferred", "mismatched", "neutral", "given 2")
KINDS = ("prose", "<b>code</b>")
TFIDF = "TF-IDF (scikit-learn, no sentence embeddings)"


def planted(texts=8, profile=True, scores=True, embedder: str | None = TFIDF) -> Any:
    """Distance of text i in condition c is 0.1·c + 0.01·i; the gain of layer l is l, minus 0.5 from another's break."""
    kinds = [KINDS[i % 2] for i in range(texts)]
    rows = [
        {"text": i, "condition": name, "given": 2 * (name == "given 2"), "sample": 0, "reference": reference}
        | {"distance": 0.1 * c + 0.01 * i + 5 * (reference != 2 * (name == "given 2")), "overlap": 0.5, "bigrams": 0.0}
        for c, name in enumerate(CONDITIONS)
        for i in range(texts)
        for reference in ((2,) if name == "given 2" else (0, 2))
    ]
    layers = [
        {"kind": kind, "part": part, "layer": layer, "donor": donor, "gain": gain, "low": gain - 0.25, "high": gain + 0.25, "texts": texts}
        for kind in ("all", *KINDS)
        for part in ("alone", "first", "last")
        for layer in (2, 3, 4)
        for donor, gain in (("own", float(layer)), ("another", layer - 0.5), ("difference", 0.5))
    ]
    positions = [
        {"kind": "all", "condition": name, "first": first, "last": last, "gain": c + first, "low": c + first - 1, "high": c + first + 2}
        | {"texts": texts}
        for c, name in enumerate(CONDITIONS[:3])
        for first, last in ((0, 0), (1, 1), (2, 4))
    ]
    tables = {
        "layers": pd.DataFrame(layers if profile else [], columns=list(layers[0])),
        "positions": pd.DataFrame(positions),
        "texts": pd.DataFrame({"text": range(texts), "kind": kinds}),
    }
    if scores:
        tables["scores"] = pd.DataFrame(rows)
        if embedder is None:
            tables["scores"]["distance"] = np.nan
    return ParagraphTransfer({"embedder": embedder}, tables)


def test_a_violin_per_condition_of_its_own_reference_alone():
    fig: Any = plots.paragraph_distances(planted())
    violins = [t for t in fig.data if t.type == "violin"]
    assert len(violins) == len(CONDITIONS)
    for c, violin in enumerate(violins):
        np.testing.assert_allclose(violin.x, 0.1 * c + 0.01 * np.arange(8), atol=1e-4)
    medians = [t for t in fig.data if t.type == "scatter"]
    np.testing.assert_allclose([t.x[0] for t in medians], 0.1 * np.arange(5) + 0.035, atol=1e-6)
    ticks = dict(zip(fig.layout.yaxis.tickvals, fig.layout.yaxis.ticktext, strict=True))
    assert [ticks[v.y0] for v in violins] == ["Whole context", "Own break", "Another text's break", "Break alone", "First 2 tokens"]
    assert TFIDF in fig.layout.xaxis.title.text
    assert "median 0.135" in medians[1].hovertext[0]


def test_what_was_given_tokens_stands_apart_under_its_own_heading():
    """It is held against less of the paragraph than the others are."""
    fig: Any = plots.paragraph_distances(planted())
    at = [t.y0 for t in fig.data if t.type == "violin"]
    (heading,) = [note for note in fig.layout.annotations if note.text.startswith("First tokens given")]
    assert at[4] < heading.y < min(at[:4])
    low, high = fig.layout.yaxis.range
    assert low < min(at)
    assert high > max(at)
    without = planted()
    without.tables["scores"] = without.tables["scores"].query("given == 0")
    shown: Any = plots.paragraph_distances(without)
    assert not [n for n in shown.layout.annotations if n.text.startswith("First tokens")]


def test_one_kind_of_text_alone():
    fig: Any = plots.paragraph_distances(planted(), kind="prose")
    np.testing.assert_allclose(fig.data[0].x, [0, 0.02, 0.04, 0.06], atol=1e-6)
    with pytest.raises(ValueError, match=r"kind='pros' is not known\. Did you mean 'prose'"):
        plots.paragraph_distances(planted(), kind="pros")


def test_many_texts_make_a_small_file_of_the_same_shape():
    fig: Any = plots.paragraph_distances(planted(5000))
    assert len(fig.to_json()) < 60_000
    np.testing.assert_allclose(np.quantile(fig.data[0].x, [0, 0.25, 0.5, 1]), [0, 12.4975, 24.995, 49.99], rtol=1e-2)


def test_the_profile_has_a_panel_per_part_and_a_line_per_donor():
    fig: Any = plots.paragraph_layers(planted())
    lines = [t for t in fig.data if t.hovertext is not None]
    bands = [t for t in fig.data if t.fill == "toself"]
    assert [(t.name, t.xaxis) for t in lines] == [
        (name, axis) for axis in ("x", "x2", "x3") for name in ("Own break", "Another text's break (control)")
    ]
    for line, band, shift in zip(lines, bands, [0, 0.5] * 3, strict=True):
        np.testing.assert_allclose(line.x, [2, 3, 4])
        np.testing.assert_allclose(line.y, np.array([2, 3, 4]) - shift)
        np.testing.assert_allclose(band.y, [*(np.array([2, 3, 4]) - shift + 0.25), *(np.array([4, 3, 2]) - shift - 0.25)])
    assert sum(bool(t.showlegend) for t in fig.data) == 2
    titles = [note.text for note in fig.layout.annotations]
    assert titles == ["This layer alone", "Layers 2 to this one", "This layer to layer 4"]
    low, high = fig.layout.yaxis.range
    assert low < 0
    assert high > 4.25


def test_positions_are_bins_of_the_paragraph_counted_from_one():
    fig: Any = plots.paragraph_positions(planted())
    assert list(fig.layout.xaxis.ticktext) == ["1", "2", "3–5"]
    assert [t.name for t in fig.data] == ["Whole context", "Own break", "Another text's break"]
    np.testing.assert_allclose(fig.data[1].y, [1, 2, 3])
    np.testing.assert_allclose(fig.data[1].error_y.array, 2)
    np.testing.assert_allclose(fig.data[1].error_y.arrayminus, 1)
    assert "tokens 3 to 5" in fig.data[1].hovertext[2]


@pytest.mark.parametrize("width", ["column", "page"])
def test_the_figures_are_plain_data(width):
    result = planted()
    for name in result.FIGURES:
        fig = result.figure(name, width=width)
        assert json.loads(fig.to_json())["layout"]["width"] == pytest.approx({"column": 380.2, "page": 794.9}[width], abs=1)


def test_what_was_not_measured_is_said():
    with pytest.raises(ValueError, match="generated no texts"):
        plots.paragraph_distances(planted(scores=False))
    with pytest.raises(ValueError, match="has no distance"):
        plots.paragraph_distances(planted(embedder=None))
    assert plots.paragraph_distances(planted(embedder=None), "overlap")
    with pytest.raises(ValueError, match="Did you mean 'distance'"):
        plots.paragraph_distances(planted(), "distanse")
    with pytest.raises(ValueError, match="no profile"):
        plots.paragraph_layers(planted(profile=False))
