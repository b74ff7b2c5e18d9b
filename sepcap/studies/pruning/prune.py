"""Iterative selective pruning: collect, score, select, delete, evaluate, repeat (METHODS 10)."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from sepcap.checks import checked
from sepcap.errors import CorruptFile, warn
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.interventions.deletion import delete
from sepcap.interventions.rotation import compute_rotation
from sepcap.learning.fit import learn_order
from sepcap.learning.order import ranked_of, scores_of, starting_theta
from sepcap.models.sites import output_biases
from sepcap.models.weights import WeightSnapshot
from sepcap.progress import progress
from sepcap.selection.neurons import NeuronSet, random_ranks
from sepcap.selection.score import Scores, score
from sepcap.statistics.collect import collect_sample, correct_in
from sepcap.statistics.moments import Statistics
from sepcap.storage import make_folder, output_path, remove_parts, save_tensors, sole_writer
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.runner import study
from sepcap.studies.pruning.check_run import check_run
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.pruning.on_disk.run_folder import begin_run, find_run, metrics_of
from sepcap.studies.pruning.on_disk.step_files import LEARNED, ROTATION, positions_name
from sepcap.studies.pruning.plan import Plan, fitting_of, plan
from sepcap.studies.pruning.run import Run
from sepcap.studies.pruning.trackers import Callback, Trackers, lines_are_behind, tracked, trackers_of

T = TypeVar("T")

log = logging.getLogger(__name__)


@study(PruningConfig)
@checked()
def prune(model: Any, config: PruningConfig, *, out: str | Path, tracker: Trackers = "jsonl", say: Callable[[str], Any]) -> Run:
    """Remove the neurons with the highest importance on one task relative to the other, step by step, and measure what remains.

    A run is a folder: every step is written before the next begins. The same call resumes an interrupted run and ends
    with the same bits; a finished run is opened, not recomputed. The weights of the model are restored at the end;
    `run.apply(model, step)` makes the pruned model of any step.

    Args:
        model: what `load_model` returns; default is to load `config.model`.
        config: a `PruningConfig`; its fields can also be given as keywords. Its defaults are [SP]'s protocol on the embedded model, 50
            steps of 2% of the mlp neurons.
        out: folder of the run.
        tracker: where the metrics of every step are sent: "jsonl" (a line per step in the folder), "wandb" (extra `wandb`), "none", a
            function (step, values), or several of them. It is not part of the run and can change when the run resumes; one that raises
            an error is dropped with a warning.
        progress: True announces the work and its cost and shows bars, False shows nothing; a function receives the announcements, and
            every step if no bar shows it.

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

        A random baseline with as many neurons per layer, and the areas of the two compared:

        >>> from dataclasses import replace
        >>> same = replace(config, importance="random", baseline="per_layer", matched="runs/first")  # doctest: +SKIP
        >>> random = [sepcap.prune(model, replace(same, seed=n), out=f"runs/first-random-{n}") for n in range(5)]  # doctest: +SKIP
        >>> run.separability("top1", baseline=random)  # doctest: +SKIP
    """
    trackers = trackers_of(tracker)
    return execute(plan(model, config), Path(out), trackers, say, say)


def execute(
    prepared: Plan, out: Path, tracker: Trackers = "jsonl", say: Callable[[str], Any] = str, announce: Callable[[str], Any] = str
) -> Run:
    """Carry out a plan in a folder; a run in it is resumed.

    `announce` receives the remaining work and its cost, `say` receives every step if no progress bar shows it.
    """
    trackers = trackers_of(tracker)
    run = find_run(out, prepared.resolved, Run)
    if run is not None:
        check_run(run)
        if run.finished and not run.trajectory_is_behind and not _lacks_lines(run, trackers):
            announce(f"{out} is finished; nothing is recomputed")
            return run
    make_folder(out)
    with sole_writer(out):
        # checked again: another process may have written before the lock was taken
        run = find_run(out, prepared.resolved, Run) or begin_run(out, prepared.resolved, Run)
        remove_parts(out)
        if run.trajectory_is_behind:
            run.write_trajectory()
        if run.finished:
            with tracked(run, [tracker for tracker in trackers if tracker == "jsonl"]):
                return run
        with _logged(out):
            _go_on(prepared, run, trackers, say, announce)
    return Run(out)


class _Log(logging.FileHandler):
    """Log file that prints nothing if it cannot be written, as on a full disk."""

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


def _go_on(prepared: Plan, run: Run, trackers: Sequence[str | Callback], say: Callable[[str], Any], announce: Callable[[str], Any]) -> None:
    """Carry out all missing steps; the weights of the model are restored."""
    model, config, done = prepared.model, prepared.config, run.steps_done
    cost = f"{prepared.cost()}; {f'resuming after step {done}' if done >= 0 else 'from the beginning'}"
    log.info(cost)
    announce(cost)
    _warn_of_versions(run.config.get("versions", {}), prepared.resolved["versions"], run.folder)
    snapshot = WeightSnapshot(model, config.sites)
    try:
        if config.rotation != "none" and not (run.folder / ROTATION).exists():
            # stored, so that another number of threads cannot change the last bits of a resumed run
            compute_rotation(model, config.rotation).save(run.folder / ROTATION)
        if done >= 0:
            run.apply(model, done)
        elif config.rotation != "none":
            run.rotation().apply(model)
        how: dict[str, Any] = {"desc": f"prune {config.importance}", "unit": "step", "leave": None, "delay": 0}
        with progress(total=config.steps + 1, initial=done + 1, **how) as bar, tracked(run, trackers) as send:
            for step in range(done + 1, config.steps + 1):
                _step(prepared, run, step)
                send(step)
                bar.set_postfix_str(_progress(run, step))
                bar.update(1)
                if bar.disable:
                    say(f"{run.folder.name}: step {step} of {config.steps}, {_progress(run, step)}")
    except KeyboardInterrupt as stop:
        reached = f"after step {run.steps_done} of {config.steps}" if run.steps_done >= 0 else "before step 0 was done"
        message = f"stopped {reached}; the same command resumes from there (folder {run.folder})"
        log.info(message)
        raise KeyboardInterrupt(message) from stop
    finally:
        snapshot.restore()


def _lacks_lines(run: Run, trackers: Sequence[str | Callback]) -> bool:
    try:
        return "jsonl" in trackers and lines_are_behind(run)
    except (OSError, CorruptFile):  # the tracker warns when it writes
        return True


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
    pruned = run.neurons(step - 1) if step else NeuronSet.empty(model, config.sites)
    thresholds: dict[str, float] = {}
    if step:
        statistics, tokens = _statistics(prepared, run, step)
        new, thresholds = _selected(prepared, run, statistics, step, pruned)
        pruned = pruned | new
        delete(model, new, _offset(config, statistics))
    evaluations = {}
    for role, sample in prepared.evaluate.items():
        measure = partial(evaluate_sample, model, sample, batch_size=config.batch_size)
        evaluations[role] = measure() if step else prepared.once(("unpruned", sample.task, sample.fingerprint), measure)
        tokens += sample.tokens
    if step == 0:
        # written before the step: a run that has a step 0 has its statistics, and the positions that later steps need
        right = _right(prepared)
        for role, positions in right.items():
            save_tensors(run.folder / positions_name(role), {"positions": positions}, {"kind": "positions"})
        for role, measured in _unpruned(prepared, right).items():
            measured.save(run.folder / "statistics" / f"{role}.safetensors")
        if config.importance == "learned":
            _learn(prepared, run)
        tokens += prepared.collected * (1 + (config.positions == "correct"))
    record = {
        "step": step,
        "tasks": {role: metrics_of(e) for role, e in evaluations.items()},
        "pruned_per_layer": {site: pruned.per_layer(site) for site in pruned.masks},
        "thresholds": thresholds,
        "seconds": time.perf_counter() - started,
        "tokens": tokens,
    }
    biases = output_biases(prepared.populations.values()) if config.offset != "none" else None
    run.write_step(step, record, evaluations, pruned, biases)
    log.info("step %d: %s; %s neurons pruned", step, _progress(run, step), f"{len(pruned):,}")


def _selected(
    prepared: Plan, run: Run, statistics: dict[str, Statistics], step: int, pruned: NeuronSet
) -> tuple[NeuronSet, dict[str, float]]:
    """Neurons that a step selects, and the lowest selected score per site, if it selects by score."""
    if prepared.matched is not None:
        return prepared.matched.draw(step, pruned, prepared.config.seed), {}
    config, scores = prepared.config, _scores(prepared, run, statistics, step)
    now = config.pace.at(step)
    if config.recollect:
        chosen = scores.top(now, per_layer=config.per_layer, exclude=pruned, aggregate=config.aggregate)
    else:
        # the base scores never change, so all that is pruned by this step is selected at once
        chosen = scores.top(config.pace.by(step), per_layer=config.per_layer, aggregate=config.aggregate)
    return NeuronSet(chosen.masks) - pruned, {site: value for site, value in chosen.info["threshold"].items() if site in now}


def _collect(prepared: Plan, role: str, only: Tensor | None) -> Statistics:
    c = prepared.config
    how: dict[str, Any] = {"batch_size": c.batch_size, "histogram": c.histogram(role), "gradients": c.gradients, "only": only}
    return collect_sample(prepared.model, prepared.collect[role], c.sites, **how)


def _unpruned(prepared: Plan, right: dict[str, Tensor]) -> dict[str, Statistics]:
    """Statistics of the unpruned model, collected once for all runs of a comparison."""
    statistics, c = {}, prepared.config
    for role, sample in prepared.collect.items():
        key = ("statistics", sample.task, sample.fingerprint, c.histogram(role), c.gradients, c.positions)
        statistics[role] = prepared.once(key, partial(_collect, prepared, role, right.get(role)))
    return statistics


def _right(prepared: Plan) -> dict[str, Tensor]:
    """Positions at which the unpruned model is right, found once for all runs of a comparison; empty if all positions count."""
    c = prepared.config
    return {
        role: prepared.once(("right", sample.task, sample.fingerprint), partial(correct_in, prepared.model, sample, c.batch_size))
        for role, sample in prepared.collect.items()
        if c.positions == "correct"
    }


def _statistics(prepared: Plan, run: Run, step: int) -> tuple[dict[str, Statistics], int]:
    """Statistics for selection and offset of a step, and the tokens processed to collect them."""
    roles = prepared.config.collected_roles
    if step > 1 and prepared.config.recollect:
        return {role: _collect(prepared, role, run.right_positions(role)) for role in roles}, prepared.recollected
    return {role: run.statistics(role) for role in roles}, 0


def _learn(prepared: Plan, run: Run) -> None:
    """Learn an order of all neurons on the unpruned model, and write it; checkpoints are in the folder of the run."""
    config = prepared.config
    ranked = ranked_of(prepared.model, list(config.fractions))
    statistics = {role: Statistics.load(run.folder / "statistics" / f"{role}.safetensors") for role in prepared.collect}
    by_abs = score(statistics["forget"], statistics["retain"], config.start, eps=config.eps, sites=config.sites)
    # shares that the run does not reach are not trained for
    pruned = config.pace.total
    largest = {one.key: min(1.0, n / one.size if isinstance(n := pruned[one.key], int) else n) for one in ranked}
    how: dict[str, Any] = {"how": fitting_of(config), "largest": largest, "constants": _offset(config, statistics)}
    store = Pieces(run.folder, run.identity)
    learned = learn_order(prepared.model, ranked, prepared.collect, starting_theta(ranked, by_abs), store=store, **how)
    info = {"importance": "learned", **{name: by_abs.info[name] for name in ("forget", "retain", "model")}}
    info |= {"learned_step": learned.step, "held_out_areas": list(learned.held_out.items())}
    Scores(scores_of(ranked, learned.theta), info).save(run.folder / LEARNED)


def _scores(prepared: Plan, run: Run, statistics: dict[str, Statistics], step: int) -> Scores:
    config = prepared.config
    if config.importance == "learned":
        return run.scores()
    if config.importance == "random":
        # without recollection one draw is used for all steps, as one set of statistics is in a selective run
        ranks = random_ranks(prepared.populations, [config.seed, step if config.recollect else 0])
        return Scores(ranks, {"importance": "random"})
    return score(statistics["forget"], statistics["retain"], config.importance, eps=config.eps, sites=config.sites, **config.contrasted)


def _offset(config: PruningConfig, statistics: dict[str, Statistics]) -> dict[str, Tensor] | None:
    if config.offset == "none":
        return None
    return {site: getattr(statistics["retain"][site], config.offset) for site in config.sites}
