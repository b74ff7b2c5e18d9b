"""What a study of overlaps found (METHODS 12)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sepcap.experiments.result import Figures, StudyResult
from sepcap.experiments.seed_samples import what_seeds_share
from sepcap.experiments.seeds import paired_differences, seed_interval, with_ends
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores

HEADS_AT = "attn_pre_out"
"""Where heads are scored."""

PAIR = ("site", "fraction", "first", "second")
MEASURES = ("share", "iou", "ratio", "ratio_matched")

COLUMNS = (
    "weights", "seed", *PAIR, "layer", "neurons", "a", "b", "both", "share", "share_of_second", "iou", "expected", "ratio", "log10_p",
    "log10_p_corrected", "expected_matched", "ratio_matched", "log10_p_matched", "log10_p_matched_corrected",
)  # fmt: skip


class Overlaps(StudyResult):
    """Overlaps of the neuron sets of several tasks, of the trained model and of randomly initialised ones.

    Attributes:
        config: the resolved configuration.
        tables: "overlaps", one row per weights ("trained", "random"), seed, site, fraction, pair of tasks and layer, and one whose
            `layer` is missing: the total. Columns are those of `sepcap.selection.overlap.overlap`, matched on the activity on the
            retain task (on all tasks where each is scored against the others), with `share_of_second` |A∩B|/|B|, and
            `log10_p_corrected` and `log10_p_matched_corrected`, Bonferroni over all pairs, sites, fractions and layers of a repetition.
            Of site "heads" the numbers are of heads. "estimates" and "differences" are what those two methods give.
        tensors: scores, from which `neurons` cuts sets of any size.

    Example:
        >>> found = sepcap.overlaps(model, sepcap.OverlapConfig(tokens=10_000), out="runs/overlaps")  # doctest: +SKIP
        >>> found.estimates().query("fraction == 0.02")[["weights", "site", "first", "second", "ratio"]]  # doctest: +SKIP
    """

    STUDY = "overlaps"
    TITLE = "What do the neuron sets of several tasks have in common?"
    FIGURES: ClassVar[Figures] = {
        "maps": ("Overlap of every two tasks", "overlaps"),
        "ratios": ("Overlap in multiples of random sets'", "overlap_ratios"),
        "layers": ("Overlap per layer", "overlap_layers"),
    }

    @property
    def table(self) -> pd.DataFrame:
        """The overlaps of all layers and in total."""
        return self.tables["overlaps"]

    def totals(self) -> pd.DataFrame:
        """The rows that are of all layers together."""
        return self.table.query("layer.isna()").reset_index(drop=True)

    def estimates(self, intervals: int = 1) -> pd.DataFrame:
        """Means over seeds of the totals with 95% intervals (Student's t over seeds), per weights, site, fraction and pair of tasks.

        Args:
            intervals: how many intervals are to hold together (Bonferroni): the number of pairs, where one is picked among them.

        Returns:
            share, iou, ratio and ratio_matched, each with `_low` and `_high` (missing where there is one seed); `both` and `a` (means);
            `log10_p_corrected` and `log10_p_matched_corrected`, the largest of the seeds; seeds; and
            `documents_shared`, what two seeds have in common of their documents, of the task where that is most.
        """
        keys = ["weights", *PAIR]
        rows, shared = [], max(self.config["documents_shared"].values())
        totals: Any = self.totals()
        for key, line in totals.groupby(keys, sort=False):
            row: dict[str, Any] = dict(zip(keys, key, strict=True)) | {name: line[name].mean() for name in ("both", "a")}
            for name in MEASURES:
                row |= seed_interval(name, line[name].to_numpy(dtype=float), intervals)
            row |= {name: line[name].max() for name in ("log10_p_corrected", "log10_p_matched_corrected")}
            rows.append(row | {"seeds": len(line), "documents_shared": shared})
        return pd.DataFrame(rows)

    def differences(self, intervals: int = 1) -> pd.DataFrame:
        """The trained model's share, iou, ratio and ratio_matched minus the randomly initialised one's, on the same documents.

        Args:
            intervals: as in `estimates`.

        Returns:
            One row per site, fraction and pair of tasks: means over seeds with 95% intervals as in `estimates`; empty without control.
        """
        totals = self.totals()
        trained, random = (totals[totals["weights"] == weights] for weights in ("trained", "random"))
        return paired_differences(trained, random, PAIR, MEASURES, intervals)

    def neurons(self, task: str, fractions: Mapping[str, float], weights: str = "trained", seed: int | None = None) -> NeuronSet:
        """The set of a task, cut from the scores of the study.

        Args:
            task: its name.
            fractions: site -> share; any share, of the sites of the study.
            weights: "trained" or "random".
            seed: of the repetition; default the first one of the study.
        """
        of_seed = int(self.config["seeds"][0] if seed is None else seed)
        keys = {site: tensor_name(weights, of_seed, task, site) for site in scored(fractions)}
        if missing := [key for key in keys.values() if key not in self.tensors]:
            held = ", ".join(sorted(self.tensors))
            raise ValueError(f"no scores {missing[0]!r} in this study; there are {held}")
        return Scores({site: self.tensors[key] for site, key in keys.items()}).top(fractions)

    def summary(self) -> list[str]:
        """Per site, at the smallest and the largest share: the pairs with most and least in common, against random sets and weights."""
        c, pairs = self.config, math.comb(len(self.config["tasks"]), 2)
        # of the pairs two are picked by their values: the intervals of all pairs hold together, so that those of the picked ones do
        estimates, differences = self.estimates(pairs), self.differences(pairs)
        picked = f", Bonferroni-corrected for the {pairs} pairs of which two are picked" if pairs > 1 else ""
        tests = self.table.groupby(["weights", "seed"])["log10_p"].count().max()
        seeds = f"over {len(c['seeds'])} seeds (other documents, other random weights)"
        said = [
            f"{len(c['tasks'])} tasks scored against {c['retain']} by {c['importance']}. Ratios are to the number that random sets with as "
            f"many neurons in every layer share, and to that of random sets matched on activity in every layer too. "
            + (
                f"In brackets 95% intervals {seeds}{picked}. {what_seeds_share(c['documents_shared'])} "
                if len(c["seeds"]) > 1
                else "One seed: there are no intervals. "
            )
            + f"p is the largest of the seeds, Bonferroni-corrected for the {tests:,} tests of a seed."
        ]
        for site in c["sites"]:
            for fraction in sorted({min(c["fractions"]), max(c["fractions"])}):
                here = estimates.query("site == @site and fraction == @fraction")
                trained = here.query("weights == 'trained'")
                most, least = (
                    _of_pair(here, differences, trained.loc[trained["ratio"].fillna(0).agg(pick)]) for pick in ("idxmax", "idxmin")
                )
                words = f"in common {most}" if len(trained) == 1 else f"of {len(trained)} pairs most in common {most}; least {least}"
                said.append(f"{site}, the highest {100 * fraction:.3g}%: {words}.")
        return said


def _of_pair(here: pd.DataFrame, differences: pd.DataFrame, row: Any) -> str:
    def same(table: Any) -> Any:
        return table[(table[list(PAIR)] == row[list(PAIR)]).all(axis=1)] if len(table) else table

    control = same(here[here["weights"] == "random"])
    beside = "no control was made"
    if len(control):
        beside = (
            f"randomly initialised {with_ends(control.iloc[0], 'ratio')} and {with_ends(control.iloc[0], 'ratio_matched')}, trained minus "
            f"randomly initialised {with_ends(same(differences).iloc[0], 'ratio')} and "
            f"{with_ends(same(differences).iloc[0], 'ratio_matched')}"
        )
    return (
        f"{row['first']} and {row['second']}, {row['both']:,.4g} of {row['a']:,.4g} ({100 * row['share']:.0f}%), ratio to random sets of "
        f"the same layers {with_ends(row, 'ratio')} (p {told_p(row['log10_p_corrected'])}), matched on activity too "
        f"{with_ends(row, 'ratio_matched')} (p {told_p(row['log10_p_matched_corrected'])}); {beside}"
    )


def told_p(log10_p: float) -> str:
    """A p-value in words, from its logarithm.

    >>> told_p(0.0), told_p(-1.3), told_p(-412.25)
    ('= 1', '= 0.05', '= 10^−412.2')
    """
    if np.isnan(log10_p):
        return "undefined"
    return f"= {10**log10_p:.2g}" if log10_p > -3 else f"= 10^−{-log10_p:.1f}"


def tensor_name(weights: str, seed: int, task: str, site: str) -> str:
    """Name of the scores of one task at one site."""
    return f"{weights}, seed {seed} | {task} | {site}"


def scored(sites: Sequence[str] | Mapping[str, float]) -> list[str]:
    """Sites whose neurons are scored: heads are scored by their neurons."""
    return list(dict.fromkeys(HEADS_AT if site == "heads" else site for site in sites))


def bonferroni(log10_p: Any) -> Any:
    """log10 of p-values, corrected for as many tests as there are p-values among them.

    In logarithms, because the smallest are below what a double can hold. It holds under any dependence, which sets that share
    layers, tasks and neurons have.

    >>> bonferroni(pd.Series([-3.0, -0.5] + [float("nan")])).round(3).tolist()
    [-2.699, -0.199, nan]
    """
    return (log10_p + np.log10(max(1, int(np.isfinite(log10_p).sum())))).clip(upper=0.0)
