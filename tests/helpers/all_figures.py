"""Every figure of the package, of small made-up results: one table for all tests that go through them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parents[1]
sys.path += [str(TESTS / "plots"), *map(str, sorted((TESTS / "studies").glob("*/")))]

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
from sepcap.studies.methods.study import MethodComparison

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


def figures(folder: Path) -> dict[str, Callable[..., Any]]:
    """Name -> a function that draws the figure, given `width`."""
    of, model = runs(folder), sepcap.load_model()
    one = of["demo"]["forget local-code"]
    forget, retain = statistics()
    chosen = sepcap.score(*statistics(), importance="abs").top({"mlp": 0.1})
    tasks = ("local-code", "local-prose")
    acts = [test_activations.statistics(task, test_activations.activations(seed, (2, 3, 4))) for seed, task in enumerate(tasks)]
    passes, sets = test_jacobian_figures.study(), test_neuron_set_figures
    moved = test_paragraph_figures.planted()
    heads = test_ablations_figures.comparison(test_ablations_figures.grid(6, 4), unsure=[(3, 1)])
    few = test_ablations_figures.comparison([(0, 0), (1, 2)])
    checks = sets.checks()

    def draw(function: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
        return lambda width="column": function(*arguments, width=width, **options)

    return {
        "ablation-sweep": draw(plots.ablation_sweep, test_ablations_figures.sweep(kinds=("zero", "mean", "peak"))),
        "ablations": draw(plots.ablations, heads),
        "ablations-layers": draw(plots.ablations, heads, layers=[1, 3, 5]),
        "ablations-of-heads": draw(plots.ablations, few),
        "ablations-of-a-head": draw(plots.ablations, test_ablations_figures.comparison([(5, 1)])),
        "activations": draw(plots.activation_distributions, *acts, layer=1, head=1),
        "areas": draw(plots.areas, of["demo"]),
        "concentration-curve": draw(plots.concentration_curve, test_modularity_figures.planted()),
        "concentration-profile": draw(plots.concentration_profile, test_modularity_figures.planted()),
        "selection-checks-curves": draw(plots.selection_checks_curves, checks),
        "selection-checks-keep": draw(plots.selection_checks_keep, checks),
        "selection-checks-layers": draw(plots.selection_checks_layers, checks),
        "selection-checks-meeting": draw(plots.selection_checks_meeting, checks),
        "selection-checks-step-overlaps": draw(plots.selection_checks_step_overlaps, checks),
        "selection-checks-steps": draw(plots.selection_checks_steps, checks),
        "cross-task": draw(plots.cross_task, sets.cross_task()),
        "cross-task-bisection": draw(plots.cross_task_bisection, sets.cross_task()),
        "dimension-traces": draw(plots.dimension_traces, test_dimensions_figures.result()),
        "drop-against-drop": draw(plots.drop_against_drop, of["demo"]),
        "head-scores": draw(plots.head_scores, scores()),
        "importance-histograms": draw(plots.importance_histograms, forget, retain, log_counts=True),
        "importance-scatter": draw(plots.importance_scatter, forget, retain, neurons=chosen, site="mlp"),
        "jacobian-ranks": draw(plots.jacobian_ranks, passes),
        "jacobian-spectra": draw(plots.jacobian_spectra, passes),
        "methods": draw(plots.methods, of["methods"]),
        "metric-over-steps": draw(plots.metric_over_steps, one),
        "metric-over-steps-of-runs": draw(plots.metric_over_steps, of["demo"]),
        "mlp-biases": draw(plots.mlp_biases, model),
        "pruned-neurons": draw(plots.pruned_neurons, one, layers=[1, 3, 5]),
        "overlap-layers": draw(plots.overlap_layers, sets.overlaps()),
        "overlap-ratios": draw(plots.overlap_ratios, sets.overlaps()),
        "overlap": draw(plots.overlap, sets.overlaps()),
        "perplexity-against-perplexity": draw(plots.perplexity_against_perplexity, of["demo"]),
        "score-histograms": draw(plots.score_histograms, scores(), layers=[1, 3, 5], log_counts=True),
        "score-histograms-of-a-site": draw(plots.score_histograms, scores(), "mlp", neurons=scores().top({"mlp": 0.05})),
        "score-histograms-of-a-layer": draw(plots.score_histograms, scores("mlp"), layers=[3]),
        "selection-frequency": draw(plots.selection_frequency, stability()),
        "similarity": draw(plots.similarity, test_similarity_figures.result()),
        "similarity-profile": draw(plots.similarity_profile, test_similarity_figures.result()),
        "thresholds": draw(plots.thresholds, of["zero"]),
        "trajectory": draw(plots.trajectory, of["demo"]),
        "trajectory-of-many": draw(plots.trajectory, of["many"]),
        "trajectory-of-seeds": draw(plots.trajectory, of["seeds"]),
        "paragraph-distances": draw(plots.paragraph_distances, moved),
        "paragraph-layers": draw(plots.paragraph_layers, moved),
        "paragraph-positions": draw(plots.paragraph_positions, moved),
        "value-norms": draw(plots.value_norms, model),
    }
