"""HookedTransformer was removed from transformer-lens in 4.0: what is said of it is tried in the environment that has 3.9."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import core
import pytest
from safetensors.torch import save_file

import sepcap

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("SEPCAP_TL3_PYTHON", ROOT / ".venv-tl39" / "bin" / "python"))
"""A Python that has transformer-lens 3.9, sepcap, pytest, hypothesis and beartype."""

NEEDED = pytest.mark.skipif(not PYTHON.exists(), reason="`make lines` makes the environment of transformer-lens 3.9")


def run_there(*arguments, **variables):
    """Run tests with transformer-lens 3.9; the number of those that passed."""
    tests = [str(PYTHON), "-m", "pytest", "-p", "no:cacheprovider", "-m", "slow or not slow", *arguments]
    done = subprocess.run(tests, cwd=ROOT, env=os.environ | variables, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2_000:]
    return sum(map(int, re.findall(r"(\d+) passed", done.stdout)))


@NEEDED
@pytest.mark.slow
def test_hooked_transformers_give_the_numbers_of_bridges(tiny_folders, tmp_path):
    for family in core.HOOKED:
        shutil.copytree(tiny_folders[family], tmp_path / family)
        bridge = sepcap.load_model(tmp_path / family, device="cpu")
        save_file(core.numbers(bridge), tmp_path / f"{family}.safetensors")
    assert run_there(core.__file__, **{core.MODELS: str(tmp_path)}) >= 100


@NEEDED
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["bridge", "hooked"])
def test_the_page_of_families_says_what_the_older_line_does(backend):
    assert run_there("tests/families/test_families.py", SEPCAP_TEST_BACKEND=backend) >= {"bridge": 180, "hooked": 70}[backend]
