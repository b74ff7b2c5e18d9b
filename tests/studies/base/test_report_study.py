"""The page about a study: everything of a result is in it, what is long is cut and said, and text from outside stays text."""

import contextlib
import dataclasses
import json
import re
import sys

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch
from pages import HOSTILE, Page
from planted_runs import write_run

import sepcap
from sepcap.drawing.style import new_figure, plain
from sepcap.storage import FORMAT, write_json
from sepcap.studies import catalog
from sepcap.studies.base.folder import FINISHED
from sepcap.studies.base.report import ROWS
from sepcap.studies.base.result import StudyResult
from sepcap.studies.catalog import load_result


def bars(result, width="column"):
    kinds = result.tables["kinds"]
    data = [go.Bar(x=[plain(kind) for kind in kinds["kind"]], y=kinds["n"])]
    return new_figure(data, {"xaxis": {"title": {"text": "Kind"}}}, width=width, plot_px=150)


def nothing(result):
    raise ValueError("nothing was counted twice")


class Counted(StudyResult):
    STUDY = "counted"
    TITLE = "How many are there?"
    FIGURES = {  # noqa: RUF012 (as the studies of the package have it)
        "bars": ("Number per kind", bars),
        "wide": ("The same, over the page", lambda result, width="page": bars(result, width)),
        "none": ("What there is not", nothing),
    }

    def summary(self):
        return [f"There are {self.tables['kinds']['n'].sum()} of {self.config['task']}, 95% interval 3 to 9.", "Random: 5."]


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setitem(catalog.STUDIES, "counted", "test_report_study.Counted")

    def make(task="<b>words</b>", **config):
        kinds = pd.DataFrame({"kind": ["a", HOSTILE], "n": [1, 2000], "share": [0.123456, np.nan], "sure": [True, False]})
        kinds["layer"] = pd.array([3, None], dtype="Int64")
        many = pd.DataFrame({"row": range(ROWS + 7), "value": np.linspace(-5, 6, ROWS + 7)})
        return Counted({"model": "m", "task": task, **config}, {"kinds": kinds, "many": many}, {"matrix": torch.eye(2)})

    return make


def test_the_page_holds_all_that_the_result_has(counted, tmp_path):
    result = counted(k=[1, 2], versions={"torch": "9.9"}, created="today", seed=3, documents=list(range(20)))
    result.save(tmp_path / "study")
    page = Page(result.report())
    assert page.html == (tmp_path / "study" / "report.html").read_text()
    assert "<h1>How many are there?</h1>" in page.html
    assert "There are 2001 of <b>words</b>, 95% interval 3 to 9." in page.text
    assert "Random: 5." in page.text
    assert set(page.figures) == {"figure-bars", "figure-wide"}
    assert page.figures["figure-bars"]["data"][0]["y"]["dtype"] == "i2"
    assert "What there is not: no figure. Nothing was counted twice." in page.text
    for cell in ("2,000", "0.1235", "–", "yes", "no", "3"):
        assert cell in page.cells
    assert "k [1, 2]" in page.text
    assert "documents 0, 1, 2, 3, 4, 5, 6, 7, … (20 in all)" in page.text
    assert "Made with torch 9.9, seed 3, begun today." in page.text
    assert f"result = sepcap.load_result('{tmp_path / 'study'}')" in page.text


def test_a_long_table_is_cut_and_says_where_the_whole_is(counted, tmp_path):
    counted().save(tmp_path / "study")
    page = Page(Counted.load(tmp_path / "study").report())
    assert f"The first {ROWS} of {ROWS + 7} rows; all of them are in tables/many.parquet" in page.text
    assert len(pd.read_parquet(tmp_path / "study" / "tables" / "many.parquet")) == ROWS + 7
    assert page.tags.count("tr") == (1 + 2) + (1 + ROWS) + (1 + 3)  # two tables and the configuration: model, task and study
    assert page.cells.count("−5") == 1
    assert "6" not in page.cells  # the last value, 6, is beyond the cut


def test_a_result_says_which_tables_its_page_shows(counted, tmp_path, monkeypatch):
    monkeypatch.setattr(Counted, "PAGE_TABLES", ("kinds",))
    page = Page(counted().report(tmp_path / "a.html"))
    assert "Table: kinds" in page.text
    assert f"Not shown, but in the folder of the saved result: many ({ROWS + 7} rows, tables/many.parquet)." in page.text
    assert "The first" not in page.text


def test_intervals_are_one_column_and_headings_are_words(counted, tmp_path):
    result = counted()
    lines = {"low_rank": [7], "delta_loss": [0.5], "delta_loss_low": [-0.25], "delta_loss_high": [np.nan], "low": [1], "high": [2]}
    result = dataclasses.replace(result, tables={"kinds": result.tables["kinds"], "lines": pd.DataFrame(lines)})
    page = Page(result.report(tmp_path / "a.html"))
    headings = re.findall(r'<th scope="col">(.*?)</th>', page.html)
    assert headings[-6:-2] == ["low rank", "delta loss", "delta loss [low, high]", "[low, high]"]
    at = page.cells.index("[−0.25, –]")
    assert page.cells[at - 1 : at + 2] == ["0.5", "[−0.25, –]", "[1, 2]"]


def test_white_space_of_texts_is_kept(counted, tmp_path):
    page = Page(counted(task="a\n\n   b").report(tmp_path / "a.html"))
    assert "of a\n\n   b, 95%" in page.html
    assert re.search(r"\.summary p, td, tbody th \{ white-space: pre-wrap; \}", page.html)
    assert '<section class="summary"' in page.html


def test_text_from_outside_is_text(counted, tmp_path):
    page = Page(counted(task=HOSTILE, **{HOSTILE: {HOSTILE: HOSTILE}}).report(tmp_path / "page.html"))
    assert page.tags.count("script") == 3
    assert not {"img", "b"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert f"There are 2001 of {HOSTILE}" in page.text
    assert f"a 1 0.1235 yes 3 {HOSTILE} 2,000 – no –" in page.text
    assert f"{HOSTILE}, {HOSTILE} {HOSTILE}" in page.text  # name and value of the configuration
    assert "<img" not in json.dumps(page.figures)


def test_the_text_of_figures_keeps_its_size_on_a_narrow_screen(counted, tmp_path):
    """No figure is wider than a narrow screen: one that is drawn over the page is there a second time, drawn for a column."""
    result = counted()
    page = Page(result.report(tmp_path / "page.html"))
    assert not any("width" in each["style"] for each in attributes_of(page.html, "figure"))
    assert page.html.count('<figure class="wide">') == 1
    narrow = page.html.split('"narrow": ', 1)[1]
    assert '"figure-wide"' in narrow
    assert '"figure-bars"' not in narrow


def attributes_of(html, css_class):
    return [dict(re.findall(r'([\w-]+)="([^"]*)"', tag)) for tag in re.findall(rf'<div class="{css_class}"[^>]*>', html)]


def test_where_it_is_written(counted, tmp_path):
    with pytest.raises(ValueError, match="this result has no folder"):
        counted().report()
    with pytest.raises(IsADirectoryError, match="give the name of the file"):
        counted().report(tmp_path)
    counted().save(tmp_path / "study")
    assert counted().report(tmp_path / "new" / "a.html").exists()
    assert Counted.load(tmp_path / "study").report() == tmp_path / "study" / "report.html"


def test_a_study_without_figures_or_tables_has_a_page(tmp_path, monkeypatch):
    class Bare(StudyResult):
        STUDY, TITLE, FIGURES = "bare", "What is left?", {}

        def summary(self):
            return ["Nothing."]

    page = Page(Bare({}, {}).report(tmp_path / "page.html"))
    assert page.figures == {}
    assert "Nothing." in page.text
    assert "an unknown version" in page.text


# the command


@pytest.fixture
def command(capsys):
    from sepcap.cli.main import main

    def run(*arguments):
        with contextlib.suppress(SystemExit):
            main(["report", *map(str, arguments)])
        return capsys.readouterr()

    return run


def test_the_command_writes_the_page_of_any_study(counted, tmp_path, command, monkeypatch):
    counted().save(tmp_path / "study")
    monkeypatch.setattr(catalog, "named", lambda path: getattr(sys.modules[__name__], path.rpartition(".")[2]))
    assert type(load_result(tmp_path / "study")).__name__ == "Counted"
    assert command(tmp_path / "study").out.strip() == str(tmp_path / "study" / "report.html")
    assert command(tmp_path / "study", "--out", tmp_path / "a.html").out.strip() == str(tmp_path / "a.html")
    assert "only a run is compared" in command(tmp_path / "study", "--baseline", tmp_path).err


def test_what_is_broken_or_unknown_is_one_line(counted, tmp_path, command, monkeypatch):
    monkeypatch.setattr(catalog, "named", lambda path: getattr(sys.modules[__name__], path.rpartition(".")[2]))
    assert command(tmp_path / "nothing").err.rstrip().endswith("holds no study and no run: there is no config.json in it")
    inner = counted().save(tmp_path / "many" / "a" / "b")
    write_run(inner.parents[1] / "run", (0.5, 0.2), (0.5, 0.4))
    write_run(inner / "of-it", (0.5, 0.2), (0.5, 0.4))
    said = command(tmp_path / "many").err
    assert f"it holds {tmp_path / 'many' / 'run'}, {inner}: give one of them" in said
    assert "if one call made them, repeat that call: it names the study there" in said
    folder = counted().save(tmp_path / "study")
    write_json(folder / "config.json", {"format": FORMAT, "study": "countde"})
    assert "study='countde' is not known. Did you mean 'counted'?" in command(folder).err
    (folder / "config.json").write_text("{")
    assert "config.json is corrupt" in command(folder).err
    (folder / "config.json").write_text("[]")
    assert "config.json is corrupt: it holds a list" in command(folder).err
    folder = counted().save(tmp_path / "other")
    (folder / "tables" / "kinds.parquet").write_bytes(b"PAR1")
    assert "kinds.parquet is damaged" in command(folder).err
    (folder / FINISHED).write_text("[]")
    assert "result.json is corrupt" in command(folder).err
    (folder / FINISHED).unlink()
    assert "is not finished; the call that started it resumes it" in command(folder).err
    assert not (folder / "report.html").exists()


def test_public_names():
    assert sepcap.load_result is load_result
    assert sepcap.StudyResult is StudyResult
