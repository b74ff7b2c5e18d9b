"""Iterative selective pruning: collect, score, select, delete, evaluate, again and again (METHODS 10)."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from sepcap.checks import checked, warn
from sepcap.evaluation.generation import prompt_of
from sepcap.evaluation.next_token import COUNTS, evaluate_sample
from sepcap.experiments.baselines import Matched, matched_with
from sepcap.experiments.check_run import check_run
from sepcap.experiments.config import PruningConfig
from sepcap.experiments.provenance import made_with
from sepcap.experiments.run import Run, begin_run, find_run, metrics_of
from sepcap.experiments.step_files import ROTATION
from sepcap.experiments.trackers import Tracker, Trackers, are_behind, followed, trackers_of
from sepcap.interventions.deletion import check_output_biases, delete
from sepcap.interventions.rotation import check_rotation, value_rotation
from sepcap.interventions.trial import check_deletion
from sepcap.models.kinds import inner, kind_of
from sepcap.models.load import load_model
from sepcap.models.sites import output_biases, site_shape
from sepcap.models.weights import WeightSnapshot
from sepcap.progress import progress, tell
from sepcap.selection.neurons import NeuronSet, amount_in_words, how_many
from sepcap.selection.score import Scores, random_scores, score
from sepcap.statistics.collect import collect_sample
from sepcap.statistics.histogram import BINS
from sepcap.statistics.moments import Statistics
from sepcap.storage import make_folder, output_path, remove_parts, sole_writer
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.samples import check_context, sample_task
from sepcap.tasks.task import Split, load_task

T = TypeVar("T")

log = logging.getLogger(__name__)

RECORD_BYTES = 3_000
"""The record of a step, the headers of its two tensor files and its rows of the table."""

RUN_BYTES = 15_000
"""Configuration, log and the frame of the table."""


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything a run needs, sampled and checked before the first step; nothing is written yet."""

    config: PruningConfig
    model: Any
    collect: dict[str, TokenSample]
    evaluate: dict[str, TokenSample]
    resolved: dict[str, Any]
    matched: Matched | None = None
    """The run whose neurons a baseline is matched with."""
    known: dict[Any, Any] = dataclasses.field(default_factory=dict)
    """What the runs of a comparison have in common and compute once: samples, and what is measured on the unpruned model."""

    def once(self, what: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What is known already, or is made now and known from then on."""
        if what not in self.known:
            self.known[what] = make()
        return self.known[what]

    def tokens(self) -> int:
        """Tokens that go through the model in the whole run, BOS and padding not counted.

        The statistics of step 0 serve step 1; with `recollect`, every later step collects its own.
        """
        again = (self.config.steps - 1) * self.recollected if self.config.recollect else 0
        return self.collected + again + sum(s.tokens for s in self.evaluate.values()) * (self.config.steps + 1)

    def cost(self) -> str:
        """What the run will do and cost, in one sentence."""
        c, m = self.config, self.model
        neurons = {site: int(np.prod(site_shape(m, site))) for site in c.sites}
        parameters = sum(p.numel() for p in inner(m).parameters())
        extras = {"rotation": c.rotation, "offset": c.offset}
        drawn = f"{c.importance}, matched {c.baseline} with {c.matched}" if self.matched else c.importance
        how = ", ".join([f"by {drawn}", *(f"{name} {value}" for name, value in extras.items() if value != "none")])
        each = ", ".join(amount_in_words(v, k) for k, v in c.fractions.items())
        return (
            f"{m.cfg.model_name} ({parameters / 1e6:.3g} M parameters, {', '.join(f'{n:,} {s} neurons' for s, n in neurons.items())}): "
            f"forget {self.resolved['forget']}, retain {self.resolved['retain']}, {c.steps} steps of {each}, {how}; "
            f"{self.tokens() / 1e6:.3g} M tokens through the model, about {self.disk() / 1e6:.2g} MB on disk"
        )

    @property
    def collected(self) -> int:
        """Tokens of collecting once on both tasks."""
        return sum(s.tokens for s in self.collect.values())

    @property
    def recollected(self) -> int:
        """Tokens of collecting once again at a later step."""
        return sum(self.collect[role].tokens for role in self.config.collected_roles)

    def disk(self) -> int:
        """Bytes of the finished run, to within a third: statistics, and per step masks, sums per row and a record."""
        neurons = sum(int(np.prod(site_shape(self.model, site))) for site in self.config.sites)
        rows = sum(len(s.rows) for s in self.evaluate.values())
        statistics = sum(neurons * (5 * 8 + 2 * 4 + (4 * BINS + 16) * self.config.histogram(role)) for role in self.collect)
        step = neurons + rows * len(COUNTS) * 8 + RECORD_BYTES
        if self.config.offset != "none":
            step += sum(bias.nbytes for bias in output_biases(self.model, self.config.sites).values())
        rotation = 0
        if self.config.rotation != "none":
            layers, heads, d_head = site_shape(self.model, "attn_value")
            rotation = layers * (2 * heads * d_head * (d_head + 1) + self.model.cfg.d_model) * 8
        return statistics + rotation + (self.config.steps + 1) * step + RUN_BYTES


def plan(model: Any, config: PruningConfig, known: dict[Any, Any] | None = None) -> Plan:
    """Load tasks and tokens, and check that every step can be made.

    Args:
        model: what `load_model` returns.
        config: what to do.
        known: of the plan of a run that differs in direction, importance, baseline and seed alone, so that nothing is sampled or measured
            twice.
    """
    known = {} if known is None else known
    if not isinstance(config, PruningConfig):
        raise TypeError(f"config is a {type(config).__name__}; give a sepcap.PruningConfig")
    tasks = {"forget": load_task(config.forget), "retain": load_task(config.retain)}
    if tasks["forget"].fingerprint == tasks["retain"].fingerprint:
        raise ValueError(f"forget and retain are the same data ({tasks['forget'].name}): there is nothing to tell apart")
    if tasks["forget"].name == tasks["retain"].name:
        # two files of one name: tables and figures must be able to tell them apart
        tasks = {role: dataclasses.replace(task, name=f"{task.name}-{task.fingerprint[:6]}") for role, task in tasks.items()}
    for site in config.sites:
        check_deletion(model, site)
        shape = site_shape(model, site)
        for name, fraction in config.fractions.items():
            if (name == site and name != "heads") or (name == "heads" and site == "attn_pre_out"):
                layers = 1 if config.per_layer else shape[0]
                of_layer = int(np.prod(shape[1:2] if name == "heads" else shape[1:]))
                total, of = layers * of_layer, "of a layer" if config.per_layer else ""
                if how_many(fraction, total, name, of) * config.steps > total:
                    raise ValueError(
                        f"fractions[{name!r}]={fraction} in {config.steps} steps takes more than there are: {total:,} {of or name}. "
                        f"At most {total // how_many(fraction, total, name, of)} steps, or {total // config.steps} a step."
                    )
    if config.rotation != "none":
        check_rotation(model, config.rotation)
    if config.offset != "none":
        check_output_biases(model, config.sites)
    matched = None
    if config.matched is not None:
        matched = matched_with(config)
        check_run(matched.run)
    context = check_context(model, config.context)
    budgets: dict[Split, int] = {"collect": config.tokens, "evaluate": config.eval_tokens}
    samples: dict[Split, dict[str, TokenSample]] = {split: {} for split in budgets}
    for split, budget in budgets.items():
        for role in config.unpruned_roles if split == "collect" else tasks:
            task, seed = tasks[role], config.seed if split == "collect" else 0
            key = ("sample", split, task.name, task.fingerprint, seed)
            if key not in known:
                known[key] = sample_task(model, task, split, budget, context, seed, config.per_document)
            samples[split][role] = known[key]
    resolved = dataclasses.asdict(dataclasses.replace(config, forget=tasks["forget"].name, retain=tasks["retain"].name))
    if config.importance != "random":
        del resolved["baseline"]  # no other way of choosing has one
    if matched is None:
        del resolved["matched"]
    else:
        resolved["matched_neurons"] = matched.digest
    resolved |= {
        "context": context,
        **made_with(model),
        "task_fingerprints": {role: task.fingerprint for role, task in tasks.items()},
        "samples": {split: {role: s.fingerprint for role, s in by_role.items()} for split, by_role in samples.items()},
        "documents": {split: {role: list(s.indices) for role, s in by_role.items()} for split, by_role in samples.items()},
        "n_documents": {split: {role: s.n_documents for role, s in by_role.items()} for split, by_role in samples.items()},
        "tokens_found": {split: {role: s.tokens for role, s in by_role.items()} for split, by_role in samples.items()},
    }
    if kind_of(model) == "causal":
        resolved["prompts"] = {role: prompt_of(sample, model.tokenizer) for role, sample in samples["evaluate"].items()}
    if matched is not None and matched.run.config["model_fingerprint"] != resolved["model_fingerprint"]:
        raise ValueError(f"matched={config.matched!r}: that run was made with a model of other weights than {model.cfg.model_name} has")
    return Plan(config, model, samples["collect"], samples["evaluate"], resolved, matched, known)


@checked()
def prune(model: Any = None, config: PruningConfig | None = None, *, out: str | Path, tracker: Trackers = "jsonl") -> Run:
    """Remove the neurons that matter for one task and not for the other, step by step, and measure what is left.

    A run is a folder: every step is written before the next begins, the same call goes on where an interrupted one
    stopped and ends with the same bits, and a finished run is opened, not computed again. The model is given back with
    the weights it came with; `run.apply(model, step)` makes the pruned model of any step.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: what to do; default is [SP]'s protocol on the embedded model, 50 steps of 2% of the mlp neurons.
        out: folder of the run.
        tracker: who follows it step by step: "jsonl" (a line per step in the folder), "wandb" (extra `wandb`), "none", an object of
            `sepcap.Tracker`, or several of them. It may be another one each time; one that fails is left out,
            with a warning, and the run goes on.

    Returns:
        Run with `.trajectory`, `.separability(metric)`, `.neurons(step)`, `.figure(kind)`.

    Raises:
        ValueError: bad configuration, forget and retain the same, too little text, an unknown tracker.
        ImportError: a tracker whose package is not installed.
        FileExistsError: the folder holds a run of another configuration (the differing fields are named).

    Source: [SP] section 4, [SEP] section 3.

    Example:
        >>> import sepcap
        >>> config = sepcap.PruningConfig(forget="local-code", retain="local-prose", steps=20, fractions={"mlp": 0.05})
        >>> run = sepcap.prune(model, config, out="runs/first")  # doctest: +SKIP

        Random neurons beside it, as many of every layer, with the areas of the two compared:

        >>> from dataclasses import replace
        >>> same = replace(config, importance="random", baseline="per_layer", matched="runs/first")  # doctest: +SKIP
        >>> random = [sepcap.prune(model, replace(same, seed=n), out=f"runs/first-random-{n}") for n in range(5)]  # doctest: +SKIP
        >>> run.separability("top1", baseline=random)  # doctest: +SKIP
    """
    config, trackers = config or PruningConfig(), trackers_of(tracker)
    prepared = plan(load_model(config.model if model is None else model), config)
    return execute(prepared, Path(out), trackers, first=partial(tell, log=log))


def execute(
    prepared: Plan, out: Path, tracker: Trackers = "jsonl", say: Callable[[str], None] = log.debug, first: Callable[[str], None] = log.info
) -> Run:
    """Carry out a plan in a folder, from wherever the folder stands.

    `first` hears what is left to do and what it costs, `say` of every step where no bar shows it.
    """
    trackers = trackers_of(tracker)
    run = find_run(out, prepared.resolved)
    if run is not None:
        check_run(run)
        if run.finished and not run.trajectory_is_behind and not are_behind(run, trackers):
            return run
    make_folder(out)
    with sole_writer(out):
        # looked at again: another process may have written between the look and the lock
        run = find_run(out, prepared.resolved) or begin_run(out, prepared.resolved)
        remove_parts(out)
        if run.trajectory_is_behind:
            run.write_trajectory()
        if run.finished:
            with followed(run, trackers):  # who is given what is there
                return run
        with _logged(out):
            _go_on(prepared, run, trackers, say, first)
    return Run(out)


class _Log(logging.FileHandler):
    """A log that cannot be written, as on a full disk, is no reason to print more than what the run itself says."""

    def handleError(self, record: logging.LogRecord) -> None:
        return


@contextlib.contextmanager
def _logged(out: Path) -> Iterator[None]:
    handler = _Log(output_path(out / "run.log"), encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()
        log.setLevel(level)


def _go_on(prepared: Plan, run: Run, trackers: Sequence[Tracker], say: Callable[[str], None], first: Callable[[str], None]) -> None:
    """All steps that are missing; the model is left as it came."""
    model, config, done = prepared.model, prepared.config, run.steps_done
    first(f"{prepared.cost()}; {f'going on after step {done}' if done >= 0 else 'from the beginning'}")
    _warn_of_versions(run.config.get("versions", {}), prepared.resolved["versions"], run.folder)
    snapshot = WeightSnapshot(model, config.sites)
    try:
        if config.rotation != "none" and not (run.folder / ROTATION).exists():
            # kept, so that another number of threads cannot turn the last bits of what goes on
            value_rotation(model, config.rotation).save(run.folder / ROTATION)
        if done >= 0:
            run.apply(model, done)
        elif config.rotation != "none":
            run.rotation().apply(model)
        how: dict[str, Any] = {"desc": f"prune {config.importance}", "unit": "step", "leave": None, "delay": 0}
        with progress(total=config.steps + 1, initial=done + 1, **how) as bar, followed(run, trackers) as followers:
            for step in range(done + 1, config.steps + 1):
                _step(prepared, run, step)
                followers.update()
                bar.set_postfix_str(_progress(run, step))
                bar.update(1)
                if bar.disable:
                    say(f"{run.folder.name}: step {step} of {config.steps}, {_progress(run, step)}")
    except KeyboardInterrupt as stop:
        reached = f"after step {run.steps_done} of {config.steps}" if run.steps_done >= 0 else "before step 0 was done"
        message = f"stopped {reached}; the same command goes on from there (folder {run.folder})"
        log.info(message)
        raise KeyboardInterrupt(message) from stop
    finally:
        snapshot.restore()


def _warn_of_versions(before: dict[str, str], now: dict[str, str], folder: Path) -> None:
    changed = [f"{name} {before.get(name)} then, {version} now" for name, version in now.items() if before.get(name) != version]
    if changed:
        warn(f"the run in {folder} was begun with other versions ({'; '.join(changed)}): its last bits may differ")


def _progress(run: Run, step: int) -> str:
    tasks = run.record(step)["tasks"]
    return ", ".join(f"{role} top1 {tasks[role]['metrics']['top1']:.3f}" for role in tasks)


def _step(prepared: Plan, run: Run, step: int) -> None:
    """One step: everything is computed first and written at once."""
    config, model = prepared.config, prepared.model
    started, tokens = time.perf_counter(), 0
    gone = run.neurons(step - 1) if step else NeuronSet.empty(model, config.sites)
    thresholds: dict[str, float] = {}
    if step:
        statistics, tokens = _statistics(prepared, run, step)
        if prepared.matched is not None:
            new = prepared.matched.draw(step, gone, config.seed)
        else:
            new, thresholds = _selected(prepared, statistics, step, gone)
        gone = gone | new
        delete(model, new, _offset(config, statistics))
    evaluations = {}
    for role, sample in prepared.evaluate.items():
        measure = partial(evaluate_sample, model, sample, batch_size=config.batch_size)
        evaluations[role] = measure() if step else prepared.once(("unpruned", sample.task, sample.fingerprint), measure)
        tokens += sample.tokens
    if step == 0:
        # written before the step is: a run that has a step 0 has its statistics
        for role, measured in _unpruned(prepared).items():
            measured.save(run.folder / "statistics" / f"{role}.safetensors")
        tokens += prepared.collected
    record = {
        "step": step,
        "tasks": {role: metrics_of(e) for role, e in evaluations.items()},
        "gone_per_layer": {site: gone.per_layer(site) for site in gone.masks},
        "thresholds": thresholds,
        "seconds": time.perf_counter() - started,
        "tokens": tokens,
    }
    biases = output_biases(model, config.sites) if config.offset != "none" else None
    run.write_step(step, record, evaluations, gone, biases)
    log.info("step %d: %s; %s neurons gone", step, _progress(run, step), f"{len(gone):,}")


def _selected(prepared: Plan, statistics: dict[str, Statistics], step: int, gone: NeuronSet) -> tuple[NeuronSet, dict[str, float]]:
    """What a step takes by its scores, and the lowest of them per site."""
    config, scores, fractions = prepared.config, _scores(prepared, statistics, step), prepared.config.fractions
    if config.recollect:
        chosen = scores.top(fractions, per_layer=config.per_layer, exclude=gone, aggregate=config.aggregate)
    else:
        # the base scores never change, so the first `step` shares of them are taken at once
        grown = {site: amount * step if isinstance(amount, int) else min(1.0, amount * step) for site, amount in fractions.items()}
        chosen = scores.top(grown, per_layer=config.per_layer, aggregate=config.aggregate)
    return NeuronSet(chosen.masks) - gone, chosen.info["threshold"]


def _collect(prepared: Plan, roles: Iterable[str]) -> dict[str, Statistics]:
    model, config = prepared.model, prepared.config
    return {
        role: collect_sample(model, prepared.collect[role], config.sites, batch_size=config.batch_size, histogram=config.histogram(role))
        for role in roles
    }


def _unpruned(prepared: Plan) -> dict[str, Statistics]:
    """Statistics of the model as it came, collected once for all runs of a comparison."""
    statistics = {}
    for role, sample in prepared.collect.items():
        key = ("statistics", sample.task, sample.fingerprint, prepared.config.histogram(role))
        statistics[role] = prepared.once(key, lambda role=role: _collect(prepared, [role])[role])
    return statistics


def _statistics(prepared: Plan, run: Run, step: int) -> tuple[dict[str, Statistics], int]:
    """Statistics that a step selects and offsets by, and the tokens that went through the model for them."""
    roles = prepared.config.collected_roles
    if step > 1 and prepared.config.recollect:
        return _collect(prepared, roles), prepared.recollected
    return {role: run.statistics(role) for role in roles}, 0


def _scores(prepared: Plan, statistics: dict[str, Statistics], step: int) -> Scores:
    config = prepared.config
    if config.importance == "random":
        # without recollection one draw serves all steps, as one set of statistics does in a selective run
        return random_scores(prepared.model, config.sites, [config.seed, step if config.recollect else 0])
    return score(statistics["forget"], statistics["retain"], config.importance, eps=config.eps, sites=config.sites)


def _offset(config: PruningConfig, statistics: dict[str, Statistics]) -> dict[str, Tensor] | None:
    if config.offset == "none":
        return None
    return {site: getattr(statistics["retain"][site], config.offset) for site in config.sites}
