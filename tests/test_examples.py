"""Examples run: those of docstrings that need no model, and the code of the pages on the embedded model; of the rest, every call binds."""

import ast
import doctest
import inspect
import re
import warnings

import pytest
from examples import PAGES, ROOT, examples_of, modules_with_examples, page_code, skipped_code

import sepcap

NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?")


class Near(doctest.OutputChecker):
    """Compares printed numbers to a relative 1e-9: the last digits differ between processors."""

    def check_output(self, want, got, optionflags):
        wanted, printed = ([float(x) for x in NUMBER.findall(text)] for text in (want, got))
        same = super().check_output(NUMBER.sub("#", want), NUMBER.sub("#", got), optionflags)
        return same and printed == pytest.approx(wanted, rel=1e-9, abs=1e-12)


MODULES = modules_with_examples()
WITH_CODE = [page for page in PAGES if page_code(page)]


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_say_what_their_examples_return(name):
    runner = doctest.DocTestRunner(checker=Near(), verbose=False)
    for test in examples_of(name):
        test.globs.setdefault("sepcap", sepcap)
        said: list[str] = []
        runner.run(test, out=said.append)
        assert not said, "".join(said)


@pytest.mark.parametrize("name", MODULES)
def test_examples_that_need_a_model_give_arguments_that_exist(name):
    for test in examples_of(name):
        for call in (node for node in ast.walk(ast.parse(skipped_code(test))) if isinstance(node, ast.Call)):
            if re.fullmatch(r"sepcap(\.\w+)+", function := ast.unparse(call.func)):
                found = eval(function, {"sepcap": sepcap})
                inspect.signature(found).bind(*call.args, **{keyword.arg: None for keyword in call.keywords})


def test_pages_with_code_are_found():
    assert {"index.md", "guides/prune-and-save.md"} <= {page.relative_to(ROOT / "docs").as_posix() for page in WITH_CODE}
    assert not re.search(r"\bsepcap\.plots\.save\([^)]*\.pdf", page_code(ROOT / "docs" / "guides" / "histograms-for-a-paper.md"))


@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_the_code_of_a_page_compiles(page):
    compile(page_code(page), str(page), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=lambda page: page.relative_to(ROOT / "docs").as_posix())
def test_the_code_of_a_page_runs_from_top_to_bottom(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # few documents, on purpose
        exec(compile(page_code(page), str(page), "exec"), {"__name__": "page"})
