"""Fields that several configurations have, and their checks: samples of texts, sites, shares, importance, layers (METHODS 5)."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import index
from typing import Any, Literal

from sepcap.errors import unknown

FRACTION_KEYS = ("mlp", "attn_pre_out", "attn_value", "heads")

OTHERS = "others"
"""In place of a retain task: every task is scored against all other tasks of the study together."""


@dataclass(frozen=True)
class Sampled:
    """How texts are cut into rows and passed through the model."""

    batch_size: int = 16
    """Rows per forward pass."""
    context: int | None = None
    """Tokens per row; default is the model's context, at most 512."""
    per_document: int | Literal["row"] | None = "row"
    """Maximum tokens per document: "row" for as many as fit one row, a number, or None for whole documents."""


def check_fractions(fractions: Mapping[str, float], steps: int, importance: str) -> None:
    """Check that shares or counts can be pruned in `steps` steps, and that the importance is defined for every site.

    Raises:
        ValueError: names the site and what is wrong with it.
    """
    if not fractions:
        raise ValueError(f"fractions={fractions!r}: give at least one site, {{'mlp': 0.02}}")
    for site, fraction in fractions.items():
        if site not in FRACTION_KEYS:
            raise unknown("site", site, FRACTION_KEYS)
        if isinstance(fraction, int):  # a count: its maximum depends on the model
            if fraction < 1:
                raise ValueError(f"fractions[{site!r}]={fraction}: a whole number is a count; give at least 1")
            continue
        if not 0 < fraction <= 1:
            raise ValueError(
                f"fractions[{site!r}]={fraction!r}: a fraction lies in (0, 1], 0.02 for two percent; a whole number is a count"
            )
        if steps * fraction > 1 + 1e-9:
            most = math.floor(1 / fraction + 1e-9)
            raise ValueError(
                f"fractions[{site!r}]={fraction} in {steps} steps prunes {steps * fraction:.0%} of the neurons, "
                f"more than there are. At most {most} step{'s' * (most != 1)} of {fraction}, "
                f"or a fraction of {math.floor(1e9 / steps) / 1e9:.9g}."
            )
    if "heads" in fractions and "attn_pre_out" in fractions:
        raise ValueError("fractions: 'heads' are made of 'attn_pre_out' neurons; prune one or the other")
    attention = [site for site in fractions if site != "mlp"]
    if importance == "freq" and attention:
        raise ValueError(
            f"importance='freq' is undefined for {attention[0]!r}: attention has no activation function, so a positive activation "
            "means nothing ([SP] appendix B). Use 'abs', 'sqrt', 'rms' or 'std'."
        )


@dataclass(frozen=True)
class Schedule:
    """How much of every site each step of a run prunes.

    Attributes:
        steps: number of steps.
        fractions: shares or counts of every step, if all steps prune as much.
        given: those of each step, if they differ; then they take the place of `fractions`.

    >>> both = Schedule(3, {}, ({"mlp": 0.1}, {"mlp": 0.1}, {"mlp": 0.1, "heads": 2}))
    >>> both.at(3), both.by(2), both.total
    ({'mlp': 0.1, 'heads': 2}, {'mlp': 0.2}, {'mlp': 0.30000000000000004, 'heads': 2})
    """

    steps: int
    fractions: Mapping[str, float]
    given: Sequence[Mapping[str, float]] = ()

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Schedule":
        """The schedule in the stored configuration of a run."""
        return cls(config["steps"], config["fractions"], config.get("schedule", ()))

    def at(self, step: int) -> Mapping[str, float]:
        """Shares or counts that a step prunes, from step 1."""
        return self.given[step - 1] if self.given else self.fractions

    def steps_of(self, site: str) -> list[int]:
        """Steps that prune neurons of a site."""
        return [step for step in range(1, self.steps + 1) if site in self.at(step)]

    def by(self, step: int) -> dict[str, float]:
        """Shares or counts that are pruned after a step: shares of the original neurons, at most 1."""
        if not self.given:
            added = {site: amount * step for site, amount in self.fractions.items()}
        else:
            parts = self.given[:step]
            amounts = {site: [part[site] for part in parts if site in part] for part in parts for site in part}
            added = {site: sum(each) if isinstance(each[0], int) else math.fsum(each) for site, each in amounts.items()}
        return {site: amount if isinstance(amount, int) else min(1.0, amount) for site, amount in added.items()}

    @property
    def total(self) -> dict[str, float]:
        """What is pruned after the last step."""
        return self.by(self.steps)

    @property
    def phases(self) -> list[tuple[int, Mapping[str, float]]]:
        """Consecutive steps that prune the same: their number, and what each prunes."""
        if not self.given:
            return [(self.steps, self.fractions)]
        return [(len(list(same)), amounts) for amounts, same in groupby(self.given)]

    def words(self, amount: Callable[[float, str], str], join: str = ", ") -> str:
        """Description of the phases, given a function that describes one amount of a site."""
        said = [(n, join.join(amount(v, site) for site, v in each.items())) for n, each in self.phases]
        return ", then ".join(f"{n} step{'s' * (n != 1)} of {what}" for n, what in said)

    def joined(self, every: int) -> "Schedule":
        """The schedule with each `every` steps made one."""
        if not self.given:
            return Schedule(self.steps // every, {site: amount * every for site, amount in self.fractions.items()})
        parts = tuple(Schedule(every, {}, self.given[i : i + every]).total for i in range(0, self.steps, every))
        return Schedule(len(parts), self.fractions, parts)

    def as_much(self, other: "Schedule") -> bool:
        """Whether the other schedule prunes as much at every step."""
        if self.steps != other.steps:
            return False
        pairs = [(self.by(step), other.by(step)) for step in range(1, self.steps + 1)]
        return all(a.keys() == b.keys() and all(math.isclose(a[site], b[site]) for site in a) for a, b in pairs)


def check_schedule(schedule: Sequence[Mapping[str, float]], importance: str) -> None:
    """Check every step of a schedule, and that all together prune at most what there is.

    Raises:
        ValueError: names the step, the site and what is wrong.
    """
    kinds: dict[str, type] = {}
    for n, amounts in enumerate(schedule, start=1):
        try:
            check_fractions(amounts, 1, importance)
        except ValueError as error:
            raise ValueError(f"schedule, step {n}: {error}") from None
        for site, amount in amounts.items():
            if kinds.setdefault(site, type(amount)) is not type(amount):
                raise ValueError(f"schedule, step {n}: {site!r} is a share in one step and a count in another; give one of the two")
            taken = math.fsum(step.get(site, 0) for step in schedule[:n])
            if isinstance(amount, float) and taken > 1 + 1e-9:
                raise ValueError(f"schedule, step {n}: {taken:.0%} of {site!r} would be pruned by then, more than there are")
    if "heads" in kinds and "attn_pre_out" in kinds:
        raise ValueError("schedule: 'heads' are made of 'attn_pre_out' neurons; prune one or the other")


def check_shares(config: Any, sites: Sequence[str], fractions: Sequence[float]) -> None:
    """Check shares that are each pruned in one step, at every site."""
    for site in sites:
        for fraction in fractions:
            check_fractions({site: fraction}, 1, config.importance)


def check_tasks(tasks: tuple[Any, ...], why: str) -> None:
    """Raise if there are fewer than two tasks."""
    if len(tasks) < 2:
        raise ValueError(f"tasks={tasks!r}: give at least two, in a tuple; {why}")


def layers_of(layers: Any) -> tuple[int, ...] | Literal["all"]:
    """Layers in the form of a configuration.

    Raises:
        ValueError: a word other than "all".
        TypeError: anything else that is not whole numbers.
    """
    if isinstance(layers, str):
        if layers != "all":
            raise ValueError(f"layers={layers!r}: give 'all' or numbers of layers")
        return "all"
    try:
        numbers = list(layers)
        if any(isinstance(number, bool) for number in numbers):
            raise TypeError
        return tuple(map(index, numbers))
    except TypeError:
        raise TypeError(f"layers={layers!r}: give 'all' or whole numbers of layers in a list, such as [2, 3]") from None
