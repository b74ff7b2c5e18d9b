"""Configuration of a comparison of importances (METHODS 19). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sepcap.checks import FROM_0, FROM_1, FROM_2, Bounds, check_fields, checked, distinct
from sepcap.errors import unknown
from sepcap.learning.fitting import Fitting
from sepcap.selection.names import GRADIENTS, Contrast, ImportanceName, resolve_contrast
from sepcap.studies.base.fields import Sampled
from sepcap.studies.pruning.config import DIRECTIONS, Direction, PruningConfig

NeuronSite = Literal["mlp", "attn_pre_out", "attn_value"]

ABS, RANDOM, LEARNED, CEILING, LABELLED = "abs", "random", "learned", "ceiling", "labels"
"""Special rows: the reference score, the random control, the learned order, the ceiling set by the reproducibility of Δ, and the order that
the labels of a compiled model give."""

CONTRASTED = ("abs", "taylor", "fisher", "atp_abs", "relp_abs")
"""Importances that are also compared with contrasts other than their default."""

IMPORTANCES: tuple[str, ...] = get_args(ImportanceName)

FIXED: tuple[str, ...] = (
    *IMPORTANCES,
    *(f"{name}-{contrast}" for name in CONTRASTED for contrast in ("difference", "guarded")),
    "wanda-guarded",
)
"""Scores that are compared by default: an importance with its own contrast, or importance-contrast."""

SHARED = {"atp": "atp", "taylor": "atp", "fisher": "atp"}
"""Gradients that are computed in one shared backward pass."""


def parsed(name: str) -> tuple[str, Contrast | None]:
    """Importance and contrast of a score; no contrast if it is the importance's own.

    Raises:
        ValueError: an unknown name, or a contrast that the importance refuses.

    >>> parsed("taylor-guarded")
    ('taylor', 'guarded')
    """
    importance, _, contrast = name.partition("-")
    if importance not in IMPORTANCES or contrast not in ("", *get_args(Contrast)):
        raise unknown("scores", name, (*FIXED, RANDOM, LEARNED), "A score is an importance, or importance-contrast.")
    found: Any = contrast or None
    resolve_contrast(importance, found)
    return importance, found


def collected_with(name: str) -> str:
    """What must be collected for a score: a name of `collect(gradients=...)`, or "" for activations alone."""
    gradient = GRADIENTS.get(parsed(name)[0], "")
    return SHARED.get(gradient, gradient)


@dataclass(frozen=True)
class ImportanceComparisonConfig(Sampled):
    """Scores to compare with the exact effect of every neuron, the model, and the budget (METHODS 19)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: Any = "local-code"
    """One task of the pair; both directions are measured."""
    retain: Any = "local-prose"
    """The other task."""
    compiled: str | None = None
    """Name of a compiled model in `sepcap.compiled_models()`, which is used instead, with its own pair of tasks and its labels."""
    sites: tuple[NeuronSite, ...] = ("mlp", "attn_pre_out")
    """Sites; scores are compared separately for each."""
    scores: tuple[str, ...] = ()
    """Scores: an importance, an importance and a contrast such as taylor-guarded, random, or learned. Default all that the model allows.
    abs is always among them."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of the calibration texts, from which scores are computed: no two seeds share a document if there are enough."""
    tokens: int = 13_000
    """Token positions per task and seed from which scores are computed."""
    sample: int | None = None
    """Number of neurons of each site, drawn at random, that are ablated alone; default all."""
    effect_tokens: int = 4_096
    """Predictions per task on which every neuron is ablated alone."""
    effect_context: int = 64
    """Maximum tokens per row of single ablations: short rows are of more documents, and single ablations of short rows are cheap."""
    steps: int = 10
    """Number of equal steps of a trajectory; the last one prunes the remaining neurons of the site."""
    eval_tokens: int = 15_000
    """Predictions per task and step of a trajectory."""
    choice_tokens: int = 5_000
    """Token positions per task of the collection texts on which the best scores are chosen."""
    best: int = 3
    """Number of scores that are also pruned iteratively, in addition to abs; 0 for no iterative pruning at all."""
    learn_steps: int = Fitting.steps
    """Gradient steps of the learned order."""
    control: bool = True
    """Whether to repeat everything except trajectories with random weights, the control for effects of the architecture alone."""
    seed: int = 0
    """Seed of the sample of neurons, of random scores and of the random weights."""

    def __post_init__(self) -> None:
        check_fields(
            self, sample=Bounds(2), effect_tokens=FROM_1, effect_context=FROM_2, choice_tokens=FROM_1, best=FROM_0, learn_steps=FROM_1
        )
        distinct("sites", self.sites)
        distinct("seeds", self.seeds)
        distinct("scores", self.scores, 0)
        for name in self.scores:
            if name not in (RANDOM, LEARNED):
                parsed(name)
        if "freq" in {name.partition("-")[0] for name in self.scores} and "mlp" not in self.sites:
            raise ValueError(f"scores: 'freq' is defined for the mlp only, and sites={self.sites!r}")
        for site in self.sites:
            self.pruning(ABS, site, "forward", self.seeds[0])  # raises an error for too many steps

    @property
    def names(self) -> tuple[str, ...]:
        """The scores that are asked for, abs first."""
        return tuple(dict.fromkeys((ABS, *(self.scores or (*FIXED, RANDOM, LEARNED)))))

    @checked()
    def pruning(self, name: str, site: str, direction: Direction, seed: int) -> PruningConfig:
        """The configuration of one iterative run."""
        importance, contrast = parsed(name)
        shared = {field: getattr(self, field) for field in ("model", "steps", "tokens", "eval_tokens", "batch_size", "context")}
        forget, retain = in_direction(direction, self.forget, self.retain)
        what: dict[str, Any] = {"importance": importance, "contrast": contrast, "fractions": {site: 1 / self.steps}, "seed": seed}
        return PruningConfig(forget=forget, retain=retain, per_document=self.per_document, **shared, **what)


def in_direction(direction: Direction, forget: Any, retain: Any) -> tuple[Any, Any]:
    """The values for the task to forget and for the task to retain in a direction."""
    return (forget, retain) if direction == DIRECTIONS[0] else (retain, forget)
