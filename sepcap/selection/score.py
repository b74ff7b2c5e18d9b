"""Scores: importance on the forget task relative to importance on the retain task (METHODS 5)."""

from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

import sepcap
from sepcap.checks import ANY, checked
from sepcap.errors import CorruptFile, unknown
from sepcap.latex import latex_table
from sepcap.models.sites import get_site
from sepcap.selection.figures import score_histograms
from sepcap.selection.importance import get_importance
from sepcap.selection.names import DIVERGENCES, SIGNED, Contrast, resolve_contrast
from sepcap.selection.neurons import NeuronSet, neuron_table, select
from sepcap.selection.stability import SelectionStability
from sepcap.statistics.intervals import bootstrap_intervals
from sepcap.statistics.moments import NeuronStatistics, Statistics
from sepcap.storage import html_card, load_tensors, save_tensors

ROLES = ("forget", "retain")
ATTENTION_SITES = ("attn_pre_out", "attn_value")

UNREPLICATED = ("snip", *DIVERGENCES)
"""Importances that are not computed from sums over rows, and so have no bootstrap replicates."""

LEAST = 40
"""Replicates below which there is no interval: of 40, one lies in each outer 2.5%."""

RELATIVE_EPS = 1e-4
"""Default ε of importances from gradients, as a share of the site's mean importance on retain."""


class Scores(Mapping[str, Tensor]):
    """A score per neuron: a mapping from site to Float [layer, neuron] or [layer, head, d_head]. The highest are selected first.

    Attributes:
        info: importance, tasks and model.
        importances: site -> the importances on forget and on retain, each in the shape of the scores; empty if the importance is
            already a score.
        replicates: site -> the scores of every bootstrap replicate over documents, [replicate, layer, *neuron]; empty if the statistics
            were collected without.
    """

    def __init__(
        self,
        by_site: Mapping[str, Tensor],
        info: Mapping[str, Any] | None = None,
        importances: Mapping[str, tuple[Tensor, Tensor]] | None = None,
        replicates: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._by_site = dict(by_site)
        self.info = dict(info or {})
        self.importances = dict(importances or {})
        self.replicates = dict(replicates or {})

    def __getitem__(self, site: str) -> Tensor:
        if site not in self._by_site:
            raise unknown("site", site, self._by_site, "Collect statistics of it to score it.")
        return self._by_site[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_site)

    def __len__(self) -> int:
        return len(self._by_site)

    @checked()
    def to(self, device: str | torch.device) -> "Scores":
        """The same scores on another device."""
        importances = {site: (forget.to(device), retain.to(device)) for site, (forget, retain) in self.importances.items()}
        replicates = {site: value.to(device) for site, value in self.replicates.items()}
        return Scores({site: value.to(device) for site, value in self.items()}, self.info, importances, replicates)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per neuron, the highest score of each site first.

        Columns: site, layer, head (attention only), neuron (in its layer or head), score, importance_forget and importance_retain
        (if the score is computed from the two), score_low and score_high (the ends of `interval`, if there are 40 replicates), and rank
        within the site, from 1. Ties are in the order in which `top` selects them.
        """
        places, columns = {}, []
        for site, value in self.items():
            flat = value.detach().double().flatten().cpu()
            order = flat.argsort(descending=True, stable=True)
            places[site] = np.stack(np.unravel_index(order.numpy(), tuple(value.shape)), axis=1)
            column = {"score": flat[order].numpy()}
            for role, importance in zip(ROLES, self.importances.get(site, ()), strict=False):
                column[f"importance_{role}"] = importance.detach().double().flatten().cpu()[order].numpy()
            replicated = len(self.replicates.get(site, ())) >= LEAST
            for end, values in zip(("low", "high"), self.interval(site) if replicated else (), strict=False):
                column[f"score_{end}"] = values.flatten().cpu()[order].numpy()
            columns.append(pd.DataFrame(column | {"rank": np.arange(1, len(order) + 1)}))
        return pd.concat([neuron_table(places), pd.concat(columns, ignore_index=True)], axis=1)

    @checked()
    def to_latex(self, n: int = 20, **options: Any) -> str:
        """The first `n` rows of `.table` of each site for a paper, see `sepcap.latex.latex_table`."""
        return latex_table(self.table.groupby("site", sort=False).head(n), **options)

    def _replicated(self) -> int:
        """Number of replicates.

        Raises:
            ValueError: there are none.
        """
        if not self.replicates:
            raise ValueError(
                "scores hold no replicates; collect the statistics of both tasks with collect(..., replicates=100), and score them by an "
                f"importance other than {' or '.join(map(repr, UNREPLICATED))}"
            )
        return len(next(iter(self.replicates.values())))

    @checked()
    def interval(self, site: str) -> tuple[Float[Tensor, "layer *neuron"], Float[Tensor, "layer *neuron"]]:
        """Ends of the 95% interval of every score over documents: percentiles of the replicates, expanded for few documents (METHODS 18).

        NaN if a task has a single document.

        Raises:
            ValueError: no replicates, or fewer than 40.
        """
        if (n := self._replicated()) < LEAST:
            raise ValueError(
                f"{n} replicates: the ends of a 95% interval lie between the outermost 2.5% on each side, which {LEAST} replicates have "
                "one of; collect with replicates=100"
            )
        low, high = bootstrap_intervals(self.replicates[site].detach().double().cpu().numpy(), self.info["clusters"])
        return torch.from_numpy(low).to(self[site].device), torch.from_numpy(high).to(self[site].device)

    @checked(b=ANY)
    def replicate(self, b: int) -> "Scores":
        """The scores of bootstrap replicate `b`."""
        if not 0 <= b < self._replicated():
            raise IndexError(f"b={b}: there are the replicates 0 to {self._replicated() - 1}")
        return Scores({site: value[b] for site, value in self.replicates.items()}, self.info)

    @checked()
    def stability(self, fractions: Mapping[str, float], **options: Any) -> SelectionStability:
        """How much a selection depends on the documents: `top` on every bootstrap replicate (METHODS 18).

        Args:
            fractions: as in `top`.
            options: other arguments of `top`.

        Returns:
            SelectionStability with `.frequency`, `.jaccard`, `.table`, `.pairs` and `.figure()`; its `selected` is `top` of the scores.

        Example:
            >>> scores.stability({"mlp": 0.02}).table  # doctest: +SKIP
        """
        drawn = {str(b): self.replicate(b).top(fractions, **options) for b in range(self._replicated())}
        return SelectionStability(drawn, self.top(fractions, **options), "bootstrap replicates of the documents")

    @checked()
    def heads(self, aggregate: Literal["mean", "median"] = "mean", site: str = "attn_pre_out") -> Float[Tensor, "layer head"]:
        """Score of every head: the mean or the median over its d_head neurons."""
        if site not in ATTENTION_SITES:
            raise ValueError(f"site={site!r} has no heads; use one of {ATTENTION_SITES}")
        values = self[site].double()
        if aggregate == "mean":
            return values.mean(dim=-1)
        if aggregate == "median":
            # torch.median takes the lower of the two middle values; the median is their mean
            return values.quantile(0.5, dim=-1)
        raise unknown("aggregate", aggregate, ("mean", "median"))

    @checked()
    def top(
        self,
        fractions: Mapping[str, float],
        *,
        per_layer: bool = False,
        exclude: NeuronSet | None = None,
        aggregate: Literal["mean", "median"] = "mean",
        head_site: str = "attn_pre_out",
    ) -> NeuronSet:
        """The highest-scoring ⌊fraction·N⌋ neurons over all layers of each site together, or a whole number of them.

        Args:
            fractions: site -> fraction in (0, 1] of the site's original size, or a count: 0.02 is two percent, 20 are twenty neurons,
                1 is one neuron, 1.0 all. "heads" selects whole heads.
            per_layer: select the same fraction, or count, in every layer instead.
            exclude: neurons that are already pruned; a head is excluded if all its neurons are.
            aggregate: a head's score is the mean or the median over its neurons.
            head_site: the site at which heads are scored.

        Returns:
            NeuronSet; `info["threshold"]` is the lowest selected score per site.
        """
        if not isinstance(fractions, Mapping):
            raise TypeError(f"fractions={fractions!r}: give a mapping from site to fraction, {{'mlp': 0.02}}")
        if not fractions:
            raise ValueError("fractions={}: give at least one site, {'mlp': 0.02}")
        for site, excluded in (exclude.masks if exclude is not None else {}).items():
            if site in self and excluded.shape != self[site].shape:
                raise ValueError(
                    f"exclude: the mask of site {site!r} is {list(excluded.shape)} but its scores are {list(self[site].shape)}: "
                    "the set was made for another model"
                )
        chosen, thresholds = select(
            self, fractions, lambda: self.heads(aggregate, head_site), head_site, per_layer=per_layer, exclude=exclude
        )
        chosen.info = {**self.info, "fractions": dict(fractions), "per_layer": per_layer, "threshold": thresholds}
        return chosen

    @checked()
    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        roles = {f"{site}/{role}": value for site, pair in self.importances.items() for role, value in zip(ROLES, pair, strict=True)}
        drawn = {f"{site}/replicates": value for site, value in self.replicates.items()}
        save_tensors(path, {**self, **roles, **drawn}, {"kind": "scores", "info": self.info, "sites": list(self)})

    @classmethod
    @checked()
    def load(cls, path: str | Path) -> "Scores":
        """Read what `save` wrote."""
        tensors, meta = load_tensors(path, "scores")
        if missing := [site for site in meta["sites"] if site not in tensors]:
            raise CorruptFile(f"{path} is corrupt: the scores of {missing[0]!r} are missing; compute them again")
        scores = {site: tensors[site] for site in meta["sites"]}
        pairs = {site: (tensors[f"{site}/forget"], tensors[f"{site}/retain"]) for site in scores if f"{site}/forget" in tensors}
        drawn = {site: tensors[f"{site}/replicates"] for site in scores if f"{site}/replicates" in tensors}
        return cls(scores, meta["info"], pairs, drawn)

    @checked()
    def examine(self, model: Any, n: int = 50, **how: Any) -> Any:
        """Profiles of the n highest scores of each site: texts, tokens, logits; see `sepcap.examine` (METHODS 23)."""
        return sepcap.examine(model, self, n=n, **how)

    def figure(self, **options: Any) -> Any:
        """Per-layer histograms of log10 score, `sepcap.plots.score_histograms`."""
        return score_histograms(self, **options)

    def __repr__(self) -> str:
        sites = ", ".join(f"{site} {list(v.shape)}" for site, v in self.items())
        return f"Scores({self.info.get('importance', '?')}: {sites})"

    def _repr_html_(self) -> str:
        rows = []
        for site, value in self.items():
            q = (
                value.double().flatten().quantile(torch.tensor([0.5, 0.98], dtype=torch.float64, device=value.device))
                if value.numel() < 2**24
                else [value.median(), value.max()]
            )
            rows.append(
                {
                    "site": site,
                    "shape": " × ".join(map(str, value.shape)),
                    "median": float(q[0]),
                    "98%": float(q[1]),
                    "max": float(value.max()),
                }
            )
        return html_card("Scores", {k: self.info.get(k) for k in ("importance", "forget", "retain", "model")}, pd.DataFrame(rows))


@checked()
def score(
    forget: Statistics,
    retain: Statistics,
    importance: str = "abs",
    *,
    contrast: Contrast | None = None,
    eps: float | Mapping[str, float] | None = None,
    lam: float = 1.0,
    q: float = 0.5,
    sites: Iterable[str] | None = None,
) -> Scores:
    """A score for every neuron of every site in the statistics: by default I_forget(n) / (I_retain(n) + ε).

    Args:
        forget: statistics on the task to be forgotten.
        retain: statistics on the task to be retained.
        importance: "abs", "sqrt", "rms", "std", "std_common", "freq" (mlp only), "wanda"; with gradients "taylor", "fisher", "snip" and,
            signed, "atp", "ig" and "relp", or their absolute values "atp_abs", "ig_abs" and "relp_abs"; or a score without contrast and ε:
            "mean_shift" and, for statistics with histograms, "kl", "js" and "wasserstein".
        contrast: "ratio"; "difference", I_f/ΣI_f − λ·I_r/ΣI_r with sums over the site, for signed importances T_f − λ·T_r in nats;
            "guarded", I_f among the neurons whose I_r is below the q-quantile, and all others ranked below, by ratio. A guarded score is
            1 + I_f/max I_f for the former, and the ratio divided by a number above the highest ratio for the others. Default: ratio, but
            difference for signed importances and "wanda", for which ratio is an error: a ratio of signed numbers has no meaning, and the
            weights of "wanda" would cancel.
        eps: ε of the ratio for all sites or per site; default 1e-3 for mlp and 1e-4 for attention, and for importances from gradients
            and "wanda" 1e-4 of the mean I_retain of the site.
        lam: λ of the difference.
        q: quantile of the guard.
        sites: which sites to score; default all.

    Raises:
        ValueError: unknown importance, statistics of different models or without what the importance needs, "freq" on attention, a contrast
            that is not defined for the importance.

    Source: [SP] definition 2, with the ratio in the direction that every released result uses; METHODS 5 for the other contrasts.

    Example:
        >>> scores = sepcap.score(forget, retain, importance="abs")  # doctest: +SKIP
        >>> neurons = scores.top({"mlp": 0.02})  # doctest: +SKIP
    """
    contrast = resolve_contrast(importance, contrast)
    by_site, importances, replicates, clusters = {}, {}, {}, []
    for site in sites if sites is not None else forget:
        f, r = forget[site], retain[site].to(forget[site].low.device)
        if f.shape != r.shape:
            raise ValueError(
                f"site {site!r}: forget has shape {list(f.shape)} and retain {list(r.shape)}: they were collected on different models"
            )
        of_site = partial(_of_site, importance=importance, contrast=contrast, eps=eps, lam=lam, q=q)
        by_site[site], pair = of_site(f, r)
        if pair is not None:
            importances[site] = pair
        if f.replicates is not None and r.replicates is not None and importance not in UNREPLICATED:
            clusters += [f.replicates.clusters, r.replicates.clusters]
            both = sorted({*f.replicates.whole} & {*r.replicates.whole})
            replicates[site] = torch.stack([of_site(f.replicate(b), r.replicate(b))[0] for b in both])
    info = {
        "importance": importance,
        "contrast": contrast,
        "forget": forget.info.get("task"),
        "retain": retain.info.get("task"),
        "model": forget.info.get("model"),
    }
    return Scores(by_site, info | ({"clusters": min(clusters)} if clusters else {}), importances, replicates)


def _of_site(
    f: NeuronStatistics,
    r: NeuronStatistics,
    *,
    importance: str,
    contrast: Contrast | None,
    eps: float | Mapping[str, float] | None,
    lam: float,
    q: float,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """Scores of a site, and the two importances that they are computed from, if any."""
    row = get_importance(importance)
    if row.pair is not None:
        return row.pair(f, r), None
    pair = of_forget, of_retain = row.values(f, r)
    if contrast == "difference":
        return _difference(of_forget, of_retain, lam, importance in SIGNED), pair
    default = RELATIVE_EPS * float(of_retain.double().mean()) or RELATIVE_EPS if row.relative_eps else get_site(f.site).eps
    constant = default if eps is None else eps[f.site] if isinstance(eps, Mapping) else eps
    if not constant > 0:
        raise ValueError(f"eps={constant}: it must be positive: a neuron that is inactive on both tasks would have the score 0/0")
    ratio = of_forget / (of_retain + constant)
    return ratio if contrast == "ratio" else _guarded(of_forget, of_retain, ratio, q), pair


def _difference(f: Tensor, r: Tensor, lam: float, signed: bool) -> Tensor:
    f, r = f.double(), r.double()
    if signed:
        return f - lam * r
    # a task on which every importance is 0 has no shares
    return f / (f.sum() or 1) - lam * r / (r.sum() or 1)


def _guarded(f: Tensor, r: Tensor, ratio: Tensor, q: float) -> Tensor:
    f, r, ratio = f.double(), r.double(), ratio.double()
    # numpy's quantile has no limit on the number of values
    low = r < float(np.quantile(r.detach().cpu().numpy(), q))
    highest = float(f[low].max()) if bool(low.any()) else 0.0
    return torch.where(low, 1 + f / (highest or 1.0), ratio / (float(ratio.max()) * (1 + 1e-9) or 1.0))
