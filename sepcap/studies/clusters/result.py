"""Result of the modularity study (METHODS 12)."""

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import pandas as pd

from sepcap.checks import checked
from sepcap.errors import unknown
from sepcap.selection.clusters import Clusters
from sepcap.selection.concentration import ACTIVITY, LAYER
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.seed_samples import what_seeds_share
from sepcap.studies.base.seeds import paired_differences, seed_interval
from sepcap.studies.base.text import with_ends
from sepcap.studies.clusters import figures
from sepcap.studies.clusters.config import LEAST, MOST, SCORE

Weights = Literal["trained", "random"]
MEASURES = ("area", "chance", "most")
SURE = 0.01
"""Largest p at which `Modularity.summary` counts a set as more concentrated than random sets."""
KEYS = ("weights", "clusters", "chosen", "null", "fraction")
CONTROLS = {
    "index mod k": ("trained", "index", SCORE),
    "random weights": ("random", "moefied", SCORE),
    "the least active": ("trained", "moefied", LEAST),
    "the most active": ("trained", "moefied", MOST),
}
"""Name of a control -> its weights, clusters and choice of neurons."""


class Modularity(StudyResult):
    """Concentration of task neurons in clusters: MoEfication and index mod k, trained and random weights.

    `tables["areas"]` has one row per weights ("trained", "random"), seed, clusters ("moefied", "index"), chosen ("score": the neurons
    of the task; "least active", "most active": as many in every layer, chosen by their activity on the retain task alone), null (what
    the random sets of `chance`, `concentration` and p are matched on: "layer", or "layer and activity"), task, fraction and layer
    (NaN: all layers), with the columns of `sepcap.selection.concentration.Concentration.table`. `tensors["curves"]`
    [row, point] and `tensors["chance"]` [row, 3, point] are the curves of the rows for all layers, in the same order.
    `tables["estimates"]` and `tables["differences"]` contain the results of these two methods per task.
    `tensors["labels-{weights}-{seed}"]` are the MoEfication clusters, and `tables["clusters"]` has the sum of squared distances
    to their centres (`inertia`) per layer, and the fingerprint of the weights.

    Source: METHODS section 12; [MOE], [MOD].
    """

    STUDY: ClassVar[str] = "modularity"
    TITLE: ClassVar[str] = "Do task neurons form modules?"
    FIGURES: ClassVar[Figures] = {
        "curve": ("Share of the task neurons over clusters", figures.concentration_curve),
        "profile": ("Concentration by layer", figures.concentration_profile),
    }

    @checked()
    def clusters(self, seed: int = 0, weights: Weights = "trained") -> Clusters:
        """The MoEfication clusters of one repetition."""
        name = f"labels-{weights}-{seed}"
        if name not in self.tensors:
            raise unknown("clusters", name, [n for n in self.tensors if n.startswith("labels")])
        table = self.tables["clusters"]
        row = table[(table["weights"] == weights) & (table["seed"] == seed)].iloc[0]
        how = {"method": "moefied", "model": self.config["model"], "seed": seed, "n_init": self.config["n_init"]}
        return Clusters(self.tensors[name].long(), self.config["k"], row["fingerprint"], how)

    @checked()
    def by_seed(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Area, chance, most and concentration per weights, clusters, chosen, null, fraction and seed, pooled over tasks and layers.

        Args:
            by: "task", "layer" or both, which are then not pooled.
        """
        for name in by:
            if name not in ("task", "layer"):
                raise unknown("by", name, ("task", "layer"))
        table: Any = self.tables["areas"]
        table = table[(table["layer"].notna() if "layer" in by else table["layer"].isna()) & (table["neurons"] > 0)]
        keys = [*KEYS, *by, "seed"]
        # sum of n·x over sum of n: the mean weighted by the neurons of each set
        weighted = table[keys].assign(neurons=table["neurons"], **{name: table[name] * table["neurons"] for name in MEASURES})
        sums = weighted.groupby(keys, sort=False).sum().reset_index()
        for name in MEASURES:
            sums[name] /= sums["neurons"]
        room = sums["most"] - sums["chance"]
        sums["concentration"] = ((sums["area"] - sums["chance"]) / room).where(room > 1e-12)
        return sums

    @checked()
    def estimates(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Means over seeds with 95% intervals (Student's t over seeds).

        Args:
            by: "task", "layer" or both, which are then not pooled.

        Returns:
            One row per weights, clusters, chosen, null, fraction and each key in `by`: area and concentration, each with `_low` and
            `_high`, chance, most, neurons (mean), seeds, `n_documents`, the fewest that a seed has of one task, and `documents_shared`, the
            share of documents that two seeds have in common, for the task where it is largest. Intervals are NaN if there is one seed.
        """
        keys = [*KEYS, *by]
        rows = []
        by_seed: Any = self.by_seed(by)
        for key, line in by_seed.groupby(keys, sort=False):
            row = dict(zip(keys, key, strict=True)) | {name: line[name].mean() for name in ("chance", "most", "neurons")}
            for name in ("area", "concentration"):
                row |= seed_interval(name, line[name].to_numpy())
            rows.append(row | {"seeds": len(line), "n_documents": self._documents(row.get("task"))})
        return pd.DataFrame(rows).assign(documents_shared=max(self.config["documents_shared"].values()))

    @checked()
    def differences(self, by: Sequence[str] = ()) -> pd.DataFrame:
        """Concentration of the task neurons in MoEfication clusters minus that of each control, seed by seed.

        Args:
            by: "task", "layer" or both, which are then not pooled.

        Returns:
            One row per control (`minus`), null, fraction and each key in `by`: the mean difference with its 95% interval as in
            `estimates`. Sets chosen by activity are compared only under the null "layer": under the other, they are random sets.
        """
        keys = ["null", "fraction", *by]
        found: dict[Any, Any] = dict(iter(self.by_seed(by).groupby(["weights", "clusters", "chosen"], sort=False)))
        rows = []
        for minus, control in CONTROLS.items():
            if control in found:
                main, other = (
                    found[key].rename(columns={"concentration": "difference"}) for key in (("trained", "moefied", SCORE), control)
                )
                rows.append(paired_differences(main, other, keys, ["difference"]).assign(minus=minus))
        table = pd.concat(rows, ignore_index=True)
        table["n_documents"] = [self._documents(row.get("task")) for row in table.to_dict("records")]
        return table.reindex(columns=["minus", *table.columns.drop("minus")])

    def _documents(self, task: str | None) -> int:
        """The fewest documents that a seed has of a task or of the retain task; without a task, of any of them."""
        wanted = {task, self.config["retain"]}
        counts = self.config["n_documents"].items()
        return min(n for name, n in counts if task is None or name.rpartition("-")[0] in wanted)

    def summary(self) -> list[str]:
        """The results in sentences."""
        c = self.config
        estimates = self.estimates().set_index(list(KEYS)).sort_index()
        differences = self.differences().set_index(["minus", "null", "fraction"]).sort_index()
        totals: Any = self.tables["areas"][self.tables["areas"]["layer"].isna()]
        said = [
            f"{c['model']}: mlp neurons with the highest scores for {', '.join(c['tasks'])} against {c['retain']}, in {c['k']} clusters "
            "per layer. Reported are the area under the cumulative share of a set over clusters, and the concentration (0: a random set "
            f"with as many neurons in every layer, 1: the maximum). {_over_seeds(len(c['seeds']))}, pooled over tasks and layers. "
            + (what_seeds_share(c["documents_shared"]) if len(c["seeds"]) > 1 else "")
        ]
        for fraction in c["fractions"]:

            def of(weights: str, clusters: str, chosen: str = SCORE, null: str = LAYER, share: float = fraction) -> Any:
                return estimates.loc[(weights, clusters, chosen, null, share)]

            def value(row: Any, name: str = "concentration") -> str:
                return with_ends(row, name, 3)

            main = of("trained", "moefied")
            text = (
                f"Top {fraction:.3g} of the mlp: area {value(main, 'area')}, random sets {main['chance']:.3f}; "
                f"concentration {value(main)}, "
                f"against random sets also matched on activity on {c['retain']} {value(of('trained', 'moefied', null=ACTIVITY))}. "
                f"As many per layer, chosen by that activity alone: the least active {value(of('trained', 'moefied', LEAST))}, "
                f"the most active {value(of('trained', 'moefied', MOST))}. In clusters by index mod k {value(of('trained', 'index'))}"
            )
            if c["control"]:
                text += f", with random weights and their own clusters {value(of('random', 'moefied'))}"
            gaps = [(minus, null) for minus, null, share in differences.index if share == fraction]
            gap = ", ".join(
                f"{value(differences.loc[(minus, null, fraction)], 'difference')} vs {minus}{' (matched on activity)' * (null == ACTIVITY)}"
                for minus, null in sorted(gaps, key=lambda pair: (list(CONTROLS).index(pair[0]), pair[1]))
            )
            sets = totals[(totals["weights"] == "trained") & (totals["fraction"] == fraction) & (totals["chosen"] == SCORE)]
            # with few draws, no p is that small: the sentence then states that no random set is as concentrated
            smallest = 1 / (c["draws"] + 1)
            than = f"{1 - SURE:.0%} of random sets" if smallest <= SURE else f"every one of {c['draws']} random sets"
            sure = {key: f"{int((line['p'] <= max(SURE, smallest)).sum())}" for key, line in sets.groupby(["clusters", "null"])}
            n = len(sets[(sets["clusters"] == "moefied") & (sets["null"] == LAYER)])
            said.append(
                f"{text}. Differences: {gap}. More concentrated than {than}: {sure['moefied', LAYER]} of {n} sets, "
                f"{sure['moefied', ACTIVITY]} when also matched on activity, {sure['index', LAYER]} in clusters by index."
            )
        return said


def _over_seeds(seeds: int) -> str:
    what = "other documents, starts of k-means and random weights"
    if seeds > 1:
        return f"Brackets give 95% intervals over {seeds} seeds ({what})"
    return f"No intervals: they need several seeds ({what}), and there is one"
