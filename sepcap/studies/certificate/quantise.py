"""Quantisation: does rounding the weights bring the forgotten task back? (METHODS 22)"""

from functools import partial
from typing import Any

import numpy as np
import pandas as pd
import torch

from sepcap.evaluation.result import ratio
from sepcap.interventions.quantise import quantised, quantiser_of
from sepcap.models.sites import populations
from sepcap.studies.base.folder import Pieces
from sepcap.studies.certificate.arms import PRUNED, UNTOUCHED, Arm, Arms, different
from sepcap.studies.certificate.measured import Sums, before, change, mean_columns, measured, relative_to_untouched
from sepcap.studies.certificate.plan import Plan


def rounded(plan: Plan, arms: Arms, pieces: Pieces) -> dict[str, pd.DataFrame]:
    """Table "quantised": relative accuracies of every kind of model with rounded weights, and their change by rounding."""
    c = plan.config
    name, how = quantiser_of(c.quantiser)
    every: dict[tuple[str, int], list[str]] = {}
    sums: dict[str, Sums] = {}
    kept: dict[int, bool] = {}
    for kind in arms.kinds:
        for arm in different(arms, kind, c.seeds):
            sums[arm.name] = before(plan, arms, pieces, arm)
            every.setdefault((kind, 0), []).append(arm.name)
            for bits in c.bits:
                piece = f"quantised/{name}-{bits}-{arm.name}"
                stored, note = pieces.once(piece, partial(_measured, plan, arms, arm, bits, how))
                sums[piece] = {key: value.numpy() for key, value in stored.items()}
                kept[bits] = kept.get(bits, True) and note["zero"]
                every.setdefault((kind, bits), []).append(piece)
    relative = relative_to_untouched(plan, sums, sums[every[UNTOUCHED, 0][0]])
    rows = []
    for (kind, bits), names in every.items():
        row: dict[str, Any] = {"kind": kind, "bits": bits or None, **mean_columns(relative, names)}
        row |= change(relative["forget"], names, every[kind, 0])
        row |= {"forget_accuracy": float(np.mean([ratio(sums[each]["forget"], c.metric) for each in names])), "seeds": len(names)}
        rows.append(row | {"zeros_kept": kept[bits] if kind == PRUNED and bits else None, "quantiser": name})
    table = pd.DataFrame(rows)
    table["bits"] = table["bits"].astype("Int64")
    return {"quantised": table}


def _measured(plan: Plan, arms: Arms, arm: Arm, bits: int, how: Any) -> tuple[dict[str, torch.Tensor], dict[str, bool]]:
    with arms.made(arm) as model, quantised(model, bits, plan.config.group_size, how):
        found = measured(plan, model, held=False)
        zero = arm.kind != PRUNED or _still_zero(plan, model)
    return {key: torch.from_numpy(value) for key, value in found.items()}, {"zero": zero}


def _still_zero(plan: Plan, model: Any) -> bool:
    """Whether the output weights of the pruned neurons are exactly 0."""
    if plan.neurons is None:
        return True
    found = populations(model, plan.neurons.masks)
    return not any(bool(found[site].rows(layer)[mask].any()) for site, layer, mask in plan.neurons.by_layer())
