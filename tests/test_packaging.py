"""What an installation brings: pins and hashes that agree, optional packages through their extras only, nothing that runs by itself."""

import re
import subprocess
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).parent.parent


def pins(file):
    return dict(re.findall(r"^([\w.-]+)==([\w.+!]+)", (ROOT / file).read_text(), flags=re.MULTILINE))


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_every_pin_but_torch_has_hashes():
    hashed = pins("requirements.txt")
    expected = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pins("constraints.txt").items() if name != "torch"}
    assert {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in hashed.items()} == expected
    blocks = re.split(r"^(?=[\w.-]+==)", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE)[1:]
    assert all(re.search(r"--hash=sha256:[0-9a-f]{64}", block) for block in blocks)


def test_lists_of_packages_name_no_place_to_get_them_from():
    for file in ("constraints.txt", "requirements.txt"):
        assert not re.search(r"https?:|file:| @ |--index|--find-links", (ROOT / file).read_text()), file


def test_heavy_packages_come_through_their_extras_only():
    by_default = {re.match(r"[\w-]+", line)[0].lower() for line in project()["dependencies"]}
    extras = project()["optional-dependencies"]
    optional = {re.match(r"[\w-]+", line)[0].lower() for name, lines in extras.items() if name != "dev" for line in lines}
    assert {"k-means-constrained", "kaleido", "wandb", "sentence-transformers", "ipywidgets"} <= optional
    assert not by_default & optional
    assert "ortools" not in by_default


def test_every_extra_that_an_error_names_exists():
    sources = "".join(path.read_text() for path in (ROOT / "sepcap").rglob("*.py"))
    named = set(re.findall(r"sepcap\[([\w-]+)\]", sources)) | set(re.findall(r"missing_extra\([^)]*?, \"([\w-]+)\", ", sources))
    assert named
    assert named <= set(project()["optional-dependencies"])


def test_pythons_that_are_promised_are_the_ones_that_install():
    promised = [line.rsplit(" ", 1)[1] for line in project()["classifiers"] if re.search(r"3\.\d+$", line)]
    assert promised[0] == project()["requires-python"].removeprefix(">=")


def test_loading_starts_no_tracker_and_writes_nothing_into_the_home_folder(tmp_path, tiny_folders):
    code = f"""
import sys, sepcap
model = sepcap.load_model({str(tiny_folders["opt"])!r}, device="cpu")
sepcap.evaluate(model, [f"text number {{i}} of many" * 9 for i in range(60)], tokens=200, context=16)
wandb = sys.modules.get("wandb")
assert wandb is None or wandb.run is None
"""
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    environment = {"HOME": str(home), "PATH": "", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd=here, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "wandb" not in done.stdout + done.stderr
    assert [path for folder in (home, here) for path in folder.rglob("*") if path.is_file()] == []
