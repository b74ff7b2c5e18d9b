"""Shared fixtures: tiny models of real configuration classes, saved to and loaded from a folder.

torch and the package are imported in functions: the process that hands out the tests to workers reads this file before it starts them.
"""

import functools
import gc
import os
import shutil
import sys
import warnings
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TQDM_DISABLE", "1")

import jaxtyping
from checker import CALLS, jaxtyped

# shapes in signatures are enforced while testing, and only then
jaxtyping.jaxtyped = jaxtyped
jaxtyping.install_import_hook("sepcap", "checker.check")

import pytest
from hypothesis import settings
from tiny import CONTEXT, FAMILIES, fresh, save_tiny, words, write_jsonl
from tiny import VOCABULARY as VOCABULARY
from tiny import tiny_config as tiny_config
from tiny import tiny_tokenizer as tiny_tokenizer

# the same examples on every run: what passes here passes elsewhere
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")


THREADS = int(os.environ.get("SEPCAP_TEST_THREADS", "1"))
"""Threads of torch in every test: one, with which tiny models are faster, unless the environment asks for more."""


@functools.cache
def watched():
    """The models of the fixtures that live longer than a test."""
    from shared_models import Watched

    return Watched()


@pytest.fixture(scope="session", autouse=True)
def settings_of_all_tests():
    """`THREADS` threads; no warning of few documents, which nearly all samples here are of; no trial deletion twice on the same model.

    The garbage collector leaves out the libraries and starts less often: it took a quarter of the time of a test.
    """
    import datasets  # noqa: F401
    import torch
    import transformer_lens  # noqa: F401
    from tried import keep_trials

    from sepcap.tasks import batches

    gc.freeze()
    gc.set_threshold(50_000, 20, 20)

    torch.set_num_threads(THREADS)
    batches.FEW = 0
    keep_trials()


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup(fixturedef):
    """Look at the models of fixtures that live longer than a test."""
    result = yield
    if fixturedef.scope != "function":
        watched().add(fixturedef.argname, result)
    return result


@pytest.fixture(autouse=True)
def shared_models_stay_as_they_are(request):
    """Fail the test that leaves a hook or a changed weight on a model that others use."""
    yield
    watched().check(request.fixturenames)


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    """A flush matters when the power fails, which no test can make happen; it takes a good part of the time of a small run."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture(autouse=True)
def no_browser(request, monkeypatch):
    """Only tests marked `browser` start one: it takes seconds, and what the others check must not depend on whether there is one."""
    if not {"browser", "slow"} & {mark.name for mark in request.node.iter_markers()}:
        monkeypatch.setitem(sys.modules, "kaleido", None)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory):
    """Folder of the tiny model of every family."""
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


COMPILED = sorted(path.name for path in (Path(__file__).parents[1] / "sepcap" / "assets" / "compiled").iterdir())


@pytest.fixture(scope="session", params=COMPILED)
def compiled(request):
    """Every compiled model in turn, with tasks of few texts; no test changes it."""
    import sepcap

    return sepcap.load_compiled(request.param, device="cpu", texts=1_000)


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] if name == "llama" else []) for name in FAMILIES])
def family(request):
    """Name of a family; a test that takes it runs once for each. Llama is in the slow tier: its weights lie as those of Mistral."""
    return request.param


@pytest.fixture
def tiny(tiny_folders, family):
    """A fresh tiny model of `family`; a test may edit it."""
    return fresh(tiny_folders[family])


@pytest.fixture
def tiny_opt(tiny_folders):
    """A fresh tiny OPT; a test may edit it."""
    return fresh(tiny_folders["opt"])


@pytest.fixture(scope="session")
def letters():
    """A list of texts: one of the two tasks of a pair."""
    return words(0, n=160, length=15)


@pytest.fixture(scope="session")
def digits():
    """A list of texts of another kind: the other task of the pair."""
    return words(0, n=160, length=15, alphabet="0123456789")


@pytest.fixture(scope="session")
def task_files(tmp_path_factory, letters, digits):
    """Both tasks as files, which another process can read."""
    folder = tmp_path_factory.mktemp("tasks")
    return {role: write_jsonl(folder / f"{role}.jsonl", texts) for role, texts in (("forget", letters), ("retain", digits))}


@pytest.fixture(scope="session")
def trained_folder(tmp_path_factory, letters, digits):
    """A tiny OPT that has seen both tasks for a second or two, so that it has accuracies to lose."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_tiny("opt", tmp_path_factory.mktemp("trained"))
    hf_model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = [i for text in letters + digits for i in tokenizer(text, add_special_tokens=False)["input_ids"]]
    rows = torch.tensor(ids[: len(ids) // (CONTEXT - 1) * (CONTEXT - 1)]).view(-1, CONTEXT - 1)
    rows = torch.cat([torch.zeros(len(rows), 1, dtype=torch.long), rows], dim=1)
    optimizer = torch.optim.AdamW(hf_model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    hf_model.train()
    for _ in range(120):
        batch = rows[torch.randint(len(rows), (32,), generator=generator)]
        hf_model(batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    hf_model.save_pretrained(folder)
    return folder


@pytest.fixture
def trained(trained_folder):
    """The trained tiny OPT, fresh; a test may edit it."""
    return fresh(trained_folder)


def find_chromium() -> str | None:
    """A Chromium or Chrome of this machine."""
    names = (os.environ.get("BROWSER_PATH", ""), "chromium", "chromium-browser", "google-chrome", "chrome")
    return next((path for name in names if name and (path := shutil.which(name))), None)


@pytest.fixture(scope="module")
def browser():
    """A Chromium that playwright steers; skips where there is none. Of a module: asyncio cannot run beside it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install 'sepcap[dev]'")
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("no Chromium or Chrome found: install one, or set BROWSER_PATH to it")
    with playwright.sync_playwright() as running:
        # root may not use the sandbox
        opened = running.chromium.launch(executable_path=chromium, args=["--no-sandbox"] if os.getuid() == 0 else [])
        yield opened
        opened.close()


@pytest.fixture(autouse=True)
def own_settings():
    """A test may set the number of threads or filter warnings; the next one does not notice. Shapes are checked anew in each.

    No sample is kept from the test before: that one may have replaced what draws it.
    """
    import torch

    from sepcap.tasks import samples

    CALLS.clear()
    samples._DRAWN.clear()
    with warnings.catch_warnings():
        yield
    torch.set_num_threads(THREADS)
