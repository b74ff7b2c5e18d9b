"""Profiles of neurons: the texts on which they are active, the tokens they prefer, and the logits they write (METHODS 23)."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sepcap.checks import checked
from sepcap.models.kinds import inner, kind_of
from sepcap.models.sites import bind
from sepcap.selection.names import gradients_for
from sepcap.selection.neurons import ROTATED, NeuronSet
from sepcap.selection.score import Scores, score
from sepcap.statistics.collect import collect_sample
from sepcap.studies.base.folder import Pieces, as_json
from sepcap.studies.base.provenance import made_with
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.base.text import counted
from sepcap.studies.neuron_profiles.chosen import groups_of, units_of
from sepcap.studies.neuron_profiles.config import NeuronProfilesConfig
from sepcap.studies.neuron_profiles.logits import direct_effects, head_of
from sepcap.studies.neuron_profiles.reduced import histograms_of, reduced
from sepcap.studies.neuron_profiles.result import ROLES, NeuronProfiles
from sepcap.studies.neuron_profiles.stream import Reading, read
from sepcap.studies.single_ablations.result import SingleAblations
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import check_context, sample_task


@dataclass(frozen=True, eq=False)
class Plan:
    """Samples and checked inputs.

    Attributes:
        samples: "forget" and "retain" -> tokens.
        given: the units to examine; None if they are chosen by importance.
        resolved: the configuration to store.
    """

    model: Any
    config: NeuronProfilesConfig
    samples: dict[str, TokenSample]
    given: pd.DataFrame | None
    resolved: dict[str, Any]

    @classmethod
    def of(cls, model: Any, config: NeuronProfilesConfig, neurons: Any, scores: Any, ablations: Any) -> "Plan":
        """Check everything, and load the texts."""
        if kind_of(model) == "images":
            raise NotImplementedError(
                f"model: {type(inner(model)).__name__} takes images, and profiles are of tokens; what works for it: sepcap.collect with "
                "histogram=True, sepcap.score, sepcap.ablate_each"
            )
        bind(model, config.site)
        if neurons is None and ablations is not None:
            neurons = ablations
        if neurons is None and scores is not None:
            neurons = scores
        scores = neurons if isinstance(neurons, Scores) else scores
        ablations = neurons if isinstance(neurons, SingleAblations) else ablations
        given = None if neurons is None else units_of(model, config, neurons, scores, ablations)
        made = made_with(model)
        _check_origin(made["model_fingerprint"], neurons, ablations)
        tasks = dict(zip(ROLES, map(load_task, config.tasks), strict=True))
        context = check_context(model, config.context)
        how = {"context": context, "per_document": config.per_document}
        samples = {role: sample_task(model, task, "collect", config.tokens, **how) for role, task in tasks.items()}
        plain = dataclasses.replace(config, context=context, tasks=tuple(task.name for task in tasks.values()))
        resolved = dataclasses.asdict(plain) | {
            **made,
            "neurons": None if given is None else sha256(given.to_csv().encode()).hexdigest()[:16],
            "scores": None if scores is None else {name: scores.info.get(name) for name in ("importance", "forget", "retain")},
            "samples": {role: sample.fingerprint for role, sample in samples.items()},
            "documents": {role: list(sample.indices) for role, sample in samples.items()},
            "n_documents": {role: sample.n_documents for role, sample in samples.items()},
            "tokens_found": {role: sample.tokens for role, sample in samples.items()},
        }
        return cls(model, config, samples, given, resolved)

    def cost(self) -> str:
        """The planned work, in a sentence."""
        c, tokens = self.config, sum(sample.tokens for sample in self.samples.values())
        if self.given is None:
            unit = counted(c.n, f"{c.site} {'head' if c.whole_heads else 'neuron'}")
            what, passes = f"{unit} with the highest {c.importance} score", "two passes"
        else:
            what, passes = counted(len(self.given), "neuron or head" if c.whole_heads else "neuron"), "one pass"
        names = " and ".join(self.resolved["tasks"])
        return f"{self.resolved['model']}: profiles of {what} on {names}; {passes} over {tokens:,} tokens"

    def chosen(self) -> pd.DataFrame:
        """The units to examine."""
        if self.given is not None:
            return self.given
        c = self.config
        how: dict[str, Any] = {"batch_size": c.batch_size, "gradients": gradients_for(c.importance)}
        forget, retain = (collect_sample(self.model, self.samples[role], c.site, **how) for role in ROLES)
        scores = score(forget, retain, c.importance)
        return units_of(self.model, c, scores, scores, None)

    def compute(self, pieces: Pieces) -> NeuronProfiles:
        """One pass per task, each a piece; then what does not depend on texts."""
        units = self.chosen()
        groups = groups_of(self.model, units)
        tensors: dict[str, torch.Tensor] = {}
        parts = {}
        for role in ROLES:
            parts[role], _ = pieces.once(role, partial(self._read, role, groups, len(units)))
        tensors |= {f"{role}/{name}": value for role, part in parts.items() for name, value in part.items() if not name.startswith("raw/")}
        tensors |= histograms_of(parts)
        effects, why = self._effects(groups, len(units))
        tensors |= effects
        for role in ROLES:
            units = units.assign(**{f"{name}_{role}": tensors.pop(f"{role}/{name}").numpy() for name in ("mean", "abs", "positive")})
            units = units.assign(**{f"strongest_{role}": _strongest(tensors[f"{role}/top/activation"])})
        notes = [note for note in (why, self._no_sources(groups, tensors)) if note]
        return NeuronProfiles.of(as_json(self.resolved), units, tensors, notes, self.model.tokenizer)

    def _read(self, role: str, groups: Any, n: int) -> tuple[dict[str, torch.Tensor], None]:
        sample = self.samples[role]
        reading = Reading.of(sample, self._vocabulary(sample), self.config, kind_of(self.model) == "causal")
        return reduced(groups, n, read(self.model, groups, reading, self.config.batch_size), reading, self.config), None

    def _vocabulary(self, sample: TokenSample) -> int:
        return 1 + max(int(batch.inputs.max()) for batch in sample.batches(256))

    def _effects(self, groups: Any, n: int) -> tuple[dict[str, torch.Tensor], str]:
        """Direct effects on the logits, and why there are none, if there are none."""
        ids = torch.from_numpy(self.samples["forget"].rows[0][:16].copy())
        head = head_of(self.model, ids)
        if isinstance(head, str):
            return {}, head
        found: dict[str, torch.Tensor] = {}
        for group in groups:
            if group.heads:
                continue
            for name, value in direct_effects(head, group.population, group.layer, group.index, self.config.listed).items():
                whole = torch.full((n, value.shape[1]), -1) if name.endswith("token") else torch.full((n, value.shape[1]), torch.nan)
                found.setdefault(name, whole)[group.numbers] = value
        return found, "" if found else "no direct logit effect: a head writes in many directions"

    def _no_sources(self, groups: Any, tensors: Mapping[str, torch.Tensor]) -> str:
        """Why there are no source tokens, if there are none."""
        mixing = torch.cat([group.numbers for group in groups if group.mixes] or [torch.zeros(0, dtype=torch.long)])
        lacking = len(mixing) and all(bool((tensors[f"{role}/top/source"][mixing] < 0).all()) for role in ROLES)
        if not lacking:
            return ""
        return "no source tokens: activations are not the sum of values weighted by attention alone (a gate, or no pattern to hook)"


def _check_origin(found: str, neurons: Any, ablations: SingleAblations | None) -> None:
    """Raise if the neurons or effects are known to be of other weights than those of the model."""
    if ablations is not None and (of := ablations.config["model_fingerprint"]) != found:
        raise ValueError(f"ablations are of other weights (fingerprint {of}) than those of the model ({found}); give the ablated model")
    if isinstance(neurons, NeuronSet) and neurons.info.get(ROTATED) == found:
        raise ValueError("neurons are those of a run in a rotated basis: apply run.rotation() to a copy of the model, and give that one")


def _strongest(activation: torch.Tensor) -> np.ndarray:
    return activation[:, 0].double().numpy()


def _run(
    model: Any,
    config: NeuronProfilesConfig,
    *,
    neurons: Any = None,
    scores: Scores | None = None,
    ablations: SingleAblations | None = None,
    out: str | Path | None = None,
    say: Callable[[str], Any],
) -> NeuronProfiles:
    plan = Plan.of(model, config, neurons, scores, ablations)
    return run_study(NeuronProfiles, plan.resolved, plan.compute, out, plan.cost, say)


_run.__name__ = "examine"  # in errors and notes
_examine = study(NeuronProfilesConfig)(checked()(_run))


def examine(model: Any = None, neurons: Any = None, config: Any = None, **how: Any) -> NeuronProfiles:
    """Profile neurons, or heads: the texts on which they are active, the tokens they prefer, and what they write to the logits.

    One pass per task over its collection texts. What is kept does not grow with the number of tokens: k contexts, a few samples per
    quantile of the activation, a histogram, and a sum per frequent token for each neuron. The evaluation texts are left for checks.

    Args:
        model: what `load_model` returns; default is to load `config.model`. It is not changed.
        neurons: a NeuronSet; Scores (the `n` highest of each site); SingleAblations (the `n` whose ablation harms the task to forget
            most); or places of `site`, such as [(layer, neuron)]. Default: the `n` highest scores by `importance`.
        config: a `NeuronProfilesConfig`; its fields can also be given as keywords.
        scores: Scores to show with their ranks, if `neurons` are not Scores.
        ablations: SingleAblations whose effects are shown, if `neurons` are not those.
        out: folder of the study; without one, nothing is saved.
        progress: True announces the work and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        NeuronProfiles with `.figure(neuron)`, `.table`, `.contexts(neuron)`, `.report(path)` and `.explore()`.

    Raises:
        NotImplementedError: an image classifier.
        ValueError: no neuron, neurons of another model, too little text.
        IndexError: a place that does not exist.
        FileExistsError: `out` contains something else, or the same study with another configuration; nothing is computed then.

    Source: METHODS 23.

    Example:
        >>> profiles = sepcap.examine(model, scores, n=20, tokens=20_000)  # doctest: +SKIP
        >>> profiles.report("neurons.html")  # doctest: +SKIP
    """
    if isinstance(neurons, NeuronProfilesConfig):  # the order of arguments of all other studies
        neurons, config = None, neurons
    return _examine(model, config, neurons=neurons, **how)


_parameters = inspect.signature(_examine).parameters
_order = ["model", "neurons", "config", *(name for name in _parameters if name not in ("model", "neurons", "config"))]
_either = inspect.Parameter.POSITIONAL_OR_KEYWORD
_listed = [_parameters[name].replace(kind=_either) if name == "neurons" else _parameters[name] for name in _order]
_described: Any = examine  # the type of a function does not declare that it may have a signature of its own
_described.__signature__ = inspect.Signature(_listed)
_described.CONFIG, _described.LOADS = NeuronProfilesConfig, True
