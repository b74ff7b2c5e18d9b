"""Examples run: those of docstrings that need no model, and the code of the pages on the embedded model; of the rest, every call binds."""

import ast
import builtins
import doctest
import inspect
import re
import warnings

import pytest
import torch
from examples import PAGES, ROOT, examples_of, modules_with_examples, page_code, skipped_code
from tiny import copied

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
                named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
                bind = inspect.signature(found).bind if len(named) == len(call.keywords) else inspect.signature(found).bind_partial
                bind(*call.args, **named)


GIVEN = {"model", "ids", "forget", "retain", "scores", "neurons", "evaluation", "compiled", "run", "found", "part"}
"""Names that an example may use without making them: what the docstring's own call takes or returns."""


@pytest.mark.parametrize("name", MODULES)
def test_examples_use_names_that_are_there(name):
    for test in examples_of(name):
        tree = ast.parse("".join(example.source for example in test.examples))
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        made = {node.id for node in names if isinstance(node.ctx, ast.Store)}
        made |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names}
        made |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        used = {node.id for node in names if isinstance(node.ctx, ast.Load)}
        assert used <= made | GIVEN | {"sepcap"} | set(test.globs) | set(dir(builtins)), test.name


# calls that take minutes, a folder of an earlier run, a classifier or the hub; their arguments and names are tested above
LONG = re.compile(
    r"run_lm_eval|toxicity|study_report|load_result|check_folder|sweep|AblationSweep|certif|Certificate|modularity|[cC]ross|prune|"
    r"compare_(directions|importances|methods)|ImportanceComparison|ablate_each|SingleAblations|jacobian_spectrum|JacobianSpectrum|"
    r"[lL]earn|Overlap|overlap|paragraphs|generations|report\.report|Run|reproduce|SelectionChecks|check_selection|labelled|CompiledModel|"
    r"linearised|widest|optimal|compare_ablations|AblationComparison|activation_distributions|examine|NeuronProfiles|compare_activations"
)


@pytest.fixture(scope="module")
def given():
    """What the examples use without making it, of the embedded model."""
    model = sepcap.load_model()
    forget, retain = (sepcap.collect(model, task, tokens=2_000, replicates=4) for task in ("local-code", "local-prose"))
    scores = sepcap.score(forget, retain)
    named = {"model": model, "forget": forget, "retain": retain, "scores": scores, "neurons": scores.top({"mlp": 0.02})}
    return named | {"ids": torch.arange(3, 40)[None], "evaluation": sepcap.evaluate(model, "local-prose", tokens=2_000)}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "example"), [(name, test.name) for name in MODULES for test in examples_of(name) if skipped_code(test)])
def test_examples_that_need_a_model_run(name, example, given, tmp_path, monkeypatch):
    if LONG.search(example):
        pytest.skip("takes minutes, or needs a folder, a classifier or the hub")
    monkeypatch.chdir(tmp_path)
    test = next(test for test in examples_of(name) if test.name == example)
    exec("".join(e.source for e in test.examples), {**test.globs, "sepcap": sepcap, **given, "model": copied(given["model"])})


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
