"""Samples and checked inputs of a certificate, and its cost (METHODS 22)."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from sepcap.errors import missing_extra
from sepcap.interventions.deletion import delete
from sepcap.interventions.optimal import apart
from sepcap.interventions.quantise import quantiser_of
from sepcap.interventions.trial import check_deletion
from sepcap.learning.fit import HELD_OUT, ROLES
from sepcap.models.kinds import check_wraps, kind_of
from sepcap.models.sites import bind
from sepcap.models.weights import EveryWeight, fingerprint, hash_of
from sepcap.selection.neurons import NeuronSet
from sepcap.statistics.backward import check_differentiable
from sepcap.studies.base.task_sets import resolved
from sepcap.studies.certificate.arms import MATCHED, PRUNED, RANDOM, UNTOUCHED, Pruning
from sepcap.studies.certificate.config import CertificateConfig
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task
from sepcap.tasks.task import Split, Task

DEFAULTS = {"forget": "local-code", "retain": "local-prose"}


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that a certificate needs; nothing is computed or written yet.

    Attributes:
        model: the untouched model.
        pruning: how the pruned one is made of it.
        reference: a model never trained on the forget task.
        tasks: role -> task.
        fit, held: role -> collection texts to fine-tune on, and those held out of it.
        evaluate: role -> evaluation texts.
        resolved: the configuration to store.
    """

    model: Any
    config: CertificateConfig
    pruning: Pruning
    reference: Any
    tasks: dict[str, Task]
    fit: dict[str, TokenSample]
    held: dict[str, TokenSample]
    evaluate: dict[str, TokenSample]
    resolved: dict[str, Any]

    @property
    def neurons(self) -> NeuronSet | None:
        """The pruned neurons, if they are known."""
        return self.pruning.neurons

    def cost(self) -> str:
        """The planned work and its cost, in one sentence."""
        c = self.config
        kinds = 3 + (self.neurons is not None)
        runs = (kinds + len(c.variants) - 1 + (self.reference is not None)) * (len(c.seeds) + len(c.lrs) - 1)
        each = 3 * c.checkpoints[-1] + len(c.checkpoints) * sum(s.tokens for part in (self.evaluate, self.held) for s in part.values())
        said = f"{self.resolved['model']}: is {self.resolved['forget']} gone? Tests: {', '.join(c.parts)}; {kinds} models"
        if "relearn" in c.parts:
            said += f", {runs} times fine-tuned for {c.checkpoints[-1]:,} tokens: about {runs * each / 1e6:.3g} M tokens, counted forward"
        return said


def model_of(config: CertificateConfig) -> Any:
    """Name of the model to load: that of the run, unless another one is named."""
    run = _run_of(config)
    return config.model if run is None or config.model != CertificateConfig.model else run.config["model"]


def _run_of(config: CertificateConfig) -> RunFolder | None:
    given = config.run_folder
    return given if given is None or isinstance(given, RunFolder) else RunFolder.load(Path(given))


def planned(model: Any, config: CertificateConfig, neurons: Any, pruned: Any, reference: Any) -> Plan:
    """Load texts and check everything before anything is computed.

    Raises:
        ValueError: no pruned model or more than one, an empty set, a run of another model, equal tasks, too little text, a reference of
            another size or with other tokens.
        NotImplementedError: a model that predicts no next tokens, or lacks what a part needs.
    """
    if kind_of(model) != "causal":
        raise NotImplementedError(f"model={model.cfg.model_name!r} does not predict next tokens; a certificate is about those that do")
    check_differentiable(model)
    if "quantise" in config.parts:
        check_wraps(model, "rounding weights, parts=('quantise', …)")
    if "relearn" in config.parts and "lora" in config.variants:
        check_wraps(model, "fine-tuning by LoRA, variants=('lora', …)")
    config = _with_libraries(config)
    run = _run_of(config)
    pruning = _pruning(model, run, config.step, neurons, pruned)
    known = pruning.neurons
    tasks = {role: load_task(_task(config, run, role)) for role in ROLES}
    if tasks["forget"].fingerprint == tasks["retain"].fingerprint:
        raise ValueError(f"forget and retain are the same data ({tasks['forget'].name}): there is nothing to compare")
    budgets: dict[Split, int] = {"collect": config.tokens, "evaluate": config.eval_tokens}
    how: dict[str, Any] = {"context": config.context, "per_document": config.per_document}
    samples = {split: {r: sample_task(model, task, split, n, **how) for r, task in tasks.items()} for split, n in budgets.items()}
    parts = {role: apart(sample, HELD_OUT) for role, sample in samples["collect"].items()}
    names = {role: task.name for role, task in tasks.items()}
    found = resolved(model, dataclasses.replace(config, run_folder=None, step=None), names, samples)
    found |= {"step": None if run is None else run.steps_done if config.step is None else config.step}
    found |= {"pruned": _print_after(model, pruning.apply), "pruned_neurons": None if known is None else _counts(known)}
    found |= _how(model, pruning)
    if reference is not None:
        check_reference(model, reference, tasks["forget"], samples["evaluate"]["forget"], config)
        found["reference"] = fingerprint(reference)
    if found["pruned"] == found["model_fingerprint"]:
        raise ValueError("the pruned model has the weights of the untouched model: there is nothing to certify")
    fit, held = ({role: pair[which] for role, pair in parts.items()} for which in (0, 1))
    return Plan(model, config, pruning, reference, tasks, fit, held, samples["evaluate"], found)


def check_reference(model: Any, reference: Any, task: Task, sample: TokenSample, config: Any) -> None:
    """Raise if a reference model differs from the model in more than its weights.

    Raises:
        ValueError: other weights by name or shape, or other tokens.
    """
    if _shapes(model) != _shapes(reference):
        sizes = " and ".join(f"{sum(weight.numel() for weight in each.parameters()):,}" for each in (reference, model))
        raise ValueError(
            f"reference has weights of other names or shapes than the model ({sizes} weights): how fast the two learn would differ by "
            "their size; give a reference of the same architecture and size"
        )
    other = sample_task(reference, task, "evaluate", config.eval_tokens, context=config.context, per_document=config.per_document)
    if other.fingerprint != sample.fingerprint:
        raise ValueError("reference reads other tokens of the forget task than the model: give one with the same tokenizer and context")


def _shapes(model: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in model.named_parameters()}


def _with_libraries(config: CertificateConfig) -> CertificateConfig:
    """The configuration with the name of the quantiser, if all libraries that it needs are installed.

    Raises:
        ImportError: one is missing; the error names the extra.
    """
    needed = {"peft": "relearn" in config.parts and "lora" in config.variants, "sklearn": "inside" in config.parts}
    for package, asked in needed.items():
        if asked and find_spec(package) is None:
            name = {"peft": "peft", "sklearn": "scikit-learn"}[package]
            without = "variants without 'lora'" if package == "peft" else "parts without 'inside'"
            raise missing_extra(name, "certificate", f"a certificate (or give {without})")
    return dataclasses.replace(config, quantiser=quantiser_of(config.quantiser)[0]) if "quantise" in config.parts else config


def _task(config: CertificateConfig, run: RunFolder | None, role: str) -> Any:
    given = getattr(config, role)
    if given is not None:
        return given
    return DEFAULTS[role] if run is None else run.config[role]


def _pruning(model: Any, run: RunFolder | None, step: int | None, neurons: Any, pruned: Any) -> Pruning:
    given = [name for name, value in (("neurons", neurons), ("run_folder", run), ("pruned", pruned)) if value is not None]
    if len(given) != 1:
        came = "none of them" if not given else " and ".join(given)
        raise ValueError(f"{came} given: give one of neurons (a NeuronSet), run_folder (with step) and pruned (a pruned model)")
    if pruned is not None:
        return Pruning(_copied(model, pruned))
    known = neurons if run is None else run.neurons(step)
    if not known:
        at = "neurons" if run is None else f"step {run.steps_done if step is None else step} of the run"
        raise ValueError(f"{at} has no neurons: there is nothing to certify")
    for population in known.check(model).values():
        check_deletion(population)
    if run is None:
        return Pruning(lambda each: delete(each, known), known, _of_heads(known))
    c = run.config
    if (came := fingerprint(model)) != c["model_fingerprint"]:
        raise ValueError(
            f"model has other weights (fingerprint {came}) than the one of the run ({c['model']}, {c['model_fingerprint']}): give that "
            "one, unpruned"
        )
    sites = [site for site in known.masks if known.count(site)]
    heads = ("attn_pre_out",) if "heads" in c["fractions"] else ()
    rotation = None if c.get("rotation", "none") == "none" else run.rotation()
    offset = None
    if (kind := c.get("offset", "none")) != "none":
        statistics = run.statistics("retain")
        offset = {site: getattr(statistics[site], kind) for site in sites}
    how: dict[str, Any] = {} if rotation is None else {"rotate": rotation.apply}
    return Pruning(lambda each: run.apply(each, step), known, heads, offset=offset, **how)


def _of_heads(neurons: NeuronSet) -> tuple[str, ...]:
    """Sites of which the set has only whole heads, and not all."""
    of_heads = {site: mask for site, mask in neurons.masks.items() if mask.dim() == 3 and bool(mask.any()) and not bool(mask.all())}
    return tuple(site for site, mask in of_heads.items() if bool((mask.any(-1) == mask.all(-1)).all()))


def _how(model: Any, pruning: Pruning) -> dict[str, Any]:
    """What identifies the pruned neurons and the controls, beside the weights: neurons that were dead before leave no trace in those."""
    masks, offset = {} if pruning.neurons is None else pruning.neurons.masks, pruning.offset or {}
    return {
        "neurons": hash_of([(site, masks[site]) for site in sorted(masks) if bool(masks[site].any())]),
        "heads": list(pruning.heads),
        "basis": _print_after(model, pruning.rotate),
        "offset": hash_of(sorted(offset.items())),
    }


def _copied(model: Any, pruned: Any) -> Callable[[Any], None]:
    """A function that gives the model the weights of another one of its shape."""
    mine, theirs = dict(model.named_parameters()), dict(pruned.named_parameters())
    shapes = ({name: weight.shape for name, weight in each.items()} for each in (mine, theirs))
    if next(shapes) != next(shapes):
        raise ValueError("pruned has weights of other names or shapes than the model: give an edited copy of the model")

    @torch.no_grad()
    def prune(each: Any) -> None:
        for name, weight in each.named_parameters():
            weight.copy_(theirs[name])

    return prune


def _print_after(model: Any, change: Callable[[Any], None]) -> str:
    saved = EveryWeight(model)
    try:
        change(model)
        return fingerprint(model)
    finally:
        saved.restore()


def _counts(neurons: NeuronSet) -> dict[str, dict[str, int]]:
    return {site: {"pruned": neurons.count(site), "of": mask.numel()} for site, mask in neurons.masks.items()}


def what_was_pruned(config: Any) -> str:
    """The pruned neurons in words, from a stored configuration."""
    known = config["pruned_neurons"]
    if known is None:
        return "the given change of its weights"
    parts = [f"{n['pruned']:,} {site} ({100 * n['pruned'] / n['of']:.0f}%)" for site, n in known.items() if n["pruned"]]
    return f"pruning {' and '.join(parts)} neurons"


def controls_of(config: Any) -> list[str]:
    """Kinds of models of a stored configuration."""
    return [UNTOUCHED, PRUNED, *([RANDOM] if config["pruned_neurons"] is not None else []), MATCHED]


def site_names(neurons: NeuronSet | None, model: Any) -> tuple[str, ...]:
    """Sites of the pruned neurons; the mlp if they are not known."""
    if neurons is None:
        return (bind(model, "mlp").site.name,)
    return tuple(site for site in neurons.masks if neurons.count(site))
