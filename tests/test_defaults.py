"""Defaults: enough documents behind every number that a call gives without being asked, and the same on the command line."""

import dataclasses
import inspect
import json
from pathlib import Path

import sepcap
from sepcap.cli.ablations import Ablate, CompareAblations
from sepcap.cli.options import config_in
from sepcap.cli.paragraphs import Paragraphs
from sepcap.cli.pruning import CompareMethods, Demo, Prune
from sepcap.studies.directions.config import DirectionComparisonConfig
from sepcap.studies.methods.config import MethodComparisonConfig
from sepcap.studies.pruning.config import PruningConfig

LEAST = 15_000
"""Predictions: 59 rows of a context of 256, each of another document."""


def test_every_evaluation_has_enough_documents_by_default():
    classes = [getattr(sepcap, name) for name in sepcap.__all__ if name.endswith(("Config", "Protocol"))]
    named = {f"{c.__name__}.{f.name}": f.default for c in classes if dataclasses.is_dataclass(c) for f in dataclasses.fields(c)}
    named |= {"toxicity.eval_tokens": inspect.signature(sepcap.evaluate_toxicity).parameters["eval_tokens"].default}
    evaluated = {name: value for name, value in named.items() if name.endswith("eval_tokens")}
    evaluated |= {name: named[name] for name in ("AblationComparisonConfig.tokens", "AblationSweepConfig.tokens")}
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
    for kind, command in (
        (MethodComparisonConfig, CompareMethods()),
        (PruningConfig, Prune()),
        (sepcap.AblationComparisonConfig, CompareAblations()),
        (sepcap.AblationSweepConfig, Ablate()),
        (sepcap.ParagraphTransferConfig, Paragraphs()),
    ):
        assert config_in(kind, command) == kind()
    small = {"fractions": {"mlp": 0.1}, "steps": 10, "tokens": 13_000, "eval_tokens": 15_000}
    assert config_in(DirectionComparisonConfig, Demo()) == DirectionComparisonConfig(**small)
