"""The pages on clusters: the script is valid bash, cluster.yaml has Ray's schema, and the times are those of the stated formula."""

import importlib.util
import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import sepcap
from sepcap.studies.sweep.grid import cells_of

TOKENS = 20.2e6
"""Tokens of a pruning run with its defaults."""

PAGES = Path(__file__).parent.parent / "docs" / "clusters"


def block(page: str, language: str) -> str:
    """The one block of a language on a page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", (PAGES / page).read_text(encoding="utf-8"), re.M | re.S)
    return found


def test_the_script_for_slurm_is_valid_bash():
    checked = subprocess.run(["bash", "-n"], input=block("slurm.md", "bash"), capture_output=True, text=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_the_cluster_file_names_its_head():
    cluster = yaml.safe_load(block("cloud.md", "yaml"))
    kinds = cluster["available_node_types"]
    assert cluster["head_node_type"] in kinds
    assert cluster["max_workers"] == sum(kind.get("max_workers", 0) for kind in kinds.values())


def test_the_cluster_file_has_the_schema_of_ray():
    jsonschema = pytest.importorskip("jsonschema")
    if (ray := importlib.util.find_spec("ray")) is None or ray.origin is None:
        pytest.skip("Ray is not installed")
    schema = json.loads((Path(ray.origin).parent / "autoscaler" / "ray-schema.json").read_text())
    cluster = yaml.safe_load(block("cloud.md", "yaml"))
    jsonschema.validate(cluster, schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**cluster, "no_field_of_ray": 1}, schema)


def test_the_tokens_are_those_of_a_default_run():
    (cell,) = cells_of(sepcap.PruningConfig(), {"seed": [0]})
    assert cell.tokens == pytest.approx(TOKENS, rel=0.005)


@pytest.mark.parametrize(("page", "gpus"), [("one-node.md", 8), ("slurm.md", 32), ("cloud.md", 32)])
def test_the_times_are_those_of_the_formula(page, gpus):
    text = (PAGES / page).read_text(encoding="utf-8")
    rows = re.findall(r"^\| OPT-([\d.]+)([MB]) \| (\d) \| ([\d.]+) (\w+) \| ([\d.]+) (\w+) \|$", text, re.M)
    assert [f"{size}{unit}" for size, unit, *_ in rows] == ["125M", "1.3B", "6.7B", "30B"]
    for size, unit, per_run, *times in rows:
        one = 2 * float(size) * {"M": 1e6, "B": 1e9}[unit] * TOKENS / (0.3 * 312e12)
        for seconds, value, word in zip((one, one * math.ceil(40 / (gpus // int(per_run)))), times[::2], times[1::2], strict=True):
            minutes = word.startswith("minute")
            assert float(value) == pytest.approx(seconds / (60 if minutes else 3600), abs=0.5 if minutes else 0.05)
