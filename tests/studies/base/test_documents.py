"""Every result says how many documents its numbers rest on: in its main table, in its repr, in Jupyter, and on its page."""

from operator import attrgetter

import pytest
from small_studies import SmallStudies

from sepcap.studies.base.text import documents_in_words
from sepcap.studies.catalog import STUDIES

ELSEWHERE = {
    "learned-ranking": lambda result: result.tables["areas"],  # the main table is the order of the neurons, and the areas are measured
    "jacobian-spectrum": lambda result: result.by_layer,  # a row of the main table is of one row of tokens
    # of a document at most one passage is taken, and the column `texts` counts passages
    "paragraph-transfer": lambda result: result.table.rename(columns={"texts": "n_documents"}),
}
"""Study -> the table that says it, where that is not the main one as it is."""

NAMES = ("run", *STUDIES)


@pytest.fixture
def result(request, trained_folder, letters, digits, tmp_path):
    return SmallStudies(trained_folder, letters, digits, tmp_path).make(request.param)


def test_there_is_a_small_study_of_every_kind(trained_folder, letters, digits, tmp_path):
    assert set(SmallStudies(trained_folder, letters, digits, tmp_path).makers) == set(NAMES)


@pytest.mark.thorough
@pytest.mark.parametrize(("result", "name"), [(name, name) for name in NAMES], indirect=["result"], ids=NAMES)
def test_every_result_says_the_number_of_documents(result, name, tmp_path):
    few, many = result.n_documents
    assert 0 < few <= many
    table = ELSEWHERE.get(name, attrgetter("table"))(result)
    columns = [column for column in table if str(column).startswith("n_documents")]
    assert columns, f"the table of {name} has the columns {list(table)}"
    counts = table[columns].astype(object).to_numpy().ravel()
    assert {few, many} & {n for n in counts if isinstance(n, int)}
    said = documents_in_words((few, many))
    assert said in repr(result)
    assert said in result._repr_html_()
    page = result.report(tmp_path / "page.html").read_text()
    assert said in page
