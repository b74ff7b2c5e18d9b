"""The lm-evaluation-harness, an extra: what is refused, how results become rows, and `on_the_harness.py` in an environment that has it."""

import importlib.metadata
import importlib.util
import math
import os
import random
import re
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import torch

from sepcap.evaluation import harness as module
from sepcap.evaluation.harness import run_lm_eval

ROOT = Path(__file__).parents[2]
PYTHON = "SEPCAP_LM_EVAL_PYTHON"
"""Environment variable: a Python that has lm_eval and everything that this one has."""
FOLDER = ROOT / "build" / "lm-eval"
"""Where that environment is made, once, without the variable."""


def test_the_harness_is_an_extra(monkeypatch, tiny_opt):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match=re.escape("sepcap[lm-eval]")):
        run_lm_eval(tiny_opt, "piqa")
    with pytest.raises(TypeError, match="model is a str"):
        run_lm_eval("opt", "piqa")


def test_results_become_rows():
    """The results of the harness as version 0.4.13 gives them."""
    found = {
        "results": {
            "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": "N/A"},
            "one": {"name": "one", "sample_len": 4, "acc,none": 0.25, "acc_stderr,none": 0.25, "f1,strict-match": 1},
        },
        "n-samples": {"one": {"original": 9, "effective": 4}},
    }
    table = module._table(found)
    assert table.columns.tolist() == ["task", "metric", "value", "stderr", "n"]
    assert table["task"].tolist() == ["group", "one", "one"]
    assert table["metric"].tolist() == ["acc", "acc", "f1 (strict-match)"]
    assert table["value"].tolist() == [0.5, 0.25, 1.0]
    assert [None if math.isnan(e) else e for e in table["stderr"]] == [None, 0.25, None]
    assert table["n"].isna().tolist() == [True, False, False]
    assert table["n"][1] == 4


def test_an_unknown_task_is_refused_with_the_nearest_name():
    with pytest.raises(ValueError, match=r"'hellaswagg' is not one of the 2 tasks and groups of the harness\. Did you mean 'hellaswag'"):
        module._check_names(["hellaswagg"], ["hellaswag", "piqa"], None)
    with pytest.raises(ValueError, match="tasks is empty"):
        module._check_names([], ["piqa"], None)


def test_global_random_states_come_back_also_after_an_error():
    def draws():
        return random.random(), float(np.random.random()), float(torch.rand(1))

    def seed(number):
        random.seed(number)
        np.random.seed(number)
        torch.manual_seed(number)

    seed(7)
    first, second = draws(), draws()
    seed(7)
    assert draws() == first

    def broken():
        with module._own_random_state():
            seed(1)
            raise KeyError

    with pytest.raises(KeyError):
        broken()
    assert draws() == second


def environment_with_lm_eval(folder: Path = FOLDER) -> Path:
    """The Python of an environment that adds lm_eval to this one, and replaces nothing of it."""
    if PYTHON in os.environ:
        return Path(os.environ[PYTHON])
    if importlib.util.find_spec("lm_eval") is not None:
        return Path(sys.executable)
    here = {name.lower(): version for name, version in installed(sys.executable).items()}
    (needed,) = {line.split(";")[0].strip() for line in importlib.metadata.requires("sepcap") or [] if line.startswith("lm_eval")}
    made_of, done = "\n".join([needed, *(f"{name}=={here[name]}" for name in sorted(here) if name != "sepcap")]), folder / "installed"
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not done.exists() or done.read_text() != made_of:
        venv.create(folder, with_pip=True, clear=True)
        purelib = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True, check=True
        )
        paths = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        # the line is run when that Python starts: it sees what is installed here, this package included
        lines = [f"import site; site.addsitedir({path!r})" for path in sorted(paths)]
        (Path(purelib.stdout.strip()) / "first.pth").write_text("\n".join(lines))
        pins = [line for line in made_of.splitlines()[1:] if not line.startswith(("pip=", "setuptools="))]
        (folder / "constraints.txt").write_text("\n".join(pins))
        pip = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "-q", "-c", str(folder / "constraints.txt"), needed]
        subprocess.run(pip, check=True, cwd=ROOT)
        done.write_text(made_of)
    there = installed(python)
    for name in ("torch", "transformers", "transformer-lens", "datasets", "numpy"):
        assert there[name] == here[name], f"lm_eval brought another {name}"
    return python


def installed(python: Path | str) -> dict[str, str]:
    """Names of all installed packages and their versions, of which the first found is what is imported."""
    code = "from importlib.metadata import distributions as d; print(*(f\"{x.metadata['Name']}=={x.version}\" for x in d()))"
    listed = subprocess.run([str(python), "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout.split()
    return {name: version for name, _, version in (entry.partition("==") for entry in reversed(listed))}


@pytest.mark.slow
def test_the_harness_in_an_environment_that_has_it():
    there = ROOT / "tests" / "helpers" / "on_the_harness.py"
    tests = [str(environment_with_lm_eval()), "-m", "pytest", "-p", "no:cacheprovider", str(there)]
    done = subprocess.run(tests, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) == 7
    assert "skipped" not in done.stdout
