"""The verdicts of a certificate in sentences, each with its numbers (METHODS 22)."""

import math
from typing import Any

from sepcap.studies.base.text import with_ends
from sepcap.studies.certificate.arms import MATCHED, NAMES, PRUNED, RANDOM, REFERENCE, UNTOUCHED
from sepcap.studies.certificate.plan import what_was_pruned

CONTROLS = {
    MATCHED: ("ratio_matched", "random pruning of equal effect"),
    REFERENCE: ("anamnesis_index", "a model never trained on it"),
}
"""Control -> the column of the quotient by its tokens, and its name in sentences."""

BOUNDS = {"at least": "at least ", "at most": "at most ", "": ""}


def verdicts(result: Any) -> list[str]:
    """One or more sentences per test that was carried out."""
    said = [_damage(result)]
    tests = {"relearning": _relearning, "quantised": _quantised, "elicited": _elicited, "lens": _lens, "probes": _probes}
    for table, say in tests.items():
        if table in result.tables:
            said += say(result)
    return [*said, _covered(result.config)]


def row_of(table: Any, **wanted: Any) -> Any:
    """The row of a table with these values, or None."""
    for name, value in wanted.items():
        table = table[table[name] == value]
    return None if table.empty else table.iloc[0]


def _damage(result: Any) -> str:
    c, models = result.config, result.tables["models"]
    pruned, random, matched = (row_of(models, kind=kind) for kind in (PRUNED, RANDOM, MATCHED))
    said = f"After {what_was_pruned(c)}, {c['forget']} has {with_ends(pruned, 'forget')} of its {c['metric']} left and {c['retain']} "
    said += f"{with_ends(pruned, 'retain')}"
    if random is not None:
        said += f"; after pruning as many random neurons {with_ends(random, 'forget')} and {with_ends(random, 'retain')}"
    said += f". Random pruning of equal effect: {with_ends(matched, 'forget')} left with {matched['neurons']:,.0f} neurons"
    return said + ("." if matched["reached"] else ", the most that random pruning does: the effect is not equal.")


def _relearning(result: Any) -> list[str]:
    c, table = result.config, result.tables["relearning"]
    last = table["tokens"].groupby([table["kind"], table["variant"]]).transform("max") == table["tokens"]
    end = {(row["kind"], row["variant"]): row for row in table[last].to_dict("records")}
    pruned = end[PRUNED, "all"]
    others = {"held": "with pruned neurons held at 0", "lora": "by LoRA", "retain": f"by fine-tuning on {c['retain']} only"}
    said = []
    broken = [" ".join(filter(None, (NAMES[kind], others.get(way)))) for (kind, way), row in end.items() if row["diverged"]]
    if broken:
        said.append(f"Fine-tuning diverged at every learning rate: {', '.join(broken)}. Nothing is concluded from these.")
    if not pruned["diverged"]:
        controls = [f"{NAMES[kind]}: {_end(end[kind, 'all'])}" for kind in (MATCHED, UNTOUCHED)]
        said.append(
            f"After {pruned['tokens']:,} tokens of fine-tuning on {c['forget']}, the accuracy relative to the untouched model is "
            f"{with_ends(pruned, 'forget')} ({'; '.join(controls)})."
        )
        said += [_target(result, target) for target in c["targets"]]
    found = [f"{words}: {_end(end[PRUNED, name])}" for name, words in others.items() if (PRUNED, name) in end]
    return [*said, *([f"Variants, at the end: {'; '.join(found)} of the accuracy on {c['forget']}."] if found else []), *_where(result)]


def _end(row: Any) -> str:
    return "diverged" if row["diverged"] else with_ends(row, "forget")


def _target(result: Any, target: float) -> str:
    c = result.config
    pruned = row_of(result.tables["targets"], kind=PRUNED, variant="all", target=target)
    share = f"{100 * target:.0f}% of the original accuracy on {c['forget']}"
    if pruned["tokens"] == 0:
        return f"{share}: the pruned model has not fallen below it."
    said = f"{share}: " + (
        f"not regained within {pruned['budget']:,.0f} tokens" if pruned["censored"] else f"regained after {_tokens(pruned)} tokens"
    )
    for kind, (column, words) in CONTROLS.items():
        control = row_of(result.tables["targets"], kind=kind, variant="all", target=target)
        if control is None:
            continue
        if control["diverged"]:
            continue
        said += f"; {words} " + ("does not regain it either" if control["censored"] and pruned["censored"] else f"needs {needs(control)}")
        bound = pruned[f"{column}_bound"]
        if bound in BOUNDS and math.isfinite(pruned[column]):
            name = "relearning ratio" if column == "ratio_matched" else "Anamnesis index"
            said += f" ({name} {BOUNDS[bound]}{with_ends(pruned, column)}{_meaning(pruned, column, bound)})"
    return f"{said}."


def _tokens(row: Any) -> str:
    ends = [f"{end:,.0f}" if math.isfinite(end) else "∞" for end in (row["tokens_low"], row["tokens_high"])]
    return f"{row['tokens']:,.0f}" + ("" if math.isnan(row["tokens_low"]) else f" [{', '.join(ends)}]")


def needs(row: Any) -> str:
    """Tokens that a model needs to reach a target, in words, from its row of the table "targets"."""
    if row["diverged"]:
        return "an unknown number, fine-tuning diverged"
    if row["censored"]:
        return f"more than {row['budget']:,.0f}"
    return f"{_tokens(row)}" if row["tokens"] else "none, it has not fallen below it"


def _meaning(row: Any, column: str, bound: str) -> str:
    """What the quotient says, if its interval or its bound allows a statement."""
    fresh = column == "anamnesis_index"
    low, high = (row[f"{column}_{end}"] for end in ("low", "high"))
    if high < 1 and bound != "at least":
        return f": easier to regain than {'to learn' if fresh else 'from random damage'}: it was hidden, not removed"
    if low > 1 and bound != "at most":
        return ": harder to regain than that"
    if bound or math.isnan(low):
        return ""
    return ": no evidence of a trace" if fresh else ": not shown to be harder to regain than from random damage"


def _where(result: Any) -> list[str]:
    table = result.tables.get("layers")
    if table is None:
        return []
    total = table["relearned"].sum()
    gained = (table["relearned"] - table["remaining"]).clip(lower=0)
    if gained.max() < 1:
        return ["After relearning, no layer has more neurons that score above the median of the pruned ones than the pruned model."]
    best = table.loc[gained.idxmax()]
    return [
        f"After relearning, {total:,.0f} neurons score above the median of the pruned ones (whole model {table['whole'].sum():,}, pruned "
        f"model {table['remaining'].sum():,}), {table['regained'].sum():,.0f} of them pruned; the largest gain is in layer {best['layer']} of "
        f"{best['site']} ({gained.max():,.0f})."
    ]


def _quantised(result: Any) -> list[str]:
    table = result.tables["quantised"]
    said = []
    for bits in sorted(set(table["bits"].dropna()), reverse=True):
        pruned, matched = (row_of(table[table["bits"] == bits], kind=kind) for kind in (PRUNED, MATCHED))
        said.append(
            f"{bits} bits: {with_ends(pruned, 'forget')} of the accuracy on {result.config['forget']}, a change of "
            f"{with_ends(pruned, 'change')} (random pruning of equal effect: "
            f"{with_ends(matched, 'change')}){_brings_back(pruned, matched, 'rounding')}"
        )
    kept = table["zeros_kept"].dropna()
    zero = " The weights of pruned neurons stay exactly 0." if len(kept) and kept.all() and result.config["pruned_neurons"] else ""
    return [f"Weights rounded to {'; '.join(said)}.{zero}"]


def _brings_back(pruned: Any, control: Any, what: str) -> str:
    """Whether a change brings the task back, more than with the control."""
    if not pruned["change_low"] > 0:
        return f": {what} is not shown to bring it back"
    return f": {what} brings a part back" + ("" if pruned["change_low"] > control["change_high"] else ", as after random pruning")


def _elicited(result: Any) -> list[str]:
    table = result.tables["elicited"]
    rows = table[(table["kind"] == PRUNED) & (table["condition"] != "plain")]
    if rows.empty:
        return []
    said = []
    for of, words in ((rows[rows["shots"] > 0], "With examples in front of a text"), (rows[rows["shots"] == 0], "With re-formatted texts")):
        if of.empty:
            continue
        best = of.loc[of["change"].idxmax()]
        matched = row_of(table, kind=MATCHED, condition=best["condition"])
        said.append(
            f"{words}, accuracy on {result.config['forget']} relative to the untouched model changes most with {best['condition']}: by "
            f"{with_ends(best, 'change')} to {with_ends(best, 'forget')} (random pruning of equal effect: {with_ends(matched, 'change')})"
            f"{_brings_back(best, matched, 'this')}; it is the largest of {len(of)} changes, which chance makes larger."
        )
    return said


def _lens(result: Any) -> list[str]:
    table = result.tables["lens"]
    tops = {kind: rows.loc[rows["forget"].idxmax()] for kind, rows in table.groupby("kind") if kind in (PRUNED, MATCHED)}
    end = table[table["layer"] == table["layer"].max()]
    pruned = tops[PRUNED]
    return [
        f"Logit lens: the final norm and unembedding read at most {with_ends(pruned, 'forget')} of the accuracy on "
        f"{result.config['forget']} from the stream of the pruned model (after {_block(pruned['layer'])}; at its output "
        f"{with_ends(row_of(end, kind=PRUNED), 'forget')}; random pruning of equal effect: at most {with_ends(tops[MATCHED], 'forget')})."
    ]


def _probes(result: Any) -> list[str]:
    said = []
    for probe, rows in result.tables["probes"].groupby("probe", sort=False):
        best = {kind: of.loc[of["selectivity"].idxmax()] for kind, of in rows.groupby("kind")}
        pruned = best[PRUNED]
        said.append(
            f"A linear probe for the {probe} is right at {with_ends(pruned, 'accuracy')} after {_block(pruned['layer'])} of the pruned "
            f"model (the untouched model: {with_ends(best[UNTOUCHED], 'accuracy')}; random pruning of equal effect: "
            f"{with_ends(best[MATCHED], 'accuracy')}; random labels: {with_ends(pruned, 'control')}; the most frequent label: "
            f"{pruned['chance']:.2f}; each at its best layer)."
        )
    return said


def _block(layer: Any) -> str:
    return "the embedding" if layer == 0 else f"block {layer - 1}"


def _covered(c: Any) -> str:
    if len(c["seeds"]) == 1:
        return "In brackets 95% intervals over evaluation texts only: there is one seed, and other seeds can differ."
    return (
        f"In brackets 95% intervals over evaluation texts, and over {len(c['seeds'])} seeds where neurons or the order of texts are random."
    )
