"""Result of a comparison of importances: agreement of every score with the exact effects, per site (METHODS 19)."""

import math
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from sepcap.checks import checked
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.base.seed_samples import what_seeds_share
from sepcap.studies.base.text import with_ends
from sepcap.studies.importances import figures
from sepcap.studies.importances.config import ABS, LABELLED, LEARNED, RANDOM
from sepcap.studies.pruning.config import DIRECTIONS


class ImportanceComparison(StudyResult):
    """Every score against the exact effects of single neurons and against pruning trajectories.

    Attributes:
        config: the resolved configuration.
        tables: "league", one row per site, direction and score, with `random`, `learned` and `ceiling`: passes (cost in forward passes over
            the calibration texts; for the ceiling, which is Δ itself, a pass per neuron), spearman_forget and spearman_difference (rank
            correlation with Δ_forget and with Δ_forget − Δ_retain), recall_1, recall_2 and recall_5 (of the neurons with the 1, 2 and 5%
            largest Δ_forget − Δ_retain), all means over calibration texts, with `_seeds_sd` and with the ends `_low` and `_high` of a 95%
            interval over documents, calibration texts and, if they are a sample, neurons (learned: not over calibration texts, since it has
            one value, and `_seeds_sd` is NaN); both correlations also `_minus_abs`, paired by documents.
            jaccard_10: overlap of the top tenths by every two calibration texts, mean over pairs.
            one_shot_area and iterative_area (NaN where there is no such run), each with ends, `_minus_abs` (paired, with ends) and
            `_retain_cost_50` (percent of the retain task lost where half of the other one is, with ends); chosen: whether it is among the
            best on the collection texts. In the row "ceiling" the correlations are those of a score without error, recall is that of Δ on
            one half of the documents for Δ on the other.
            "trust": per site the score with the highest spearman_difference on one half of the documents (`best`), measured on the other
            half beside abs, random and learned: minus_abs (paired) and untrained (the same with random weights), with ends. Its ceiling is
            √spearman_difference_half of "reliability"; that of the row "ceiling" is for all documents.
            "reliability": Δ on one half of the documents against the other half. "control": the league of random weights, without
            trajectories. "choice": areas on the collection texts. "trajectory": top-1 on both tasks at every step of every run. "labels",
            of compiled models: AUROC, AUPRC and recall against the labels, and the area of the order that the labels give.
        tensors: for every site `places` [unit, place] of the ablated neurons, `delta/forget` and `delta/retain` [unit] (tasks of the
            forward direction), and `scores/direction/name` [unit] by the first calibration texts, each behind `site/`.

    Example:
        >>> found = sepcap.compare_importances(sites=("mlp",), sample=500, out="runs/importances")  # doctest: +SKIP
        >>> found.table[["direction", "score", "spearman_difference", "one_shot_area"]]  # doctest: +SKIP
    """

    STUDY = "compare-importances"
    TITLE = "Which importance agrees best with the exact effect of every neuron?"
    FIGURES: ClassVar[Figures] = {
        "ranks": ("Agreement of every score with the exact effects", figures.ranks),
        "effects": ("Exact effect of every neuron against its score", figures.effects),
        "trajectories": ("Pruning by the best scores, by abs and by the learned order", figures.trajectories),
    }
    PAGE_TABLES = ("league", "trust", "reliability", "control", "choice", "labels")

    @checked()
    def row(self, site: str, direction: str, score: str) -> pd.Series:
        """One row of the league table."""
        found = self.table.query("site == @site and direction == @direction and score == @score")
        if found.empty:
            raise ValueError(f"there is no row of score {score!r} at site {site!r} in direction {direction!r}")
        return found.iloc[0]

    @checked()
    def chosen(self, site: str) -> list[str]:
        """The best scores of a site on the collection texts, the best first."""
        table = self.tables["choice"].query("site == @site and chosen")
        areas: Any = table.groupby("score", sort=False)["area"].mean()
        return areas.sort_values(ascending=False, kind="stable").index.tolist()

    @checked()
    def beats_abs(self, site: str, score: str, kind: str = "iterative") -> bool:
        """Whether the paired interval of the area minus that of abs lies above 0 in both directions.

        Args:
            site: a site of the study.
            score: a score with trajectories.
            kind: "iterative" or "one_shot".
        """
        lows = [self.row(site, way, score)[f"{kind}_minus_abs_low"] for way in DIRECTIONS]
        return bool(all(low > 0 for low in lows))  # an unknown end is no evidence

    def summary(self) -> list[str]:
        """The score that agrees best with the exact effects, per site, with intervals and controls."""
        c, said = self.config, []
        for site, of in c["neurons"].items():
            n = len(self.tensors[f"{site}/places"])
            drawn = f" drawn at random from {of:,}" if n < of else ""
            said.append(f"{site}: {n:,} neurons{drawn} of {c['model']}, each ablated alone; {len(c['scores'])} scores.")
            said += [*self._trust(site), *self._pruned(site), *self._labelled(site)]
        seeds = len(c["seeds"])
        covers = "documents" + (f" and {seeds} samples of calibration texts" if seeds > 1 else "")
        said.append(f"In brackets 95% intervals over {covers}; one-shot areas are of the first calibration texts, over documents only.")
        return [*said, what_seeds_share(c["documents_shared"])] if seeds > 1 else said

    def _way(self, direction: str) -> str:
        return f"forget {self.config['forget' if direction == DIRECTIONS[0] else 'retain']}"

    def _trust(self, site: str) -> list[str]:
        """The score with the best agreement, chosen on one half of the documents and measured on the other."""
        table = self.tables["trust"].query("site == @site")
        if table.empty:
            return ["The effects are of too few documents to choose the best score on one half of them and to measure it on the other."]
        best = table.query("best")["score"].iloc[0]
        parts, above = [], []
        for way in DIRECTIONS:
            rows = table.query("direction == @way").set_index("score")
            row, ceiling = rows.loc[best], self._ceiling_of_half(site, way)
            words = f"{self._way(way)} {with_ends(row, 'spearman_difference')}"
            if best != ABS:
                words += f" ({ABS} {with_ends(rows.loc[ABS], 'spearman_difference')}, difference {with_ends(row, 'minus_abs')})"
                above.append(bool(row["minus_abs_low"] > 0))
            for name in (RANDOM, LEARNED):
                words += f", {name} {with_ends(rows.loc[name], 'spearman_difference')}" if name in rows.index else ""
            words += f", the same score with random weights {with_ends(row, 'untrained')}" if np.isfinite(row["untrained"]) else ""
            most = f"; on so few documents a score without error would have {ceiling:.2f} (estimate without interval)"
            words += most if np.isfinite(ceiling) else ""
            parts.append(words)
        if best == ABS:
            verdict = "No other score agrees better."
        elif all(above):
            verdict = f"It agrees better than {ABS}: the paired intervals lie above 0."
        else:
            verdict = f"It is not shown to agree better than {ABS}: the paired intervals do not both lie above 0."
        verdict += " The directions are not two tests: Δ_forget − Δ_retain of one is that of the other with the opposite sign."
        return [
            f"{site}, agreement with the exact effect (rank correlation with Δ_forget − Δ_retain): {best} is highest on one half of the "
            f"documents; on the other half {'; '.join(parts)}. {verdict}"
        ]

    def _ceiling_of_half(self, site: str, direction: str) -> float:
        """Correlation of a score without error with Δ_forget − Δ_retain on one half of the documents; NaN if it is not above 0.

        The correlation between halves is the reliability of Δ on one of them (METHODS 19).
        """
        half: Any = self.tables["reliability"].set_index(["site", "direction"])["spearman_difference_half"].loc[(site, direction)]
        return math.sqrt(half) if half > 0 else math.nan

    def _pruned(self, site: str) -> list[str]:
        """Areas of the scores that were chosen on the collection texts, and of the learned order."""
        table = self.tables["trajectory"].query("site == @site")
        if table.empty:
            return ["The model has no top-1 accuracy to lose on a task, so that there are no trajectories."]
        said, chosen = [], self.chosen(site)
        kind = "iterative" if chosen else "one_shot"
        for name in chosen:
            said.append(f"{site}, pruned step by step by {name}, chosen on collection texts: area {self._area(site, name, kind)}.")
        if chosen:
            better = [name for name in chosen if self.beats_abs(site, name, kind)]
            verdict = (
                f"{', '.join(better)} {'separates' if len(better) == 1 else 'separate'} the tasks better than {ABS}: the paired intervals "
                "lie above 0 in both directions"
                if better
                else f"none is shown to separate the tasks better than {ABS}: no paired interval lies above 0 in both directions"
            )
            said.append(f"{site}: of {', '.join(chosen)}, {verdict}.")
        if LEARNED in self.table.query("site == @site")["score"].tolist():
            said.append(
                f"{site}, learned order, one-shot (it is not learned anew at every step): area {self._area(site, LEARNED, 'one_shot')}."
            )
        return said

    def _area(self, site: str, score: str, kind: str) -> str:
        parts = []
        for way in DIRECTIONS:
            row = self.row(site, way, score)
            cost = with_ends(row, f"{kind}_retain_cost_50", 0)
            lost = f"{cost}% of the other task lost at half" if cost != "undefined" else "half of the task is never lost"
            less = f", minus {ABS} {with_ends(row, f'{kind}_minus_abs')}"
            parts.append(f"{self._way(way)} {with_ends(row, f'{kind}_area')}{less}, {lost}")
        return "; ".join(parts)

    def _labelled(self, site: str) -> list[str]:
        """The score with the highest AUROC, and abs; labels are known without error, but the best of many is chosen on them."""
        if "labels" not in self.tables:
            return []
        table = self.tables["labels"].query("site == @site and among == 'used'")
        others: Any = table.groupby("score", sort=False)["auroc"].mean()
        mean = others.drop(labels=[RANDOM, LEARNED, LABELLED], errors="ignore")
        if not np.isfinite(mean).any():
            return []
        best = str(mean.idxmax())
        beside = ", ".join(f"{name} {others[name]:.2f}" for name in (ABS, RANDOM, LEARNED) if name in others.index)
        areas: Any = table.groupby("score", sort=False)["one_shot_area"].mean()
        known = f"; area one-shot {areas[best]:.2f}, by the labels themselves {areas[LABELLED]:.2f}" if np.isfinite(areas[LABELLED]) else ""
        return [f"{site}, AUROC against the labels, mean of both directions: highest {best} {mean[best]:.2f}; {beside}{known}."]
