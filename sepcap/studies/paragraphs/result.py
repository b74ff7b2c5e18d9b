"""Result of a paragraph transfer."""

from typing import Any, ClassVar

import pandas as pd

from sepcap.checks import checked
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.paragraphs import figures
from sepcap.studies.paragraphs.conditions import ALONE, DONORS, FIRST, LAST, MISMATCHED, NEUTRAL, ORIGINAL, OTHER_KIND, TRANSFERRED

SITES_IN_WORDS = {"mlp": "mlp neurons", "attn_pre_out": "attention pre-out", "resid": "the residual stream"}

PARTS_IN_WORDS = {ALONE: "layer {layer} alone", FIRST: "the first layers up to {layer}", LAST: "the last layers from {layer}"}


class ParagraphTransfer(StudyResult):
    """How much of the next paragraph is transferred with the activations at the break before it.

    Conditions: "original" (the whole context), "transferred" (the break alone, patched), "mismatched" (patched from another text of the
    same kind: the control), "other kind" (from a text of another kind), "neutral" (the break alone), "given k" (k tokens given).

    Attributes:
        config: the configuration; with model, versions, the texts and the tokens of their breaks.
        tables: `differences`, paired: kind of text, metric, condition, the one it is compared with (`against`), difference with the ends
            `low` and `high` of its 95% interval (Student's t over texts), and for likelihoods the `share` of the gain of the whole context,
            NaN if the interval of that gain is not above 0.
            `values`: mean, its interval and median of every metric in every condition. `layers`: gain in nats per token over the break
            alone with each layer alone, the first or the last layers patched; from the own break, from another's, and the difference.
            `chosen_layers`: for each of these parts the layer with the largest gain on one half of the texts (half of every kind, by the
            seed), that gain (`gain_searched`), and its gain on the other half: the one to report for a layer chosen by its gain.
            `positions`: the same gain by token position in the paragraph. `likelihood`: per text (total nats, tokens in `weight`).
            `texts`. If texts were generated: `generations`, and `scores` per text, condition, sample and `reference`, the number of
            first tokens of the paragraph that were left out of the comparison.
        tensors: `log_likelihood` [condition, text, pos] in nats, conditions as in config.

    Metrics: "nats" (log-likelihood of the true paragraph per token), "distance" (1 − cosine of embeddings), "overlap" (F1 of single
    tokens), "bigrams" (share of the paragraph's distinct pairs of neighbouring tokens that were generated).
    """

    STUDY: ClassVar[str] = "paragraph-transfer"
    TITLE: ClassVar[str] = "How much of the next paragraph is encoded at the break before it?"
    FIGURES: ClassVar[Figures] = {
        "layers": ("Gain in likelihood from patching one layer, the first or the last layers", figures.paragraph_layers),
        "distances": ("Distance of generated texts from the true paragraph", figures.paragraph_distances),
        "positions": ("Gain in likelihood over the paragraph", figures.paragraph_positions),
    }

    @checked()
    def difference(self, metric: str, condition: str, against: str = NEUTRAL, kind: str = "all") -> pd.Series:
        """One row of the table of differences.

        Raises:
            KeyError: no such comparison.
        """
        table: Any = self.tables["differences"]
        wanted = {"kind": kind, "metric": metric, "condition": condition, "against": against}
        rows = table[(table[list(wanted)] == list(wanted.values())).all(axis=1)]
        if rows.empty:
            raise KeyError(f"no difference of {metric!r} between {condition!r} and {against!r} for {kind!r}; see .tables['differences']")
        return rows.iloc[0]

    def summary(self) -> list[str]:
        """What was found, in sentences."""
        return [*self._setting(), self._likelihood(), self._control(), *self._best_layer(), *self._distance()]

    def _setting(self) -> list[str]:
        config = self.config
        kinds = ", ".join(f"{kind} {n}" for kind, n in config["kinds"].items())
        sites = " and ".join(SITES_IN_WORDS[site] for site in config["sites"])
        one = sum(n for tokens, n in config["breaks"] if len(tokens) == 1)
        spelled = "; ".join(f"{' '.join(map(repr, tokens))} in {n}" for tokens, n in config["breaks"][:4])
        more = f" and {len(config['breaks']) - 4} other ways" * (len(config["breaks"]) > 4)
        neutral = "the neutral prompt ends with the same tokens, all of which are patched"
        if not config["into"].endswith(config["at"]):
            neutral = f"the last tokens of the neutral prompt {config['into']!r} are patched, as many as both have"
        return [
            f"{config['texts']} texts ({kinds}), {sites} of layers {_spans(config['layers'])} patched at {config['break']}.",
            f"The break is one token in {one} of {config['texts']} texts: {spelled}{more}; {neutral} (scale {config['scale']:g}).",
        ]

    def _likelihood(self) -> str:
        own: Any = self.difference("nats", TRANSFERRED)
        whole: Any = self.difference("nats", ORIGINAL)
        said = f"Log-likelihood of the true next paragraph, patched minus break alone: {_signed(own)} nats per token"
        if pd.notna(own["share"]):
            low, high = own["share_low"], own["share_high"]
            share = f"{own['share']:.0%} [{low:.0%}, {high:.0%}]".replace("-", "−")
            return f"{said}, {share} of the gain of the whole context ({_signed(whole)})."
        if pd.isna(whole["low"]):
            return f"{said}; the whole context: {_signed(whole)}."
        return f"{said}; the interval of the gain of the whole context is not above 0 ({_signed(whole)}), so no share of it is given."

    def _control(self) -> str:
        if MISMATCHED not in self.config["conditions"]:
            return "There is no control: there is no other text of the same kind whose break could be patched."
        control, over = self.difference("nats", MISMATCHED), self.difference("nats", TRANSFERRED, MISMATCHED)
        said = f"Patched from the break of another text of the same kind instead: {_signed(control)}"
        if OTHER_KIND in self.config["conditions"]:
            said += f", of another kind {_signed(self.difference('nats', OTHER_KIND))}"
        said += f"; own minus another's, the part specific to this text: {_signed(over)}."
        texts, of = self.config["texts"], self.config.get("donors", {}).get(DONORS[MISMATCHED], {})
        if missing := texts - of.get("texts", texts):
            said += f" {missing} of {texts} texts have no such donor."
        if otherwise := of.get("spelled otherwise", 0):
            said += f" For {otherwise} of {of['texts']} texts that donor's break has other tokens."
        return said

    def _best_layer(self) -> list[str]:
        said = []
        for row in self.tables["chosen_layers"].to_dict("records"):
            where = PARTS_IN_WORDS[row["part"]].format(layer=row["layer"])
            what = "own minus another's break" if row["donor"] == "difference" else "over the break alone, without a control"
            said.append(f"{where} (of {row['among']}): {_signed(row | {'difference': row['gain']})} nats per token, {what}")
        if not said:
            return []
        searched, tested = (self.tables["chosen_layers"][name].iloc[0] for name in ("searched", "texts"))
        return [f"Layers with the largest gain on {searched} of the texts, tested on the other {tested}: {'; '.join(said)}."]

    def _distance(self) -> list[str]:
        if not self.config["generate"]:
            return []
        table: Any = self.tables["values"]
        metric = "distance" if (table["metric"] == "distance").any() else "overlap"
        of_all = table[(table["kind"] == "all") & (table["metric"] == metric)].set_index("condition")
        names = [name for name in of_all.index if not name.startswith("layer") and of_all.loc[name, "given"] == 0]
        medians = ", ".join(f"{name} {of_all.loc[name, 'median']:.3f}" for name in names)
        called = f"cosine distance by {self.config['embedder']}" if metric == "distance" else "overlap (F1 of tokens)"
        change = self.difference(metric, TRANSFERRED)
        said = f"Generated texts, median {called} to the whole paragraph: {medians}. Transferred minus break alone, mean: {_signed(change)}"
        if MISMATCHED in self.config["conditions"]:
            said += f"; minus mismatched: {_signed(self.difference(metric, TRANSFERRED, MISMATCHED))}"
        return [f"{said}.", *self._given(of_all, metric)]

    def _given(self, values: Any, metric: str) -> list[str]:
        """The baselines with given tokens, which are compared with less than the whole paragraph."""
        asked = [k for k in sorted(self.config["given"]) if k]
        said = []
        for k in (k for k in asked if f"given {k}" in values.index):
            row = values.loc[f"given {k}"]
            fewer = f", {row['texts']} texts" if row["texts"] < self.config["texts"] else ""
            less = _signed(self.difference(metric, TRANSFERRED, f"given {k}"))
            said.append(f"{k} given {row['median']:.3f} (transferred minus this, mean on the same rest: {less}{fewer})")
        left = [str(k) for k in asked if f"given {k}" not in values.index]
        sentences = [f"Compared with the rest of the paragraph only, median: {'; '.join(said)}."] if said else []
        if left:
            sentences.append(f"Left out, because no paragraph is longer: {', '.join(left)} tokens given.")
        return sentences


def _signed(row: Any) -> str:
    if pd.isna(row["low"]):
        return f"{row['difference']:+.3f} (one text, no interval)".replace("-", "−")
    return f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]".replace("-", "−")


def _spans(layers: list[int]) -> str:
    whole = layers == list(range(layers[0], layers[-1] + 1)) and len(layers) > 2
    return f"{layers[0]} to {layers[-1]}" if whole else ", ".join(map(str, layers))
