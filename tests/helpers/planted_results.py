"""Made-up results of the newer studies, with the columns that their figures draw."""

from typing import Any

import numpy as np
import pandas as pd
import torch

from sepcap.studies.importances.config import CEILING
from sepcap.studies.importances.result import ImportanceComparison
from sepcap.studies.learned.study import ORDERS, TEXTS, LearnedRanking
from sepcap.studies.pruning.config import DIRECTIONS
from sepcap.studies.pruning.jumps.find import Jumps
from sepcap.studies.single_ablations.result import TASKS, SingleAblations

CONFIG = {"forget": "local-code", "retain": "local-prose", "model": "planted"}
LAYERS, WIDTH = 6, 40
NAMES = ("abs", "freq", "rms", "std", "atp", "relp", "ig", "taylor", "snip", "random", "learned", CEILING)
SHARES = np.linspace(0, 1, 11)


def _with_ends(name: str, value: float, half: float = 0.05) -> dict[str, float]:
    return {name: value, f"{name}_low": value - half, f"{name}_high": value + half}


def _places() -> torch.Tensor:
    return torch.cartesian_prod(torch.arange(LAYERS), torch.arange(WIDTH))


class PlantedAblations(SingleAblations):
    """Synergies that are given, instead of those of rows."""

    def synergy(self, task: Any = "forget", metric: str = "loss") -> Any:
        """Of every pair, alternating in sign, over four powers of ten."""
        n = len(self.tensors["pairs"])
        value = 10.0 ** -np.linspace(1, 4, n) * np.where(np.arange(n) % 3, 1, -1) * (1 if task == "forget" else 0.3)
        return np.stack([value, value - 1e-4, value + 1e-4])


def single_ablations() -> SingleAblations:
    """Effects of 240 neurons on both tasks, heavy in both tails, and of the pairs of nine of them."""
    rng, places = np.random.default_rng(0), _places().numpy()
    columns: dict[str, Any] = {"layer": places[:, 0], "neuron": places[:, 1], "score": 10 ** rng.normal(size=len(places))}
    for task in TASKS:
        loss = rng.standard_t(2, size=len(places)) * 1e-3
        columns |= {f"delta_loss_{task}": loss, f"delta_top1_{task}": -loss / 3}
    pairs = torch.combinations(torch.arange(0, 9 * 7, 7))
    config = CONFIG | {"site": "mlp", "kind": "mean", "importance": "abs", "whole_heads": False, "shape": [LAYERS, WIDTH]}
    return PlantedAblations(config, {"neurons": pd.DataFrame(columns)}, {"places": _places(), "pairs": pairs})


def importances() -> ImportanceComparison:
    """A league of twelve scores in both directions, with trajectories of four of them."""
    rng = np.random.default_rng(1)
    league: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    tensors = {"mlp/places": _places()} | {f"mlp/delta/{task}": torch.from_numpy(rng.normal(size=LAYERS * WIDTH)) for task in TASKS}
    for direction in DIRECTIONS:
        for i, name in enumerate(NAMES):
            value = 0.9 - 0.12 * i if name != CEILING else 0.95
            row = {"site": "mlp", "direction": direction, "score": name, "passes": 10.0**i}
            for column in ("spearman_difference", "spearman_forget", "one_shot_area", "iterative_area"):
                row |= _with_ends(column, value)
            league.append(row)
            if name != CEILING:
                tensors[f"mlp/scores/{direction}/{name}"] = torch.from_numpy(rng.normal(size=LAYERS * WIDTH))
        for name, kind in (("abs", "iterative"), ("atp", "iterative"), ("abs", "one-shot"), ("learned", "one-shot")):
            power = 2 + len(name)
            tops = [{"forget": 0.5 * (1 - s) ** power, "retain": 0.6 * (1 - s**power)} for s in SHARES]
            of = {"site": "mlp", "direction": direction, "kind": kind, "score": name, "seed": 0}
            steps += [of | {"step": step} | top for step, top in enumerate(tops)]
    choice = [{"site": "mlp", "score": name, "chosen": name == "atp", "area": 0.5} for name in ("abs", "atp")]
    tables = {"league": pd.DataFrame(league), "choice": pd.DataFrame(choice), "trajectory": pd.DataFrame(steps)}
    return ImportanceComparison(CONFIG | {"neurons": {"mlp": LAYERS * WIDTH}}, tables, tensors)


def learned() -> LearnedRanking:
    """An order that separates two tasks better than its start, after sixty steps."""
    areas, steps = [], []
    for texts in TEXTS:
        for order in ORDERS:
            power = 4 if order == "learned" else 2
            areas.append({"texts": texts, "order": order, **_with_ends("area", power / 6)})
            of = {"texts": texts, "order": order}
            steps += [of | {"share": s, "forget": 0.5 * (1 - s) ** power, "retain": 0.6 * (1 - s**power)} for s in SHARES]
    rng = np.random.default_rng(2)
    history = pd.DataFrame({"step": range(60), "share": rng.uniform(size=60), "retain": rng.uniform(2, 4, 60)})
    history["forget"] = 8 - history["retain"]
    tables = {"areas": pd.DataFrame(areas), "trajectory": pd.DataFrame(steps), "history": history}
    tables["cost"] = pd.DataFrame([{"cap": 6.5, "best_step": 60}])
    scores = torch.linspace(0.01, 1, LAYERS * WIDTH)[torch.from_numpy(rng.permutation(LAYERS * WIDTH))].view(LAYERS, WIDTH)
    return LearnedRanking(CONFIG | {"steps": 60}, tables, {"scores/mlp": scores})


def jumps() -> Jumps:
    """Changes after three steps on both tasks, and twelve targets of each."""
    rows: list[dict[str, Any]] = []
    tokens: list[dict[str, Any]] = []
    for step in (1, 4, 7):
        for role in TASKS:
            change = -0.02 * step if role == "forget" else 0.01 * step
            counts = {"gained": 120, "lost": 1_480, "n": 20_000, "n_documents": 310}
            rows.append({"step": step, "role": role, "task": CONFIG[role], **_with_ends("change", change, 0.01), **counts})
            rows[-1] |= _with_ends("bigram", change / 3, 0.01)
            for i in range(12):
                text = (" the", "\n", "<b>", " self.", "averyveryverylongtoken…")[i % 5]
                of = {"step": step, "role": role, "token": i, "text": text, "right_before": 90, "right_after": 40, "count": 200}
                tokens.append(of | _with_ends("change", change * (i - 4) / 20, 0.002))
    return Jumps(CONFIG, {"jumps": pd.DataFrame(rows), "tokens": pd.DataFrame(tokens)})
