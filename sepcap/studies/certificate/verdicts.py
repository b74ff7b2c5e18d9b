"""The verdicts of a certificate in sentences, each with its numbers (METHODS 22)."""

import math
from typing import Any

from sepcap.statistics.intervals import Ends, as_columns, simultaneous
from sepcap.studies.base.text import with_ends
from sepcap.studies.certificate.arms import MATCHED, NAMES, PRUNED, RANDOM, REFERENCE, UNTOUCHED
from sepcap.studies.certificate.plan import what_was_pruned

CONTROLS = {MATCHED: "ratio_matched", REFERENCE: "anamnesis_index"}
"""Control -> the column of the quotient by its tokens."""

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
    name, difference = _matched_name(result), f"a difference of {with_ends(matched, 'minus_pruned')}"
    said += f". {name.capitalize()}: {with_ends(matched, 'forget')} left with {matched['neurons']:,.0f} neurons, {difference}"
    if not matched["reached"]:
        return f"{said}, the most that random pruning does: the effect is not equal."
    return said + ("." if equal_effect(result) else ": the effect on evaluation texts is not equal.")


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
        names = {MATCHED: _matched_name(result), UNTOUCHED: NAMES[UNTOUCHED]}
        controls = [f"{name}: {_end(end[kind, 'all'])}" for kind, name in names.items()]
        said.append(
            f"After {pruned['tokens']:,} tokens of fine-tuning on {c['forget']}, the accuracy relative to the untouched model is "
            f"{with_ends(pruned, 'forget')} ({'; '.join(controls)})."
        )
        said += [_target(result, target) for target in c["targets"]]
    found = [f"{words}: {_end(end[PRUNED, name])}" for name, words in others.items() if (PRUNED, name) in end]
    return [*said, *([f"Variants, at the end: {'; '.join(found)} of the accuracy on {c['forget']}."] if found else []), *_where(result)]


def _end(row: Any) -> str:
    return "diverged" if row["diverged"] else with_ends(row, "forget")


def equal_effect(result: Any) -> bool:
    """Whether random pruning has the same effect as far as is known: its search succeeded, and evaluation texts show no difference."""
    row = row_of(result.tables["models"], kind=MATCHED)
    return bool(row["reached"] and row["minus_pruned_low"] <= 0 <= row["minus_pruned_high"])


def _matched_name(result: Any) -> str:
    return "random pruning of equal effect" if equal_effect(result) else "the nearest random pruning"


def _target(result: Any, target: float) -> str:
    c = result.config
    pruned = row_of(result.tables["targets"], kind=PRUNED, variant="all", target=target)
    share = f"{100 * target:.0f}% of the original accuracy on {c['forget']}"
    if pruned["tokens"] == 0:
        return f"{share}: the pruned model has not fallen below it."
    if pruned["censored"]:
        some = f" with {pruned['seeds'] - pruned['seeds_reached']} of {pruned['seeds']} seeds" if pruned["seeds_reached"] else ""
        said = f"{share}: not regained within {pruned['budget']:,.0f} tokens{some}"
    else:
        said = f"{share}: regained after {_tokens(pruned)} tokens"
    for kind, column in CONTROLS.items():
        control = row_of(result.tables["targets"], kind=kind, variant="all", target=target)
        if control is None or control["diverged"]:
            continue
        words = _matched_name(result) if kind == MATCHED else "a model never trained on it"
        said += f"; {words} " + ("does not regain it either" if control["censored"] and pruned["censored"] else f"needs {needs(control)}")
        bound = pruned[f"{column}_bound"]
        if bound in BOUNDS and math.isfinite(pruned[column]):
            name = "relearning ratio" if column == "ratio_matched" else "Anamnesis index"
            said += f" ({name} {BOUNDS[bound]}{with_ends(pruned, column)}{_meaning(result, pruned, column, bound)})"
    return f"{said}."


def _tokens(row: Any) -> str:
    ends = [f"{end:,.0f}" if math.isfinite(end) else "∞" for end in (row["tokens_low"], row["tokens_high"])]
    return f"{row['tokens']:,.0f}" + ("" if math.isnan(row["tokens_low"]) else f" [{', '.join(ends)}]")


def needs(row: Any) -> str:
    """Tokens that a model needs to reach a target, in words, from its row of the table "targets"."""
    if row["diverged"]:
        return "an unknown number, fine-tuning diverged"
    if row["censored"]:
        some = f" with {row['seeds'] - row['seeds_reached']} of {row['seeds']} seeds" if row["seeds_reached"] else ""
        return f"more than {row['budget']:,.0f}{some}"
    return f"{_tokens(row)}" if row["tokens"] else "none, it has not fallen below it"


def _meaning(result: Any, row: Any, column: str, bound: str) -> str:
    """What the quotient says, if its interval or its bound allows a statement."""
    fresh = column == "anamnesis_index"
    low, high = (row[f"{column}_{end}"] for end in ("low", "high"))
    if not fresh and not equal_effect(result):
        return ": no verdict, the effects are not equal"
    if row["seeds"] == 1:
        return ": one seed, the interval covers texts only, so that there is no verdict"
    if high < 1 and bound != "at least":
        than = "a model never trained on it needs" if fresh else "after random pruning of equal effect"
        return f": regained with fewer tokens than {than}: this suggests that a trace of it is left"
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
    if total <= table["remaining"].sum():
        return [
            f"After relearning, {total:,.0f} neurons score above the median of the pruned ones, not more than in the pruned model "
            f"({table['remaining'].sum():,}; whole model {table['whole'].sum():,}): the score does not show which neurons brought it back."
        ]
    best = table.loc[gained.idxmax()]
    return [
        f"After relearning, {total:,.0f} neurons score above the median of the pruned ones (whole model {table['whole'].sum():,}, pruned "
        f"model {table['remaining'].sum():,}), {table['regained'].sum():,.0f} of them pruned; the largest gain is in layer "
        f"{best['layer']} of {best['site']} ({gained.max():,.0f})."
    ]


def _quantised(result: Any) -> list[str]:
    table = result.tables["quantised"]
    said = []
    for bits in sorted(set(table["bits"].dropna()), reverse=True):
        pruned, matched = (row_of(table[table["bits"] == bits], kind=kind) for kind in (PRUNED, MATCHED))
        said.append(
            f"{bits} bits: {with_ends(pruned, 'forget')} of the accuracy on {result.config['forget']}, a change of "
            f"{with_ends(pruned, 'change')} ({_matched_name(result)}: "
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
        best = _of_several(result, of.loc[of["change"].idxmax()], "change", len(of))
        matched = _of_several(result, row_of(table, kind=MATCHED, condition=best["condition"]), "change", len(of))
        said.append(
            f"{words}, accuracy on {result.config['forget']} relative to the untouched model changes most with {best['condition']}: by "
            f"{with_ends(best, 'change')} to {with_ends(best, 'forget')} ({_matched_name(result)}: {with_ends(matched, 'change')})"
            f"{_brings_back(best, matched, 'this')}; it is the largest of {len(of)} changes, for which its interval is corrected."
        )
    return said


def _lens(result: Any) -> list[str]:
    table = result.tables["lens"]
    by_kind = {kind: rows for kind, rows in table.groupby("kind") if kind in (PRUNED, MATCHED)}
    best = {kind: rows.loc[rows["forget"].idxmax()] for kind, rows in by_kind.items()}
    tops = {kind: _of_several(result, row, "forget", len(by_kind[kind]), (0, math.inf)) for kind, row in best.items()}
    end = table[table["layer"] == table["layer"].max()]
    pruned = tops[PRUNED]
    return [
        f"Logit lens: the final norm and unembedding read at most {with_ends(pruned, 'forget')} of the accuracy on "
        f"{result.config['forget']} from the stream of the pruned model (after {_block(pruned['layer'])}; at its output "
        f"{with_ends(row_of(end, kind=PRUNED), 'forget')}; {_matched_name(result)}: at most {with_ends(tops[MATCHED], 'forget')}). Each is "
        f"the largest of {len(by_kind[PRUNED])} layers, for which its interval is corrected."
    ]


def _probes(result: Any) -> list[str]:
    said = []
    for probe, rows in result.tables["probes"].groupby("probe", sort=False):
        best = {
            kind: _of_several(result, of.loc[of["selectivity"].idxmax()], "accuracy", len(of), (0, 1)) for kind, of in rows.groupby("kind")
        }
        pruned = best[PRUNED]
        said.append(
            f"A linear probe for the {probe} is right at {with_ends(pruned, 'accuracy')} after {_block(pruned['layer'])} of the pruned "
            f"model (the untouched model: {with_ends(best[UNTOUCHED], 'accuracy')}; {_matched_name(result)}: "
            f"{with_ends(best[MATCHED], 'accuracy')}; random labels: {with_ends(pruned, 'control')}; the most frequent label: "
            f"{pruned['chance']:.2f}; each at its best layer, for "
            "whose choice its interval is corrected)."
        )
    return said


def _of_several(result: Any, row: Any, column: str, several: int, within: Ends = (-math.inf, math.inf)) -> Any:
    """A row with the interval of a column that it needs as the largest of several; `within` are the possible values."""
    n = result.config["n_documents"]["evaluate"]["forget"]
    n = n if row["seeds"] == 1 else min(n, row["seeds"])
    low, high = simultaneous(row[column], (row[f"{column}_low"], row[f"{column}_high"]), int(n), several)
    return dict(row) | as_columns(column, row[column], (max(low, within[0]), min(high, within[1])))


def _block(layer: Any) -> str:
    return "the embedding" if layer == 0 else f"block {layer - 1}"


def _covered(c: Any) -> str:
    if len(c["seeds"]) == 1:
        return "In brackets 95% intervals over evaluation texts only: there is one seed, and other seeds can differ."
    return (
        f"In brackets 95% intervals over evaluation texts, and over {len(c['seeds'])} seeds where neurons or the order of texts are random."
    )
