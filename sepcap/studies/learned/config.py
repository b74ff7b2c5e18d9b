"""Configuration of a learned order (METHODS 21). The API, the command line and the saved JSON use the same object."""

from dataclasses import dataclass
from typing import Any, Literal, get_args

from sepcap.checks import FRACTION, FROM_0, FROM_1, POSITIVE, check_fields, distinct
from sepcap.errors import unknown
from sepcap.learning.fitting import Fitting, Objective
from sepcap.selection.names import DIVERGENCES, ImportanceName
from sepcap.studies.base.fields import FRACTION_KEYS, Sampled, check_fractions

LearnedSite = Literal["mlp", "attn_pre_out", "attn_value", "heads"]


@dataclass(frozen=True)
class LearnedRankingConfig(Sampled):
    """Which neurons are ranked, from which initial order, and how the order is learned (METHODS 21)."""

    model: str = "default"
    """"default", a folder, or a hub name."""
    forget: Any = "local-code"
    """Task to forget: a name or a path (in Python also a Dataset or a list of strings)."""
    retain: Any = "local-prose"
    """Task to retain."""
    site: LearnedSite | tuple[LearnedSite, ...] = "mlp"
    """Neurons to rank: one site, or several, each ranked separately; "heads" are whole heads."""
    steps: int = Fitting.steps
    """Number of gradient steps."""
    objective: Objective = Fitting.objective
    """Loss on forget that is raised: of the masked model (plain), or of the masked model after simulated fine-tuning on forget (lasting),
    so that the capability does not come back at once."""
    lasting_steps: int = Fitting.lasting_steps
    """Simulated steps of fine-tuning of the lasting objective."""
    lasting_lr: float = Fitting.lasting_lr
    """Their learning rate (AdamW)."""
    init: Any = "abs"
    """The order to start from: an importance, or in Python also `Scores`."""
    constants: Literal["zero", "mean"] = "zero"
    """What masked neurons are set to: 0, or their mean on the retain task."""
    tokens: int = 40_000
    """Token positions per task of the collection texts; one in six documents is held out, to choose between start and learned order."""
    eval_tokens: int = 15_000
    """Predictions per task on which start and learned order are finally compared; their texts are not used for learning."""
    step_tokens: int = Fitting.step_tokens
    """Tokens per task and step."""
    lr: float = Fitting.lr
    """Step size of Adam, in units of θ: at the start, θ are normal quantiles of the ranks."""
    tau: float = Fitting.tau
    """Width of the sigmoid whose derivative the masks get, in units of θ."""
    cap: float = Fitting.cap
    """Loss on forget above which it is not raised further, relative to that of a unigram model of forget."""
    deepest: float = Fitting.deepest
    """Largest share of the neurons that is masked in a step; shares are drawn uniformly from 0 to it."""
    check_every: int = Fitting.check_every
    """Steps between the orders that are compared on the held-out texts, in addition to the last one."""
    seed: int = 0
    """Seed of the shares and of the order of the texts; also of the documents of the collection texts (0: their original order)."""

    def __post_init__(self) -> None:
        lasting = {"lasting_steps": FROM_0, "lasting_lr": POSITIVE}
        check_fields(self, step_tokens=FROM_1, check_every=FROM_1, tau=POSITIVE, cap=POSITIVE, deepest=FRACTION, **lasting)
        if not self.sites:
            raise ValueError("site=(): give at least one of " + ", ".join(map(repr, FRACTION_KEYS)))
        distinct("site", self.sites)
        if isinstance(self.init, str):
            if self.init not in get_args(ImportanceName):
                raise unknown("init", self.init, get_args(ImportanceName), "In Python also Scores.")
            check_fractions(dict.fromkeys(self.sites, 1.0), 1, self.init)
        elif not hasattr(self.init, "top"):
            raise TypeError(f"init is a {type(self.init).__name__}; give the name of an importance, or Scores")

    @property
    def sites(self) -> tuple[str, ...]:
        """`site` as a tuple."""
        return (self.site,) if isinstance(self.site, str) else self.site

    @property
    def histogram(self) -> bool:
        """Whether the start needs histograms."""
        return isinstance(self.init, str) and self.init in DIVERGENCES
