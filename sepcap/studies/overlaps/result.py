"""Result of the overlap study (METHODS 12)."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pandas as pd

from sepcap.checks import checked
from sepcap.selection.neurons import NeuronSet
from sepcap.selection.score import Scores
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.seed_samples import what_seeds_share
from sepcap.studies.base.seeds import paired_differences, seed_interval
from sepcap.studies.base.text import p_in_words, with_ends
from sepcap.studies.overlaps import figures

HEADS_AT = "attn_pre_out"
"""Site at which heads are scored."""

PAIR = ("site", "fraction", "first", "second")
MEASURES = ("share", "iou", "ratio", "ratio_matched")

COLUMNS = (
    "weights", "seed", *PAIR, "layer", "neurons", "a", "b", "both", "share", "share_of_second", "iou", "expected", "ratio", "log10_p",
    "log10_p_corrected", "expected_matched", "ratio_matched", "log10_p_matched", "log10_p_matched_corrected",
    "n_documents",
)  # fmt: skip


class Overlap(StudyResult):
    """Overlap of the neuron sets of several tasks, in the trained model and in randomly initialised ones.

    Attributes:
        config: the resolved configuration.
        tables: "overlap", one row per weights ("trained", "random"), seed, site, fraction, pair of tasks and layer, and one whose
            `layer` is NaN: the total. Columns are those of `sepcap.selection.overlap.overlap`, matched on the activity on the
            retain task (on all tasks if each is scored against the others), with `share_of_second` |A∩B|/|B|, and
            `log10_p_corrected` and `log10_p_matched_corrected`, Bonferroni over all pairs, sites, fractions and layers of a repetition;
            `n_documents` is the number of documents of the task that has fewest.
            For site "heads", heads are counted. "estimates" and "differences" are the results of these two methods.
        tensors: scores, from which `neurons` selects sets of any size.

    Example:
        >>> found = sepcap.measure_overlap(model, sepcap.OverlapConfig(tokens=10_000), out="runs/overlap")  # doctest: +SKIP
        >>> found.estimates().query("fraction == 0.02")[["weights", "site", "first", "second", "ratio"]]  # doctest: +SKIP
    """

    STUDY = "overlap"
    TITLE = "How much do the neuron sets of several tasks overlap?"
    FIGURES: ClassVar[Figures] = {
        "maps": ("Overlap of every pair of tasks", figures.overlap),
        "ratios": ("Overlap relative to random sets", figures.overlap_ratios),
        "layers": ("Overlap per layer", figures.overlap_layers),
    }

    def totals(self) -> pd.DataFrame:
        """The rows for all layers together."""
        return self.table.query("layer.isna()").reset_index(drop=True)

    @checked()
    def estimates(self, intervals: int = 1) -> pd.DataFrame:
        """Means over seeds of the totals with 95% intervals (Student's t over seeds), per weights, site, fraction and pair of tasks.

        Args:
            intervals: number of intervals to correct for (Bonferroni): the number of pairs, if one of them is picked.

        Returns:
            share, iou, ratio and ratio_matched, each with `_low` and `_high` (NaN if there is one seed); `both` and `a` (means);
            `log10_p_corrected` and `log10_p_matched_corrected`, the largest over seeds; seeds; `n_documents`, the smallest over seeds; and
            `documents_shared`, the share of documents that two seeds have in common, for the task where it is largest.
        """
        keys = ["weights", *PAIR]
        rows, shared = [], max(self.config["documents_shared"].values())
        totals: Any = self.totals()
        for key, line in totals.groupby(keys, sort=False):
            row: dict[str, Any] = dict(zip(keys, key, strict=True)) | {name: line[name].mean() for name in ("both", "a")}
            for name in MEASURES:
                row |= seed_interval(name, line[name].to_numpy(dtype=float), intervals)
            row |= {name: line[name].max() for name in ("log10_p_corrected", "log10_p_matched_corrected")}
            rows.append(row | {"seeds": len(line), "n_documents": line["n_documents"].min(), "documents_shared": shared})
        return pd.DataFrame(rows)

    @checked()
    def differences(self, intervals: int = 1) -> pd.DataFrame:
        """Share, iou, ratio and ratio_matched of the trained model minus those of the randomly initialised one, on the same documents.

        Args:
            intervals: as in `estimates`.

        Returns:
            One row per site, fraction and pair of tasks: means over seeds with 95% intervals as in `estimates`; empty without control.
        """
        totals = self.totals()
        trained, random = (totals[totals["weights"] == weights] for weights in ("trained", "random"))
        return paired_differences(trained, random, PAIR, MEASURES, intervals)

    @checked()
    def neurons(self, task: str, fractions: Mapping[str, float], weights: str = "trained", seed: int | None = None) -> NeuronSet:
        """The neuron set of a task, selected by the scores of the study.

        Args:
            task: its name.
            fractions: site -> share; any share, for sites of the study.
            weights: "trained" or "random".
            seed: of the repetition; default the first one of the study.
        """
        of_seed = int(self.config["seeds"][0] if seed is None else seed)
        keys = {site: tensor_name(weights, of_seed, task, site) for site in scored(fractions)}
        if missing := [key for key in keys.values() if key not in self.tensors]:
            held = ", ".join(sorted(self.tensors))
            raise ValueError(f"no scores {missing[0]!r} in this study; it contains {held}")
        return Scores({site: self.tensors[key] for site, key in keys.items()}).top(fractions)

    def summary(self) -> list[str]:
        """Per site, at the smallest and the largest share: the pairs with the highest and lowest ratio, against random sets and weights."""
        c, pairs = self.config, math.comb(len(self.config["tasks"]), 2)
        # two pairs are picked by their values, so their intervals are corrected for all pairs
        estimates, differences = self.estimates(pairs), self.differences(pairs)
        picked = f", Bonferroni-corrected for the {pairs} pairs of which two are picked" if pairs > 1 else ""
        tests = self.table.groupby(["weights", "seed"])["log10_p"].count().max()
        seeds = f"over {len(c['seeds'])} seeds (other documents, other random weights)"
        said = [
            f"{len(c['tasks'])} tasks scored against {c['retain']} by {c['importance']}. Ratios divide the number of shared neurons by "
            f"that of random sets with as many neurons in every layer, or of random sets also matched on activity in every layer. "
            + (
                f"Brackets give 95% intervals {seeds}{picked}. {what_seeds_share(c['documents_shared'])} "
                if len(c["seeds"]) > 1
                else "One seed: there are no intervals. "
            )
            + f"p is the largest over seeds, Bonferroni-corrected for the {tests:,} tests of a seed."
        ]
        for site in c["sites"]:
            for fraction in sorted({min(c["fractions"]), max(c["fractions"])}):
                here = estimates.query("site == @site and fraction == @fraction")
                trained = here.query("weights == 'trained'")
                most, least = (
                    _of_pair(here, differences, trained.loc[trained["ratio"].fillna(0).agg(pick)]) for pick in ("idxmax", "idxmin")
                )
                words = f"overlap of {most}" if len(trained) == 1 else f"of {len(trained)} pairs, highest ratio {most}; lowest {least}"
                said.append(f"{site}, the highest {100 * fraction:.3g}%: {words}.")
        return said


def _of_pair(here: pd.DataFrame, differences: pd.DataFrame, row: Any) -> str:
    def same(table: Any) -> Any:
        return table[(table[list(PAIR)] == row[list(PAIR)]).all(axis=1)] if len(table) else table

    control = same(here[here["weights"] == "random"])
    beside = "no control was run"
    if len(control):
        beside = (
            f"randomly initialised {with_ends(control.iloc[0], 'ratio')} and {with_ends(control.iloc[0], 'ratio_matched')}, trained minus "
            f"randomly initialised {with_ends(same(differences).iloc[0], 'ratio')} and "
            f"{with_ends(same(differences).iloc[0], 'ratio_matched')}"
        )
    return (
        f"{row['first']} and {row['second']}, {row['both']:,.4g} of {row['a']:,.4g} ({100 * row['share']:.0f}%), ratio to random sets of "
        f"the same layers {with_ends(row, 'ratio')} (p {p_in_words(row['log10_p_corrected'])}), also matched on activity "
        f"{with_ends(row, 'ratio_matched')} (p {p_in_words(row['log10_p_matched_corrected'])}); {beside}"
    )


def tensor_name(weights: str, seed: int, task: str, site: str) -> str:
    """Name of the scores of one task at one site."""
    return f"{weights}, seed {seed} | {task} | {site}"


def scored(sites: Sequence[str] | Mapping[str, float]) -> list[str]:
    """Sites whose neurons are scored: heads are scored by their neurons."""
    return list(dict.fromkeys(HEADS_AT if site == "heads" else site for site in sites))
