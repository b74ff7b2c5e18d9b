"""Make the figures of this folder (`make figures`): the demo's comparison, the comparison of methods, kinds of ablation, activations,
modules, geometry, paragraph breaks, the league table of importances, removal certificates.

Every figure is written as SVG (for papers) and PNG (for the pages); `numbers.json` and the .csv files contain the plotted numbers. The
figures of the demo, `numbers.json` and the table in docs/reading-results.md are always made together, from the same runs. Without finished
runs it takes four to five hours on two cores, three of them for the league table and most of the rest for the comparison of methods.
Finished runs are reused. `--parts` makes only some of the figures.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import tyro

import sepcap
from sepcap import plots
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.statistics.intervals import in_percent
from sepcap.studies.pruning.random_neurons.above_random import over_seeds
from sepcap.tasks.passages import Passage, sample_passages
from sepcap.tasks.samples import sample_task

DEMO_TABLE = re.compile(r"\| run \| area \[95%\] .*\n(?:\|.*\n)+")
"""Matches the table of docs/reading-results.md that this file writes."""

TASKS = ("local-prose", "local-python", "local-cpp")


@dataclass(frozen=True)
class FigureConfig:
    """Budgets of the runs behind the figures."""

    steps: int = 10
    fraction: float = 0.1
    tokens: int = 13_000
    eval_tokens: int = 15_000
    runs: Path = Path("runs/demo")
    """The demo's folder by default: after `make demo` nothing is recomputed."""
    methods: Path = Path("runs/methods")
    """Folder of the comparison of methods, as written by `sepcap compare methods`."""
    sweep: Path = Path("runs/ablate")
    """Folder of the ablation of random neurons, as written by `sepcap ablate`."""
    studies: Path = Path("runs/studies")
    """Folder of the studies of modules, geometry and paragraph breaks."""
    importances: Path = Path("runs/importances")
    """Folder of the comparisons of importances, one for the embedded model and one for every compiled model."""
    certificate: Path = Path("runs/certificate")
    """Folder of the removal certificates."""
    forgotten: tuple[Literal["local-code", "local-prose"], ...] = ("local-code", "local-prose")
    """Tasks that are forgotten in the removal certificates; the other one is retained."""
    lost: tuple[float, ...] = (0.8, 0.5, 0.95)
    """Shares of the forget accuracy that pruning loses in the removal certificates."""
    sample: int | None = 1_500
    """Neurons of each site of the embedded model that are ablated alone, drawn at random; the compiled models' are all ablated."""
    sites: tuple[Literal["mlp", "attn_pre_out"], ...] = ("mlp", "attn_pre_out")
    """Sites of the embedded model whose importances are compared, each in a folder of its own."""
    compiled: bool = True
    """Whether importances are also compared on all compiled models."""
    out: Path = Path("figures")
    page: Path = Path("docs/reading-results.md")
    """Contains the table of the demo, which is replaced."""
    parts: tuple[Literal["pruning", "attention", "studies", "importances", "certificate"], ...] = (
        "pruning", "attention", "studies", "importances", "certificate",
    )  # fmt: skip
    """Groups of figures to make."""

    def save(self, name: str, figure: Any, width: str = "column") -> None:
        """Save a figure as SVG and PNG."""
        for suffix in (".svg", ".png"):
            plots.save(figure, self.out / f"{name}{suffix}", width=width)


def pruning(model: Any, config: FigureConfig) -> None:
    """Figures, numbers and table of the demo's comparison."""
    protocol = {name: getattr(config, name) for name in ("steps", "tokens", "eval_tokens")}
    comparison = sepcap.compare_directions(model, fractions={"mlp": config.fraction}, **protocol, out=config.runs, progress=print)
    scores = comparison.forward.scores()
    pictures = {
        "trajectory": comparison.figure("trajectory"),
        "metric-over-steps": comparison.figure("metric"),
        "areas": comparison.figure("areas"),
        "pruned-neurons": plots.pruned_neurons(comparison.forward),
        "thresholds": plots.thresholds(comparison.forward),
        "score-histograms": plots.score_histograms(scores, neurons=scores.top({"mlp": config.fraction}), log_counts=True),
    }
    numbers = {name: demo_numbers(comparison, runs) for name, runs in comparison.groups.items()}
    page = with_demo_table(config.page.read_text(encoding="utf-8"), numbers)
    for name, figure in pictures.items():
        config.save(name, figure, "page" if name == "metric-over-steps" else "column")
    (config.out / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    config.page.write_text(page, encoding="utf-8")
    print(comparison.table.to_string(index=False))


def demo_numbers(comparison: sepcap.DirectionComparison, runs: Sequence[sepcap.Run]) -> dict[str, Any]:
    """Published numbers of a selective run, or of the seeds of a random baseline."""
    for direction, run in comparison.selective.items():
        if run is runs[0]:
            (baseline, *_) = comparison.baselines.values()
            s = run.separability("top1", baseline=baseline[direction])
            fields = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name not in ("forget", "retain", "replicas")}
            return fields | {"n_documents": run.config["n_documents"]}
    found = over_seeds(runs)
    percent, *ends = (100 * (area - 1) for area in (found.mean, *found.interval))
    seeds = {"seeds": len(runs), "seeds_sd": found.sd}
    return {"area": found.mean, "interval": found.interval, "percent": percent, "percent_interval": ends, **seeds}


def with_demo_table(page: str, numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """The page with its table of the demo replaced by one made from `numbers.json`.

    Raises:
        ValueError: the page does not contain exactly one such table.
    """
    above = any(s.get("above_random") is not None for s in numbers.values())
    columns = ["run", "area [95%]", "separability [95%]", "maximum differential drop [95%]", *["above random [95%]"] * above]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, s in numbers.items():
        area, percent = (s["area"], *s["interval"]), in_percent(s["percent"], tuple(s["percent_interval"]))
        cells = [name, "{:.2f} [{:.2f}, {:.2f}]".format(*area), percent]
        if "max_drop" in s:
            cells.append("{:.1f} [{:.1f}, {:.1f}]".format(s["max_drop"], *s["max_drop_interval"]))
        else:
            cells.append(f"{s['seeds']} seeds, sd {s['seeds_sd']:.2f}")
        if above:
            known = s.get("above_random") is not None
            cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(s["above_random"], *s["above_random_interval"]) if known else "–")
        lines.append(f"| {' | '.join(cells)} |")
    found = DEMO_TABLE.findall(page)
    if len(found) != 1:
        raise ValueError(f"the page contains {len(found)} tables of the demo (which begin with {lines[0][:20]!r}); it must contain one")
    return page.replace(found[0], "\n".join(lines) + "\n")


def attention(model: Any, config: FigureConfig) -> None:
    """Figures of pruning methods, kinds of ablation, and activations in both bases."""
    # two seeds instead of the three of the command: the comparison alone takes an hour or more
    methods = sepcap.compare_methods(model, seeds=(0, 1), baseline_seeds=2, out=config.methods, progress=print)
    config.save("methods", methods.figure(), "page")
    methods.table.to_csv(config.out / "methods.csv", index=False, float_format="%.3f")
    methods.best().to_csv(config.out / "methods-best.csv", index=False, float_format="%.3f")

    heads = sepcap.compare_ablations(model)
    config.save("ablations", heads.figure(), "page")
    heads.table.to_csv(config.out / "ablations.csv", index=False, float_format="%.5f")
    config.save("ablations-of-a-head", sepcap.compare_ablations(model, layer=5, head=1).figure())

    sweep = sepcap.sweep_ablation(model, out=config.sweep)
    config.save("ablation-sweep", sweep.figure(), "page")
    sweep.by_kind.to_csv(config.out / "ablation-sweep.csv", index=False, float_format="%.5f")

    rotation = sepcap.compute_rotation(model)
    options: dict[str, Any] = {"tokens": 20_000, "histogram": True}
    forget, retain = (sepcap.collect(model, task, **options) for task in ("local-code", "local-prose"))
    in_svd = {"sites": "attn_pre_out", "rotation": rotation, **options}
    rotated = (sepcap.collect(model, "local-code", **in_svd), sepcap.collect(model, "local-prose", **in_svd))
    scores = sepcap.score(forget, retain)
    config.save("activations", plots.activation_distributions(forget, retain, layer=5, head=1, rotated=rotated), "page")
    config.save("head-scores", plots.head_scores(scores))
    config.save("importance", plots.importance_scatter(forget, retain, neurons=scores.top({"mlp": 0.05}), site="mlp"))
    config.save("importance-histograms", plots.importance_histograms(forget, retain, log_counts=True), "page")
    config.save("value-norms", plots.value_norms(model))
    config.save("mlp-biases", plots.mlp_biases(model))


def studies(model: Any, config: FigureConfig) -> None:
    """Figures of modules, geometry and paragraph breaks; each result is also written as an HTML page to the folder of the studies."""
    folder = config.studies
    texts = sample_passages(model.tokenizer, TASKS, 32, context=128, following=48)
    searched, tested = texts[::4], [text for i, text in enumerate(texts) if i % 4]  # a quarter of each kind, and the rest
    found = {
        "modules": sepcap.measure_modularity(model, out=folder / "modules", progress=print),
        "cross-task": sepcap.prune_across_tasks(model, sepcap.CrossTaskConfig(eval_tokens=15_000, tolerance=8), out=folder / "cross-task"),
        "similarity": sepcap.compare_activations(model),
        "jacobian": sepcap.jacobian_spectrum(model, tokens=3, rows=5, out=folder / "jacobian"),
        "paragraphs": sepcap.transfer_paragraphs(model, texts=tested, layers=last_layers(model, searched), out=folder / "paragraphs"),
    }
    untrained = sepcap.compare_activations(sepcap.load_model(random_weights=True, seed=0))
    pictures = {
        "module-curve": found["modules"].figure("curve"),
        "module-profile": found["modules"].figure("profile"),
        "cross-task": found["cross-task"].figure(),
        "similarity-matrices": found["similarity"].figure("matrices"),
        "similarity-profile": found["similarity"].figure("profile", control=untrained),
        "jacobian-ranks": found["jacobian"].figure("ranks"),
        "paragraph-distances": found["paragraphs"].figure("distances"),
        "paragraph-layers": found["paragraphs"].figure("layers"),
    }
    for name, figure in pictures.items():
        config.save(name, figure, "page" if name == "similarity-matrices" else "column")
    tables = {
        "modules": found["modules"].estimates(),
        "modules-differences": found["modules"].differences(),
        "cross-task": found["cross-task"].tables["matrix"],
        "similarity": found["similarity"].tables["layers"],
        "jacobian": found["jacobian"].by_layer,
        "paragraphs": found["paragraphs"].tables["differences"],
    }
    for name, table in tables.items():
        table.to_csv(config.out / f"{name}.csv", index=False, float_format="%.4f")
    for name, result in found.items():
        print(name, *result.summary(), result.report(folder / f"{name}.html"), sep="\n  ")


def last_layers(model: Any, texts: Sequence[Passage]) -> tuple[int, ...]:
    """The last layers, from the one at which patching the own break makes the true paragraph most likely."""
    layers = range(model.cfg.n_layers)

    def gain(first: int) -> float:
        found = sepcap.transfer_paragraphs(model, texts=texts, layers=tuple(layers[first:]), generate=False, profile="none")
        return found.difference("nats", "transferred")["difference"]

    return tuple(layers[max(layers, key=gain) :])


def importances(model: Any, config: FigureConfig) -> None:
    """League tables of importances: the embedded model with its untrained control, and all compiled models."""
    # rows of 128 tokens: the evaluation texts are then of more than 50 documents of each task
    budget: dict[str, Any] = {"context": 128, "tokens": 10_000, "eval_tokens": 7_000, "choice_tokens": 4_000, "sample": config.sample}
    found = {}
    for site in config.sites:
        folder = config.importances / f"default-{site}"
        one = found["default", site] = sepcap.compare_importances(model, sites=(site,), **budget, out=folder, progress=print)
        config.save(f"importances-{site}", one.figure("ranks"))
        config.save(f"importances-{site}-effects", one.figure("effects"), "page")
        config.save(f"importances-{site}-trajectories", one.figure("trajectories"))
    # texts of compiled models are short and alike; all their neurons are ablated
    small: dict[str, Any] = {"tokens": 2_000, "effect_tokens": 400, "eval_tokens": 800, "choice_tokens": 800, "best": 1, "learn_steps": 60}
    for name in sepcap.compiled_models().index if config.compiled else ():
        folder = config.importances / name
        found[name, ""] = sepcap.compare_importances(compiled=name, sites=("mlp", "attn_pre_out"), **small, out=folder, progress=print)
    for table in ("league", "trust", "reliability", "control", "labels"):
        every = [one.tables[table].assign(model=name) for (name, _), one in found.items() if table in one.tables]
        if not every:  # labels are those of compiled models
            continue
        rows = pd.concat(every)
        rows = rows[["model", *rows.columns.drop("model")]]
        keep_others(config.out / f"importances-{table}.csv", rows, ["model", "site"])
    for (name, site), one in found.items():
        print(name, *one.summary(), one.report(config.importances / f"{'-'.join(filter(None, (name, site)))}.html"), sep="\n  ")


def certificate(model: Any, config: FigureConfig) -> None:
    """Removal certificates of code and of prose, at shares of the mlp that lose about half, 80% and 95% of the forget accuracy."""
    tasks = ("local-code", "local-prose")
    statistics = {task: sepcap.collect(model, task, tokens=config.tokens) for task in tasks}
    for forget in config.forgotten:
        (retain,) = {*tasks} - {forget}
        scores = sepcap.score(statistics[forget], statistics[retain])
        for lost in config.lost:
            folder = config.certificate / f"{forget}-{lost:g}"
            neurons = scores.top({"mlp": share_that_loses(model, scores, forget, lost)})
            found = sepcap.certify(model, neurons=neurons, forget=forget, retain=retain, out=folder, progress=print)
            for name in found.FIGURES:
                config.save(f"certificate-{folder.name}-{name}", found.figure(name), "page")
            rows = found.tables["targets"].assign(certificate=folder.name)
            keep_others(config.out / "certificates.csv", rows[["certificate", *rows.columns.drop("certificate")]], ["certificate"])
            print(*found.summary(), found.report(), sep="\n  ")


def keep_others(path: Path, rows: Any, by: list[str]) -> None:
    """Write a table; rows of an earlier one that were not made this time are kept."""
    if path.exists():
        before: Any = pd.read_csv(path)
        rows = pd.concat([before[~pd.MultiIndex.from_frame(before[by]).isin(pd.MultiIndex.from_frame(rows[by]))], rows])
    rows.to_csv(path, index=False, float_format="%.4f")


def share_that_loses(model: Any, scores: sepcap.Scores, task: str, lost: float) -> float:
    """Share of the mlp, in steps of 5%, whose ablation first loses this share of the top-1 accuracy on collection texts."""
    sample = sample_task(model, sepcap.load_task(task), "collect", 15_000, seed=1)
    whole = evaluate_sample(model, sample).top1
    for step in range(1, 20):
        with sepcap.ablate(model, scores.top({"mlp": step / 20}), "zero"):
            if evaluate_sample(model, sample).top1 <= (1 - lost) * whole:
                return step / 20
    return 1.0


def main(config: FigureConfig) -> None:
    """Run the studies that are not finished, and make all figures."""
    model = sepcap.load_model()
    for part in config.parts:
        make = {"pruning": pruning, "attention": attention, "studies": studies, "importances": importances, "certificate": certificate}
        make[part](model, config)


if __name__ == "__main__":
    main(tyro.cli(FigureConfig))
