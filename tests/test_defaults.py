"""Defaults: enough documents behind every number that a call gives without being asked, and the same on the command line."""

import dataclasses
import inspect
import json
from pathlib import Path

import sepcap
from sepcap.cli import ablations as cli_ablations
from sepcap.cli.options import config_in
from sepcap.cli.pruning import CompareMethods, Demo, Prune
from sepcap.studies.directions.config import DirectionComparisonConfig
from sepcap.studies.methods.config import MethodComparisonConfig
from sepcap.studies.pruning.config import PruningConfig

LEAST = 15_000
"""Predictions: 59 rows of a context of 256, each of another document."""


def test_every_evaluation_has_enough_documents_by_default():
    classes = [getattr(sepcap, name) for name in sepcap.__all__ if name.endswith(("Config", "Protocol"))]
    named = {f"{c.__name__}.{f.name}": f.default for c in classes if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)}
    named |= {"compare_ablations.eval_tokens": inspect.signature(sepcap.compare_ablations).parameters["tokens"].default}
    named |= {"toxicity.eval_tokens": inspect.signature(sepcap.evaluate_toxicity).parameters["eval_tokens"].default}
    evaluated = {name: value for name, value in named.items() if name.endswith("eval_tokens")}
    evaluated["AblationSweepConfig.tokens"] = named["AblationSweepConfig.tokens"]
    assert len(evaluated) >= 7
    assert all(value >= LEAST for value in evaluated.values()), evaluated
    assert MethodComparisonConfig().tokens >= 10_000


def test_every_stored_study_has_enough_documents():
    stored = json.loads((Path(sepcap.__file__).parent / "assets" / "studies.json").read_text())
    for name, study in stored.items():
        for budget in study["budgets"].values():
            assert budget.get("eval_tokens", budget["tokens"]) >= LEAST, name
            assert budget["tokens"] >= 10_000, name


def test_commands_have_the_defaults_of_the_functions():
    mine = {f.name: f.default for f in dataclasses.fields(cli_ablations.CompareAblations)}
    there = inspect.signature(sepcap.compare_ablations).parameters
    for name in ("tokens", "together", "controls", "kinds", "seed"):
        assert mine[name] == there[name].default, name
    assert config_in(MethodComparisonConfig, CompareMethods()) == MethodComparisonConfig()
    assert config_in(PruningConfig, Prune()) == PruningConfig()
    small = {"fractions": {"mlp": 0.1}, "steps": 10, "tokens": 13_000, "eval_tokens": 15_000}
    assert config_in(DirectionComparisonConfig, Demo()) == DirectionComparisonConfig(**small)
