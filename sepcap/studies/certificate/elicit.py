"""Elicitation: examples in the context, and re-formatted texts (METHODS 22)."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float

from sepcap.evaluation.next_token import evaluate_batch, most_frequent_targets
from sepcap.evaluation.result import ratio
from sepcap.learning.fit import ROLES
from sepcap.models.forward import device_of, measuring
from sepcap.statistics.collect import halving_batches
from sepcap.statistics.intervals import cluster_sums
from sepcap.studies.base.folder import Pieces
from sepcap.studies.base.task_sets import WHOLE, Relative
from sepcap.studies.certificate.arms import UNTOUCHED, Arms
from sepcap.studies.certificate.measured import change, of_every_arm
from sepcap.studies.certificate.plan import Plan
from sepcap.tasks.batches import make_batch
from sepcap.tasks.documents import Spelling

PLAIN = "plain"

FORMATS: dict[str, Callable[[str], str]] = {
    "reindented": lambda text: re.sub(r"(?m)^(?: {4})+", lambda found: "\t" * (len(found[0]) // 4), text),
    "lower-case": str.lower,
    "one line": lambda text: re.sub(r"\s+", " ", text),
}
"""Format -> function that changes a text: a tab for every four spaces at the beginning of a line; small letters; one space for any white
space."""


@dataclass(frozen=True, eq=False)
class Condition:
    """Rows in one form.

    Attributes:
        name: "plain", "1 forget example", a format.
        shots: number of examples in front.
        rows: token ids.
        first: position of the first token of each row that is scored.
        changed: share of the rows that differ from the plain ones in what is scored.
    """

    name: str
    shots: int
    rows: list[np.ndarray]
    first: list[int]
    changed: float = 0.0


def elicited(plan: Plan, arms: Arms, pieces: Pieces) -> dict[str, pd.DataFrame]:
    """Table "elicited": relative accuracy on forget in every condition, of every kind of model, and its change from the plain texts."""
    c, sample = plan.config, plan.evaluate["forget"]
    conditions = list(conditions_of(plan))

    def make(model: Any) -> dict[str, torch.Tensor]:
        return {str(i): torch.from_numpy(_evaluated(plan, model, one)) for i, one in enumerate(conditions)}

    found, every = of_every_arm(plan, arms, pieces, "elicited", make)
    sums = {
        arm: {one.name: cluster_sums(rows[str(i)], sample.clusters) for i, one in enumerate(conditions)} for arm, rows in found.items()
    }
    whole = sums[every[UNTOUCHED][0]]
    # the same documents are drawn in all conditions
    relative = {
        one.name: Relative({WHOLE: whole[one.name]} | {arm: found[one.name] for arm, found in sums.items()}, c.metric, sample.fingerprint)
        for one in conditions
        if ratio(whole[one.name], c.metric) > 0
    }
    rows = []
    for one in conditions:
        for kind, names in every.items() if one.name in relative else ():
            row: dict[str, Any] = {"condition": one.name, "shots": one.shots, "changed": one.changed, "kind": kind}
            row |= {"accuracy": float(np.mean([ratio(sums[name][one.name], c.metric) for name in names]))}
            row |= relative[one.name].mean(names).columns("forget")
            rows.append(row | change(relative[one.name], names, names, relative[PLAIN]) | {"seeds": len(names)})
    return {"elicited": pd.DataFrame(rows)}


def conditions_of(plan: Plan) -> Iterator[Condition]:
    """The plain texts, the same behind examples of both tasks, and re-formatted."""
    c, sample = plan.config, plan.evaluate["forget"]
    context, bos = plan.resolved["context"], sample.bos
    begin = [] if bos is None else [bos]
    texts = [[int(token) for token in row if token != bos][: context // 2] for row in sample.rows]
    room = context - context // 2 - len(begin)
    first = max(1, len(begin))
    plain = [np.array([*begin, *text], dtype=np.int64) for text in texts]
    yield Condition(PLAIN, 0, plain, [first] * len(plain))
    for shots in c.shots:
        if shots * (c.example_tokens + len(begin)) > room or shots > min(len(sample.rows) for sample in plan.fit.values()):
            continue
        for role in ROLES:
            fronts = [_examples(plan, role, shots, i, begin) for i in range(len(texts))]
            rows = [np.array([*front, *row], dtype=np.int64) for front, row in zip(fronts, plain, strict=True)]
            # without BOS, the first token of a text is scored only where it has something before it: never
            starts = [len(front) + first for front in fronts]
            yield Condition(f"{shots} {role} example{'s' * (shots > 1)}", shots, rows, starts)
    spelling = Spelling(plan.model.tokenizer)
    for name, form in FORMATS.items():
        decoded = [plan.model.tokenizer.decode(text, clean_up_tokenization_spaces=False) for text in texts]
        differ = [form(text) != text for text in decoded]
        ids = [spelling.ids(form(old)) if new else text for old, new, text in zip(decoded, differ, texts, strict=True)]
        rows = [np.array([*begin, *one[: context - len(begin)]], dtype=np.int64) for one in ids]
        changed = float(np.mean(differ))
        yield Condition(name, 0, rows, [first] * len(rows), changed)


def _examples(plan: Plan, role: str, shots: int, i: int, begin: list[int]) -> list[int]:
    """The beginnings of as many rows of the collection texts, drawn anew for every text; fewer examples are the last ones of more."""
    fit = plan.fit[role]
    order = np.random.default_rng([i, ROLES.index(role)]).permutation(len(fit.rows))[:shots][::-1]
    found: list[int] = []
    for row in order:
        found += [*begin, *[int(token) for token in fit.rows[row] if token != fit.bos][: plan.config.example_tokens]]
    return found


@torch.inference_mode()
def _evaluated(plan: Plan, model: Any, one: Condition) -> Float[np.ndarray, "row count"]:
    skip = torch.tensor(list(most_frequent_targets(plan.evaluate["forget"])), dtype=torch.long, device=device_of(model))
    bos = plan.evaluate["forget"].bos

    def one_pass(size: int) -> np.ndarray:
        found = []
        with measuring(model):
            for start in range(0, len(one.rows), size):
                batch = make_batch(one.rows[start : start + size], bos)
                # the logit at a position predicts the next one
                scored = torch.arange(batch.asked.shape[1]) >= torch.tensor(one.first[start : start + size])[:, None] - 1
                batch.asked.logical_and_(scored)
                found.append(evaluate_batch(model, batch.to(device_of(model)), skip).cpu().numpy())
        return np.concatenate(found)

    return halving_batches(one_pass, plan.config.batch_size)
