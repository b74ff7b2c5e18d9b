"""Every figure of the package, of small made-up results: one table for all tests that go through them."""

import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "plots"), *map(str, sorted((TESTS / "studies").glob("*/")))]

import planted_newer
import planted_results
import test_ablations_figures
import test_activations
import test_dimensions_figures
import test_jacobian_figures
import test_modularity_figures
import test_neuron_set_figures
import test_paragraph_figures
import test_similarity_figures
import torch
from planted_runs import maker
from planted_statistics import with_importance

import sepcap
from sepcap import plots
from sepcap.selection.score import Scores
from sepcap.studies.certificate import figures as certificate_figures
from sepcap.studies.importances import figures as importances_figures
from sepcap.studies.learned import figures as learned_figures
from sepcap.studies.methods.study import MethodComparison
from sepcap.studies.neuron_profiles import figures as profiles_figures
from sepcap.studies.pruning.jumps.figures import draw_jumps, draw_tokens
from sepcap.studies.single_ablations import figures as single_figures
from sepcap.studies.sweep import figures as sweep_figures
from sepcap.studies.unlearning import figures as unlearning_figures

FORGET, RETAIN, OTHER = [0.60, 0.45, 0.2, 0.08, 0.02], [0.55, 0.54, 0.5, 0.4, 0.1], [0.6, 0.5, 0.35, 0.2, 0.1]
SITES = {"mlp": (6, 40), "attn_pre_out": (6, 4, 8)}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random numbers, the same on every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(*sites: str) -> Scores:
    """Log-normal scores of 6 layers, of which the first neurons are 0."""
    values = {site: torch.exp(normal(*shape, seed=len(site))) for site, shape in SITES.items()}
    values["mlp"][2, :5] = 0
    return Scores({site: values[site] for site in sites or SITES}, {"importance": "abs", "threshold": {}})


def stability() -> Any:
    """Selections of 20 replicates of two sites."""
    values = dict(scores())
    noise = {site: [torch.exp(0.3 * normal(*value.shape, seed=9 + b)) for b in range(20)] for site, value in values.items()}
    drawn = {site: value * torch.stack(noise[site]) for site, value in values.items()}
    return Scores(values, {"clusters": 50}, replicates=drawn).stability({"mlp": 0.1, "attn_pre_out": 0.1})


def statistics(zeros: bool = True) -> list[Any]:
    """Of two tasks, correlated."""
    both = []
    for name, seed in (("local-code", 1), ("local-prose", 2)):
        values = {site: torch.exp(1.5 * normal(*shape) + normal(*shape, seed=seed)) for site, shape in SITES.items()}
        if zeros:
            values["mlp"][:, ::13] = 0
        both.append(with_importance(name, values))
    return both


def runs(folder: Path) -> dict[str, Any]:
    """Three runs as the demo has them, several sites, twelve runs, and three seeds of one method."""
    make, options = maker(folder), {"tasks": ("local-code", "local-prose"), "sites": SITES}
    back = options | {"tasks": ("local-prose", "local-code")}
    demo = {
        "forget local-code": make(FORGET, RETAIN, **options),
        "forget local-prose": make(FORGET, RETAIN, **back),
        "random": make(OTHER, OTHER, importance="random", **options),
    }
    zero = make(FORGET, RETAIN, thresholds=lambda site, step: 8.0 / 10**step if step < 4 else 0.0, **options | {"sites": {"mlp": (6, 40)}})
    several = [[min(1, v * (0.7 + 0.03 * i)) if k else v for k, v in enumerate(FORGET)] for i in range(12)]
    many = {f"method {i}": make(values, RETAIN, **options) for i, values in enumerate(several)}
    seeds = [make(several[2 * i], RETAIN, seed=i, **options) for i in range(3)]
    seeds += [make(OTHER, OTHER, importance="random", seed=i, **options) for i in range(2)]
    methods, beside = {}, {}
    for method in ("mlp", "attention-svd"):
        for direction, of in (("forward", options), ("reverse", back)):
            for seed in (0, 1):
                methods[method, direction, seed] = make(several[seed], RETAIN, seed=seed, **of)
                drawn = {"importance": "random", "baseline": "per_layer", "seed": seed}
                beside[method, direction, seed] = make(OTHER, OTHER, **drawn, **of)
    return {"demo": demo, "zero": zero, "many": many, "seeds": seeds, "methods": MethodComparison(folder, methods, beside)}


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def arguments(*args: Any, **options: Any) -> Arguments:
    """What a figure is drawn of."""
    return args, options


class Planted:
    """Results that several figures share, each made when it is first used."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def runs(self) -> dict[str, Any]:
        """See `runs`."""
        return runs(self.folder)

    @property
    def one(self) -> Any:
        """One run."""
        return self.runs["demo"]["forget local-code"]

    @cached_property
    def model(self) -> Any:
        """The embedded default model."""
        return sepcap.load_model()

    @property
    def chosen(self) -> Any:
        """A tenth of the neurons of a site."""
        return sepcap.score(*statistics(), importance="abs").top({"mlp": 0.1})

    @property
    def acts(self) -> list[Any]:
        """Statistics of one layer of two tasks, with histograms."""
        tasks = ("local-code", "local-prose")
        return [test_activations.statistics(task, test_activations.activations(seed, (2, 3, 4))) for seed, task in enumerate(tasks)]

    @property
    def heads(self) -> Any:
        """An ablation of every head of six layers."""
        return test_ablations_figures.comparison(test_ablations_figures.grid(6, 4), unsure=[(3, 1)])

    @property
    def few(self) -> Any:
        """An ablation of two heads."""
        return test_ablations_figures.comparison([(0, 0), (1, 2)])


FIGURES: dict[str, tuple[Callable[..., Any], Callable[[Planted], Arguments]]] = {
    "ablation-sweep": (plots.ablation_sweep, lambda _: arguments(test_ablations_figures.sweep(kinds=("zero", "mean", "peak")))),
    "ablations": (plots.ablations, lambda of: arguments(of.heads)),
    "ablations-layers": (plots.ablations, lambda of: arguments(of.heads, layers=[1, 3, 5])),
    "ablations-of-a-head": (plots.ablations, lambda _: arguments(test_ablations_figures.comparison([(5, 1)]))),
    "ablations-of-heads": (plots.ablations, lambda of: arguments(of.few)),
    "activations": (plots.activation_distributions, lambda of: arguments(*of.acts, layer=1, head=1)),
    "areas": (plots.areas, lambda of: arguments(of.runs["demo"])),
    "certificate-before-after": (certificate_figures.before_after, lambda _: arguments(planted_newer.certificate())),
    "certificate-layers": (certificate_figures.relearned_layers, lambda _: arguments(planted_newer.certificate())),
    "certificate-profile": (certificate_figures.profile, lambda _: arguments(planted_newer.certificate())),
    "certificate-relearning": (certificate_figures.relearning, lambda _: arguments(planted_newer.certificate())),
    "certificate-relearning-retain": (certificate_figures.relearning, lambda _: arguments(planted_newer.certificate(), role="retain")),
    "concentration-curve": (plots.concentration_curve, lambda _: arguments(test_modularity_figures.planted())),
    "concentration-profile": (plots.concentration_profile, lambda _: arguments(test_modularity_figures.planted())),
    "cross-task": (plots.cross_task, lambda _: arguments(test_neuron_set_figures.cross_task())),
    "cross-task-bisection": (plots.cross_task_bisection, lambda _: arguments(test_neuron_set_figures.cross_task())),
    "dimension-search": (plots.dimension_search, lambda _: arguments(test_dimensions_figures.searched())),
    "dimension-traces": (plots.dimension_traces, lambda _: arguments(test_dimensions_figures.result())),
    "drop-against-drop": (plots.drop_against_drop, lambda of: arguments(of.runs["demo"])),
    "head-scores": (plots.head_scores, lambda _: arguments(scores())),
    "importance-histograms": (plots.importance_histograms, lambda of: arguments(*statistics(), log_counts=True)),
    "importance-scatter": (plots.importance_scatter, lambda of: arguments(*statistics(), neurons=of.chosen, site="mlp")),
    "importances-effects": (importances_figures.effects, lambda _: arguments(planted_results.importances())),
    "importances-ranks": (importances_figures.ranks, lambda _: arguments(planted_results.importances())),
    "importances-trajectories": (importances_figures.trajectories, lambda _: arguments(planted_results.importances())),
    "jacobian-ranks": (plots.jacobian_ranks, lambda _: arguments(test_jacobian_figures.study())),
    "jacobian-spectra": (plots.jacobian_spectra, lambda _: arguments(test_jacobian_figures.study())),
    "jumps": (draw_jumps, lambda _: arguments(planted_results.jumps())),
    "jumps-tokens": (draw_tokens, lambda _: arguments(planted_results.jumps())),
    "learned-losses": (learned_figures.losses, lambda _: arguments(planted_results.learned())),
    "learned-scores": (plots.score_histograms, lambda _: arguments(planted_results.learned())),
    "learned-trajectory": (learned_figures.trajectories, lambda _: arguments(planted_results.learned())),
    "methods": (plots.methods, lambda of: arguments(of.runs["methods"])),
    "metric-over-steps": (plots.metric_over_steps, lambda of: arguments(of.one)),
    "metric-over-steps-of-runs": (plots.metric_over_steps, lambda of: arguments(of.runs["demo"])),
    "mlp-biases": (plots.mlp_biases, lambda of: arguments(of.model)),
    "neuron-profiles": (profiles_figures.profile, lambda _: arguments(planted_newer.neuron_profiles(), neuron=(3, 4))),
    "neuron-profiles-tasks": (profiles_figures.both_tasks, lambda _: arguments(planted_newer.neuron_profiles())),
    "overlap": (plots.overlap, lambda _: arguments(test_neuron_set_figures.overlaps())),
    "overlap-layers": (plots.overlap_layers, lambda _: arguments(test_neuron_set_figures.overlaps())),
    "overlap-ratios": (plots.overlap_ratios, lambda _: arguments(test_neuron_set_figures.overlaps())),
    "paragraph-distances": (plots.paragraph_distances, lambda _: arguments(test_paragraph_figures.planted())),
    "paragraph-layers": (plots.paragraph_layers, lambda _: arguments(test_paragraph_figures.planted())),
    "paragraph-positions": (plots.paragraph_positions, lambda _: arguments(test_paragraph_figures.planted())),
    "perplexity-against-perplexity": (plots.perplexity_against_perplexity, lambda of: arguments(of.runs["demo"])),
    "pruned-neurons": (plots.pruned_neurons, lambda of: arguments(of.one, layers=[1, 3, 5])),
    "score-histograms": (plots.score_histograms, lambda _: arguments(scores(), layers=[1, 3, 5], log_counts=True)),
    "score-histograms-of-a-layer": (plots.score_histograms, lambda _: arguments(scores("mlp"), layers=[3])),
    "score-histograms-of-a-site": (plots.score_histograms, lambda _: arguments(scores(), "mlp", neurons=scores().top({"mlp": 0.05}))),
    "selection-checks-curves": (plots.selection_checks_curves, lambda _: arguments(test_neuron_set_figures.checks())),
    "selection-checks-keep": (plots.selection_checks_keep, lambda _: arguments(test_neuron_set_figures.checks())),
    "selection-checks-layers": (plots.selection_checks_layers, lambda _: arguments(test_neuron_set_figures.checks())),
    "selection-checks-meeting": (plots.selection_checks_meeting, lambda _: arguments(test_neuron_set_figures.checks())),
    "selection-checks-step-overlaps": (plots.selection_checks_step_overlaps, lambda _: arguments(test_neuron_set_figures.checks())),
    "selection-checks-steps": (plots.selection_checks_steps, lambda _: arguments(test_neuron_set_figures.checks())),
    "selection-frequency": (plots.selection_frequency, lambda _: arguments(stability())),
    "similarity": (plots.similarity, lambda _: arguments(test_similarity_figures.result())),
    "similarity-profile": (plots.similarity_profile, lambda _: arguments(test_similarity_figures.result())),
    "single-ablations-backups": (single_figures.backups, lambda _: arguments(planted_results.single_ablations())),
    "single-ablations-backups-retain": (single_figures.backups, lambda _: arguments(planted_results.single_ablations(), task="retain")),
    "single-ablations-layers": (single_figures.over_layers, lambda _: arguments(planted_results.single_ablations())),
    "single-ablations-score": (single_figures.effect_and_score, lambda _: arguments(planted_results.single_ablations())),
    "single-ablations-score-of-layers": (
        single_figures.effect_and_score,
        lambda _: arguments(planted_results.single_ablations(), layers=[1, 3, 5]),
    ),
    "single-ablations-tasks": (single_figures.both_tasks, lambda _: arguments(planted_results.single_ablations())),
    "sweep-heat": (sweep_figures.heat, lambda of: arguments(planted_newer.sweep(of.folder / "sweep"))),
    "sweep-strip": (sweep_figures.strip, lambda of: arguments(planted_newer.sweep(of.folder / "sweep"))),
    "sweep-trajectories": (sweep_figures.trajectories, lambda of: arguments(planted_newer.sweep(of.folder / "sweep"))),
    "thresholds": (plots.thresholds, lambda of: arguments(of.runs["zero"])),
    "trajectory": (plots.trajectory, lambda of: arguments(of.runs["demo"])),
    "trajectory-of-many": (plots.trajectory, lambda of: arguments(of.runs["many"])),
    "trajectory-of-seeds": (plots.trajectory, lambda of: arguments(of.runs["seeds"])),
    "unlearning-plane": (unlearning_figures.plane, lambda _: arguments(planted_newer.unlearning())),
    "unlearning-relearning": (unlearning_figures.relearning, lambda _: arguments(planted_newer.unlearning())),
    "value-norms": (plots.value_norms, lambda of: arguments(of.model)),
}
"""Name -> the function that draws the figure, and what it is drawn of. `tests/drawing/test_all_figures.py` fails if one is missing."""


def figures(folder: Path) -> dict[str, Callable[..., Any]]:
    """Name -> a function that draws the figure, given `width`."""
    planted = Planted(folder)

    def drawn(function: Callable[..., Any], of: Callable[[Planted], Arguments]) -> Callable[..., Any]:
        args, options = of(planted)
        return lambda width="column", **more: function(*args, width=width, **options, **more)

    return {name: drawn(function, of) for name, (function, of) in FIGURES.items()}
