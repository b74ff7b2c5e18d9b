"""Made-up certificates, profiles of neurons and sweeps, with the columns that their figures draw."""

import dataclasses
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from planted_results import CONFIG, LAYERS, WIDTH, _with_ends
from planted_runs import write_run

from sepcap.studies.base.folder import identity_of, read_config
from sepcap.studies.certificate.arms import NAMES, PRUNED, REFERENCE, UNTOUCHED
from sepcap.studies.certificate.config import CertificateConfig
from sepcap.studies.certificate.inside import PROBES
from sepcap.studies.certificate.study import Certificate
from sepcap.studies.neuron_profiles.result import NeuronProfiles
from sepcap.studies.neuron_profiles.units import ROLES
from sepcap.studies.pruning.config import PruningConfig
from sepcap.studies.sweep.folder import CELLS, Ledger, open_sweep
from sepcap.studies.sweep.grid import cells_of
from sepcap.studies.sweep.measures import numbers_of
from sepcap.studies.sweep.result import Sweep
from sepcap.studies.unlearning.methods import METHODS
from sepcap.studies.unlearning.study import UnlearningComparison

LEFT = dict(zip(NAMES, (1.0, 0.2, 0.85, 0.22, 0.05), strict=True))
"""Kind of model -> accuracy on the forget task before any test."""


POWERS = {"abs": 3, "rms": 2, "atp": 5, "random": 0.6}
"""Importance -> how steeply its runs lose the forget task first."""


def certificate() -> Certificate:
    """Of all kinds of models, all variants of fine-tuning and every part."""
    default = CertificateConfig()
    relearning = []
    for kind, variant in [*((kind, "all") for kind in NAMES), *((PRUNED, variant) for variant in default.variants[1:])]:
        speed = 0.02 + 0.02 * default.variants.index(variant)
        for tokens in (0, *default.checkpoints):
            value = 1 - (1 - LEFT[kind]) * np.exp(-speed * tokens / 1_000)
            of = {"kind": kind, "variant": variant, "tokens": tokens}
            relearning.append(of | _with_ends("forget", value) | _with_ends("retain", 1 - 0.04 * speed * tokens / 1_000))
    layers = []
    for site, layer in product(("mlp", "attn_pre_out"), range(LAYERS)):
        pruned = 3 * layer + 2
        counts = {"pruned": pruned, "whole": 2 * pruned, "remaining": pruned + 1}
        layers.append({"site": site, "layer": layer} | counts | _with_ends("relearned", 1.5 * pruned, 1.0))
    rounded, elicited = [], []
    shots = [f"{n} {role} example{'s' * (n > 1)}" for n in (1, 4, 16) for role in ROLES]
    for kind in [kind for kind in NAMES if kind != REFERENCE]:
        rounded += [{"kind": kind, "bits": bits} | _with_ends("forget", LEFT[kind] * (1 - (bits == 4) / 8)) for bits in (None, 8, 4)]
        for i, condition in enumerate(("plain", *shots, "reindented", "lower-case", "one line")):
            elicited.append({"kind": kind, "condition": condition} | _with_ends("forget", LEFT[kind] * (1 - 0.05 * i)))
    lens, probes = [], []
    for kind, layer in product(NAMES, range(LAYERS + 1)):
        share = layer / LAYERS
        lens.append({"kind": kind, "layer": layer} | _with_ends("forget", LEFT[kind] * share**2))
        for probe, chance in zip(PROBES, (0.5, 0.15), strict=True):
            value = chance + (0.3 + 0.2 * LEFT[kind]) * share
            control = _with_ends("control", chance + 0.01 * layer, 0.02)
            probes.append({"probe": probe, "kind": kind, "layer": layer} | _with_ends("accuracy", value, 0.02) | control)
    quantised = pd.DataFrame(rounded).astype({"bits": "Int64"})
    tables = {"relearning": pd.DataFrame(relearning), "layers": pd.DataFrame(layers), "quantised": quantised}
    tables |= {"elicited": pd.DataFrame(elicited), "lens": pd.DataFrame(lens), "probes": pd.DataFrame(probes)}
    config = CONFIG | {"metric": default.metric, "parts": list(default.parts), "seeds": [0, 1, 2]}
    assert set(tables["relearning"]["kind"]) >= {UNTOUCHED, REFERENCE}
    return Certificate(config, tables)


def unlearning() -> UnlearningComparison:
    """Of all methods, with relearning and a reference."""
    methods, trajectory, points, relearning = [], [], [], []
    for i, method in enumerate(METHODS):
        forget = np.linspace(1, 0.05 + 0.05 * i, 6)
        retain = 1 - (0.1 + 0.15 * i) * (1 - forget)
        for point, (f, r) in enumerate(zip(forget, retain, strict=True)):
            row = {"method": method, "point": point, "forward_tokens": 9_000.0 * point, "backward_tokens": 8_000.0 * point}
            trajectory.append(row | _with_ends("forget", f) | _with_ends("retain", r))
        methods.append({"method": method} | _with_ends("area", 1.9 - 0.15 * i))
        points.append({"method": method, "point": 3.0, "forget": forget[3], "retain": retain[3], "near": True})
    for i, kind in enumerate((UNTOUCHED, *METHODS, REFERENCE)):
        for tokens in (0, 2_000, 5_000, 10_000, 20_000):
            value = 1.0 if kind == UNTOUCHED else 1 - 0.5 * np.exp(-(0.3 - 0.03 * i) * tokens / 1_000)
            of = {"kind": kind, "variant": "all", "tokens": tokens}
            relearning.append(of | _with_ends("forget", value) | _with_ends("retain", 0.9 - 0.01 * i))
    tables = {"methods": methods, "trajectory": trajectory, "points": points, "relearning": relearning}
    config = CONFIG | {"metric": "top1", "parts": ["relearn"], "seeds": [0, 1, 2]}
    return UnlearningComparison(config, {name: pd.DataFrame(rows) for name, rows in tables.items()})


def neuron_profiles() -> NeuronProfiles:
    """Forty neurons of one layer, of which every second has a heavy tail on the forget task, and the tokens of each."""
    rng, n = np.random.default_rng(3), WIDTH
    texts = (" the", "\n", "<b>", " self.", "averyveryverylongtoken", "    ", "é", '"', " return", "0", "$x$", "%{y}")
    neurons: dict[str, Any] = {"site": "mlp", "layer": 3, "head": pd.array([pd.NA] * n, dtype="Int64"), "neuron": range(n)}
    for i, role in enumerate(ROLES):
        neurons |= {f"abs_{role}": 10 ** rng.normal(-1 + 0.2 * i, 0.4, n), f"preferred_{role}": " ".join(map(repr, texts[:5]))}
    tokens = [
        {"unit": unit, "list": name, "task": "", "rank": rank, "text": texts[(unit + rank) % len(texts)], "value": sign * (2 - rank / 8)}
        for unit, (name, sign), rank in product(range(n), (("promoted", 1), ("suppressed", -1)), range(1, 11))
    ]
    edges = np.linspace(-0.2, 3.8, 41)
    middle = (edges[1:] + edges[:-1]) / 2
    tensors = {"edges": torch.from_numpy(edges).repeat(n, 1)}
    for role, tail in zip(ROLES, (0.5, 0.25), strict=True):
        share = np.exp(-np.abs(middle) / tail)
        share[np.abs(middle) > 10 * tail] = 0
        tensors[f"{role}/histogram"] = torch.from_numpy(share / share.sum()).repeat(n, 1)
    tables = {"neurons": pd.DataFrame(neurons), "tokens": pd.DataFrame(tokens)}
    return NeuronProfiles(CONFIG | {"tasks": [CONFIG[role] for role in ROLES]}, tables, tensors)


def sweep(folder: Path) -> Sweep:
    """Runs of four importances, two shares of neurons and two seeds, without one cell that is still to be carried out.

    It is made when it is first asked for in a folder.
    """
    if folder.exists():
        return Sweep(folder)
    base = PruningConfig(forget=CONFIG["forget"], retain=CONFIG["retain"])
    cells = cells_of(base, {"importance": ["abs", "rms", "atp", "random"], "fractions": [{"mlp": 0.02}, {"mlp": 0.01}], "seed": [0, 1]})
    plan = {"kind": "PruningConfig", "base": dataclasses.asdict(base), "load": {}, "threads": 1}
    with open_sweep(folder, plan, cells) as config:
        names = list(config["cells"])
    ledger, rng = Ledger(folder), np.random.default_rng(4)
    for name, cell in list(zip(names, cells, strict=True))[:-2]:
        importance, seed = cell.fields["importance"], cell.fields["seed"]
        power = POWERS[importance] * cell.fields["fractions"]["mlp"] / 0.02 + 0.3 * rng.uniform() + 0.5
        left = np.linspace(1, 0, 6)
        how = {"tasks": (base.forget, base.retain), "importance": importance, "seed": seed, "rows": 12}
        run = write_run(folder / CELLS / name, list(0.6 * left**power), list(0.55 * (1 - (1 - left) ** power)), **how)
        ledger.add(name, {"state": "finished", "values": numbers_of(run), "identity": identity_of(read_config(run.folder))})
    return Sweep(folder)
