"""One real result of every study of the catalog, of a tiny model: name of the study -> a function that makes it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from swept import LOAD, base_of
from tiny import fresh

import sepcap

PARAGRAPHS = ["XYZVW\n\nQRSTUV", "KLMNO\n\nABCDEFG", "HIJK\n\n01234", "56789\n\nZYXWV"]
SIZES = {"tokens": 200, "eval_tokens": 300}


class SmallStudies:
    """Studies of letters and digits; each call makes one anew.

    Args:
        model_folder: folder of the trained tiny model.
        letters, digits: texts of the two tasks.
        out: an empty folder.
    """

    def __init__(self, model_folder: Path, letters: list[str], digits: list[str], out: Path) -> None:
        self.folder, self.out, self.texts = model_folder, out, {"letters": letters, "digits": digits}
        tasks = {name: sepcap.load_task(texts, name=name) for name, texts in self.texts.items()}
        self.pair = {"forget": tasks["letters"], "retain": tasks["digits"]}
        self.both = tuple(tasks.values())
        self.kinds = {name: [" ".join(texts[i : i + 4])[:60] for i in range(0, 32, 4)] for name, texts in self.texts.items()}

    @property
    def model(self) -> Any:
        """The model, fresh."""
        return fresh(self.folder)

    def run(self) -> Any:
        """A pruning run of one step."""
        return sepcap.prune(self.model, **self.pair, **SIZES, steps=1, fractions={"mlp": 0.4}, out=self.out / "run", progress=False)

    def make(self, study: str) -> Any:
        """The result of a study, by its name in the catalog, or "run"."""
        return self.makers[study]()

    @property
    def makers(self) -> dict[str, Callable[[], Any]]:
        """Name -> the function that makes the result."""
        quiet: dict[str, Any] = {"progress": False}
        pair, both, out, small = self.pair, self.both, self.out, {"seeds": (0, 1), **SIZES}
        relearn = {"lrs": (3e-3,), "checkpoints": (60,), "step_tokens": 60, "tokens": 200, "eval_tokens": 300, "seeds": (0,)}
        league = {"scores": ("abs", "random"), "sites": ("mlp",), "seeds": (0, 1), "effect_tokens": 150, "effect_context": 16, "best": 1}
        steps = {"steps": 1, **SIZES, "baseline_seeds": 2}
        again = {"budget": {"tokens": 300, "eval_tokens": 900, "steps": 1, "fractions": {"mlp": 0.4}}}
        return {
            "run": self.run,
            "activation-similarity": lambda: sepcap.compare_activations(self.model, texts=self.kinds, **quiet),
            "dimension-search": lambda: sepcap.find_dimensions(self.model, texts=self.kinds, n=2, **quiet),
            "dimension-traces": lambda: sepcap.trace_dimensions(self.model, texts=self.kinds, dims=(1, 2), **quiet),
            "jacobian-spectrum": lambda: sepcap.jacobian_spectrum(self.model, layers=(0,), task=both[0], tokens=2, rows=2, **quiet),
            "paragraph-transfer": lambda: sepcap.transfer_paragraphs(
                self.model, texts=PARAGRAPHS, generate=False, layers=(0,), embedder="tf-idf", tokens=5, paragraph_tokens=5, **quiet
            ),
            "modularity": lambda: sepcap.measure_modularity(
                self.model, tasks=both[:1], retain=both[1], fractions=(0.3,), k=6, seeds=(0, 1), draws=20, tokens=200, control=False,
                **quiet,
            ),
            "overlap": lambda: sepcap.measure_overlap(
                self.model, tasks=both, retain="others", sites=("mlp",), fractions=(0.1,), seeds=(0, 1), tokens=200, control=False, **quiet
            ),
            "jumps": lambda: self.run().jumps(self.model, tasks=pair),
            "neuron-profiles": lambda: sepcap.examine(self.model, n=2, tasks=both, tokens=300, k=2, window=8, listed=2, **quiet),
            "cross-task": lambda: sepcap.prune_across_tasks(self.model, tasks=both, tolerance=20, **small, **quiet),
            "selection-checks": lambda: sepcap.check_selection(
                self.model, **pair, fractions=(0.5, 1.0), steps=(1, 2), **small, **quiet
            ),
            "ablation-sweep": lambda: sepcap.sweep_ablation(
                self.model, task=both[0], steps=1, seeds=(0, 1), kinds=("zero",), tokens=300, reference_tokens=300, **quiet
            ),
            "compare-ablations": lambda: sepcap.compare_ablations(
                self.model, task=both[0], layer=1, head=0, kinds=("zero", "mean"), tokens=300, reference_tokens=300, **quiet
            ),
            "single-ablations": lambda: sepcap.ablate_each(self.model, **pair, sample=3, tokens=300, reference_tokens=200, **quiet),
            "compare-methods": lambda: sepcap.compare_methods(
                self.model, **pair, **steps, methods=("mlp",), seeds=(0, 1), mlp={"mlp": 0.4}, out=out / "methods", **quiet
            ),
            "compare-directions": lambda: sepcap.compare_directions(
                self.model, **pair, **steps, fractions={"mlp": 0.4}, out=out / "directions", **quiet
            ),
            "learned-ranking": lambda: sepcap.learn_ranking(
                self.model, **pair, tokens=600, eval_tokens=300, steps=2, step_tokens=100, check_every=1, **quiet
            ),
            "certificate": lambda: sepcap.certify(
                self.model, neurons=self.chosen(), **pair, **relearn, parts=("relearn", "quantise"), variants=("all",), **quiet
            ),
            "compare-unlearning": lambda: sepcap.compare_unlearning(
                self.model, **pair, methods=("prune", "random"), steps=2, fractions={"mlp": 0.3}, budget=300,
                **{"relearn_lrs" if name == "lrs" else name: value for name, value in relearn.items()}, **quiet,
            ),
            "compare-importances": lambda: sepcap.compare_importances(
                self.model, **pair, **league, **SIZES, steps=1, choice_tokens=100, sample=6, control=False, context=16, **quiet
            ),
            "reproduce": lambda: sepcap.reproduce(
                self.folder, study="sp-figure1", **again, tasks={"code": self.texts["letters"], "pile": self.texts["digits"]},
                out=out / "again", **quiet,
            ),
            "sweep": lambda: sepcap.sweep(
                base_of(self.folder, out, *self.texts.values(), steps=1), {"seed": [0, 1]}, out=out / "sweep", load=LOAD, **quiet
            ),
        }  # fmt: skip

    def chosen(self) -> Any:
        """Random neurons to certify."""
        return sepcap.NeuronSet.random(self.model, {"mlp": 0.3})
