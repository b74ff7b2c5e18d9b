"""Make the pictures of this folder (`make figures`): the demo's comparison, the comparison of methods, kinds of ablation, activations,
modules, geometry, paragraph breaks.

Every figure is written as SVG (for papers) and PNG (for the README); `numbers.json` and the .csv files hold what they show. The figures of
the demo, `numbers.json` and the table of the README are always made together, of the same runs. From nothing it takes about an hour on two
cores, most of it the comparison of methods; finished runs are taken up. `--parts` makes some of them alone.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro

import sepcap
from sepcap import plots
from sepcap.experiments.above_random import over_seeds
from sepcap.experiments.comparison import Comparison, compare
from sepcap.experiments.config import PruningConfig
from sepcap.statistics.intervals import in_percent
from sepcap.tasks.passages import Passage, draw_passages

DEMO_TABLE = re.compile(r"\| run \| area \[95%\] .*\n(?:\|.*\n)+")
"""The table of the README that this file writes."""

TASKS = ("local-prose", "local-python", "local-cpp")


@dataclass(frozen=True)
class FigureConfig:
    """Budgets of the runs behind the figures."""

    steps: int = 10
    fraction: float = 0.1
    tokens: int = 13_000
    eval_tokens: int = 15_000
    runs: Path = Path("runs/demo")
    """The demo's folder by default: after `make demo` nothing is computed again."""
    methods: Path = Path("runs/methods")
    """Folder of the comparison of methods, as `sepcap compare-methods` leaves it."""
    protocol: Path = Path("runs/ablate")
    """Folder of the ablation of random neurons, as `sepcap ablate` leaves it."""
    studies: Path = Path("runs/studies")
    """Folder of the studies of modules, geometry and paragraph breaks."""
    out: Path = Path("figures")
    readme: Path = Path("README.md")
    """Holds the table of the demo, which is written anew."""
    parts: tuple[Literal["pruning", "attention", "studies"], ...] = ("pruning", "attention", "studies")
    """What is made."""

    def save(self, name: str, figure: Any, width: str = "column") -> None:
        """As SVG and PNG."""
        for suffix in (".svg", ".png"):
            plots.save(figure, self.out / f"{name}{suffix}", width=width)


def pruning(model: Any, config: FigureConfig) -> None:
    """The comparison of the demo."""
    pruning = PruningConfig(fractions={"mlp": config.fraction}, steps=config.steps, tokens=config.tokens, eval_tokens=config.eval_tokens)
    comparison = compare(model, pruning, config.runs, say=print)
    scores = comparison.forward.scores()
    pictures = {
        "trajectory": comparison.figure("trajectory"),
        "metric-over-steps": comparison.figure("metric"),
        "areas": comparison.figure("areas"),
        "neurons-gone": plots.neurons_gone(comparison.forward),
        "thresholds": plots.thresholds(comparison.forward),
        "score-histograms": plots.score_histograms(scores, neurons=scores.top({"mlp": config.fraction}), log_counts=True),
    }
    numbers = {name: demo_numbers(comparison, runs) for name, runs in comparison.groups.items()}
    readme = with_demo_table(config.readme.read_text(encoding="utf-8"), numbers)
    for name, figure in pictures.items():
        config.save(name, figure, "page" if name == "metric-over-steps" else "column")
    (config.out / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    config.readme.write_text(readme, encoding="utf-8")
    print(comparison.table().to_string(index=False))


def demo_numbers(comparison: Comparison, runs: Sequence[sepcap.Run]) -> dict[str, Any]:
    """What is published of a run that selects, or of the seeds of a random baseline."""
    for direction, run in comparison.selective.items():
        if run is runs[0]:
            (baseline, *_) = comparison.baselines.values()
            s = run.separability("top1", baseline=baseline[direction])
            return {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name not in ("forget", "retain", "replicas")}
    found = over_seeds(runs)
    percent, *ends = (100 * (area - 1) for area in (found.mean, *found.interval))
    seeds = {"seeds": len(runs), "seeds_sd": found.sd}
    return {"area": found.mean, "interval": found.interval, "percent": percent, "percent_interval": ends, **seeds}


def with_demo_table(readme: str, numbers: Mapping[str, Mapping[str, Any]]) -> str:
    """The README with the table of the demo made of `numbers.json`.

    Raises:
        ValueError: it does not hold one such table.
    """
    above = any(s.get("above_random") is not None for s in numbers.values())
    columns = ["run", "area [95%]", "separability [95%]", "maximum differential drop [95%]", *["above random [95%]"] * above]
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, s in numbers.items():
        area, percent = (s["area"], *s["interval"]), in_percent(s["percent"], s["percent_interval"])
        cells = [name, "{:.2f} [{:.2f}, {:.2f}]".format(*area), percent]
        if "max_drop" in s:
            cells.append("{:.1f} [{:.1f}, {:.1f}]".format(s["max_drop"], *s["max_drop_interval"]))
        else:
            cells.append(f"{s['seeds']} seeds, sd {s['seeds_sd']:.2f}")
        if above:
            known = s.get("above_random") is not None
            cells.append("{:+.2f} [{:+.2f}, {:+.2f}]".format(s["above_random"], *s["above_random_interval"]) if known else "–")
        lines.append(f"| {' | '.join(cells)} |")
    found = DEMO_TABLE.findall(readme)
    if len(found) != 1:
        raise ValueError(f"the README holds {len(found)} tables of the demo (one that begins with {lines[0][:20]!r}); it must hold one")
    return readme.replace(found[0], "\n".join(lines) + "\n")


def attention(model: Any, config: FigureConfig) -> None:
    """Methods of pruning, kinds of ablation, and what neurons do in both bases."""
    methods = sepcap.compare_methods(model, sepcap.MethodsConfig(), config.methods, say=print)
    config.save("methods", methods.figure(), "page")
    methods.table().to_csv(config.out / "methods.csv", index=False, float_format="%.3f")

    heads = sepcap.compare_ablations(model, "local-code")
    config.save("ablations", heads.figure(), "page")
    heads.table.to_csv(config.out / "ablations.csv", index=False, float_format="%.5f")
    config.save("ablations-of-a-head", sepcap.compare_ablations(model, "local-code", layer=5, head=1).figure())

    protocol = sepcap.ablation_protocol(model, sepcap.AblationProtocol(), out=config.protocol)
    config.save("ablation-protocol", protocol.figure(), "page")
    protocol.by_kind.to_csv(config.out / "ablation-protocol.csv", index=False, float_format="%.5f")

    rotation = sepcap.value_rotation(model)
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
    """Modules, geometry and paragraph breaks; what each found is in its folder as a page too."""
    folder = config.studies
    texts = draw_passages(model.tokenizer, TASKS, 32, context=128, following=48)
    searched, tested = texts[::4], [text for i, text in enumerate(texts) if i % 4]  # a quarter of every kind, and the rest
    found = {
        "modules": sepcap.modules(model, out=folder / "modules", say=print),
        "cross-task": sepcap.cross_task(model, sepcap.CrossTaskConfig(eval_tokens=15_000, tolerance=8), out=folder / "cross-task"),
        "similarity": sepcap.similarity(model),
        "tight-pass": sepcap.tight_pass(model, tokens=3, rows=5, out=folder / "tight-pass"),
        "transfer": sepcap.transfer(model, tested, layers=last_layers(model, searched), out=folder / "transfer"),
    }
    untrained = sepcap.similarity(sepcap.load_model(random_weights=True, seed=0))
    pictures = {
        "module-curve": found["modules"].figure("curve"),
        "module-profile": found["modules"].figure("profile"),
        "cross-task": found["cross-task"].figure(),
        "similarity-matrices": found["similarity"].figure("matrices"),
        "similarity-profile": found["similarity"].figure("profile", control=untrained),
        "tight-pass-ranks": found["tight-pass"].figure("ranks"),
        "transfer-distances": found["transfer"].figure("distances"),
        "transfer-layers": found["transfer"].figure("layers"),
    }
    for name, figure in pictures.items():
        config.save(name, figure, "page" if name == "similarity-matrices" else "column")
    tables = {
        "modules": found["modules"].estimates(),
        "cross-task": found["cross-task"].tables["matrix"],
        "similarity": found["similarity"].tables["layers"],
        "tight-pass": found["tight-pass"].by_layer,
        "transfer": found["transfer"].tables["differences"],
    }
    for name, table in tables.items():
        table.to_csv(config.out / f"{name}.csv", index=False, float_format="%.4f")
    for name, result in found.items():
        print(name, *result.summary(), result.report(folder / f"{name}.html"), sep="\n  ")


def last_layers(model: Any, texts: Sequence[Passage]) -> tuple[int, ...]:
    """All layers from that one on with which a break says more of its own text than another text's break does."""
    layers = range(model.cfg.n_layers)

    def gain(first: int) -> float:
        found = sepcap.transfer(model, texts, layers=tuple(layers[first:]), generate=False, profile="none")
        return found.difference("nats", "transferred", "mismatched")["difference"]

    return tuple(layers[max(layers, key=gain) :])


def main(config: FigureConfig) -> None:
    """Run what is not there yet, draw everything."""
    model = sepcap.load_model()
    for part in config.parts:
        {"pruning": pruning, "attention": attention, "studies": studies}[part](model, config)


if __name__ == "__main__":
    main(tyro.cli(FigureConfig))
