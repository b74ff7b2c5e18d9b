"""Make the pictures of this folder (`make figures`) from the comparison of the demo.

Every figure is written as SVG (for papers) and PNG (for the README); `numbers.json` holds what they show.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import tyro

import sepcap
from sepcap import plots
from sepcap.experiments.comparison import compare
from sepcap.experiments.config import PruningConfig


@dataclass(frozen=True)
class FigureConfig:
    """Budgets of the runs behind the figures."""

    steps: int = 20
    fraction: float = 0.05
    tokens: int = 10_000
    eval_tokens: int = 15_000
    runs: Path = Path("runs/demo")
    """The demo's folder by default: after `make demo` nothing is computed again."""
    out: Path = Path("figures")


def main(config: FigureConfig) -> None:
    """Run what is not there yet, draw everything."""
    model = sepcap.load_model()
    pruning = PruningConfig(fractions={"mlp": config.fraction}, steps=config.steps, tokens=config.tokens, eval_tokens=config.eval_tokens)
    comparison = compare(model, pruning, config.runs, say=print)
    pictures = {
        "trajectory": plots.trajectory(comparison.runs),
        "metric-over-steps": plots.metric_over_steps(comparison.runs),
        "areas": plots.areas(comparison.runs),
        "neurons-gone": plots.neurons_gone(comparison.forward),
        "thresholds": plots.thresholds(comparison.forward),
        "score-histograms": plots.score_histograms(comparison.forward.scores()),
    }
    for name, figure in pictures.items():
        for suffix in (".svg", ".png"):
            plots.save(figure, config.out / f"{name}{suffix}", width="page" if name == "metric-over-steps" else "column")
    numbers = {}
    for name, run in comparison.runs.items():
        s = run.separability("top1")
        numbers[name] = {f.name: getattr(s, f.name) for f in dataclasses.fields(s) if f.name not in ("forget", "retain")}
    (config.out / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n")
    print(comparison.table().to_string(index=False))


if __name__ == "__main__":
    main(tyro.cli(FigureConfig))
