"""How much a selection of neurons depends on the documents, the seed or the texts that it was made from (METHODS 18)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from sepcap.checks import checked
from sepcap.drawing.parts import DOTTED
from sepcap.drawing.style import PALETTE, SITE_NAMES, Width, capital, new_figure, plain, rounded
from sepcap.drawing.themes import drawn
from sepcap.latex import latex_table
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import html_card


@dataclass(frozen=True, eq=False)
class SelectionStability:
    """Several selections of neurons of one model, and their overlap.

    Attributes:
        selections: by name, such as the number of a bootstrap replicate, a seed, or the texts that statistics were collected on.
        selected: the selection that they are compared with, if there is one.
        over: description of what they differ in.
    """

    selections: dict[str, NeuronSet]
    selected: NeuronSet | None = None
    over: str = "selections"

    def __post_init__(self) -> None:
        if len(self.selections) < 2:
            raise ValueError(f"selections: {len(self.selections)} given; give at least two to compare")
        every = [*self.selections.values(), *([] if self.selected is None else [self.selected])]
        shapes = [{site: tuple(mask.shape) for site, mask in one.masks.items()} for one in every]
        if any(shape != shapes[0] for shape in shapes):
            raise ValueError("selections: they are over different sites or models; select from the same sites of one model")

    @property
    def sites(self) -> list[str]:
        """Sites of the selections."""
        return list(next(iter(self.selections.values())).masks)

    def _taken(self, site: str) -> Float[Tensor, "selection neuron"]:
        return torch.stack([one.masks[site].flatten().cpu() for one in self.selections.values()]).double()

    @cached_property
    def frequency(self) -> dict[str, Float[Tensor, "layer *neuron"]]:
        """Site -> the share of the selections that contain each neuron."""
        shape = next(iter(self.selections.values())).masks
        return {site: self._taken(site).mean(0).view(shape[site].shape) for site in self.sites}

    @checked()
    def jaccard(self, site: str) -> Float[np.ndarray, "selection selection"]:
        """|A∩B| / |A∪B| of every two selections at a site; NaN where both are empty."""
        taken = self._taken(site)
        both, sizes = (taken @ taken.T).numpy(), taken.sum(1).numpy()
        union = sizes[:, None] + sizes - both
        return np.divide(both, union, out=np.full(union.shape, np.nan), where=union > 0)

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """One row per site and pair of selections: site, a, b, jaccard."""
        rows = []
        for site in self.sites:
            values = self.jaccard(site)
            rows += [
                {"site": site, "a": a, "b": b, "jaccard": values[i, j]} for (i, a), (j, b) in combinations(enumerate(self.selections), 2)
            ]
        return pd.DataFrame(rows)

    @cached_property
    def table(self) -> pd.DataFrame:
        """One row per site.

        Columns: site, neurons (of the site), selections (their number), size (mean number of neurons in one), jaccard (mean over pairs)
        with jaccard_low and jaccard_high (the lowest and the highest pair), jaccard_random (of two uniform random sets of that size,
        the ratio of the expected numbers), always and ever (number of neurons in all selections, and in any), and, if there is a
        selection to compare with, kept: the mean share of its neurons that a selection contains.
        """
        rows = []
        for site in self.sites:
            taken, of_pairs = self._taken(site), self.pairs.loc[self.pairs["site"] == site, "jaccard"]
            size, n = float(taken.sum(1).mean()), taken.shape[1]
            counts = taken.sum(0)
            row = {"site": site, "neurons": n, "selections": len(taken), "size": size, "jaccard": of_pairs.mean()}
            row |= {"jaccard_low": of_pairs.min(), "jaccard_high": of_pairs.max()}
            row |= {"jaccard_random": size / (2 * n - size), "always": int((counts == len(taken)).sum()), "ever": int((counts > 0).sum())}
            if self.selected is not None:
                row["kept"] = float(self.frequency[site][self.selected.masks[site].cpu()].mean())
            rows.append(row)
        return pd.DataFrame(rows)

    def to_latex(self, **options: Any) -> str:
        """`.table` for a paper, see `sepcap.latex.latex_table`."""
        return latex_table(self.table, **options)

    def figure(self, **options: Any) -> go.Figure:
        """Frequency of selection of the neurons, `sepcap.plots.selection_frequency`."""
        return selection_frequency(self, **options)

    def __repr__(self) -> str:
        sites = ", ".join(f"{row['site']} {row['jaccard']:.2f}" for row in self.table.to_dict("records"))
        return f"SelectionStability({len(self.selections)} {self.over}; mean Jaccard index: {sites})"

    def _repr_html_(self) -> str:
        return html_card("SelectionStability", {"selections": len(self.selections), "over": self.over}, self.table)


@checked()
def selection_stability(scores: Any, fractions: Any, *, over: str = "selections", **options: Any) -> SelectionStability:
    """Measure the overlap of the selections from several scores of one model.

    The scores are of statistics that were collected with different seeds, on different texts of the same capability, or of different
    importances. For the part that is due to the documents of one sample, see `Scores.stability`.

    Args:
        scores: name -> Scores, or a list of them, which are numbered from 1.
        fractions: share or number of neurons of every site, as in `Scores.top`.
        over: what the scores differ in, in words, for titles.
        options: other arguments of `Scores.top`.

    Returns:
        SelectionStability with `.frequency`, `.jaccard(site)`, `.table`, `.pairs` and `.figure()`.

    Raises:
        ValueError: fewer than two, or of different sites or models.
        TypeError: something else than scores.

    Source: METHODS 18.

    Example:
        >>> import torch
        >>> one, other = (sepcap.Scores({"mlp": torch.tensor([row])}) for row in ([3.0, 2.0, 1.0], [1.0, 3.0, 2.0]))
        >>> sepcap.selection_stability([one, other], {"mlp": 2}).pairs["jaccard"].tolist()
        [0.3333333333333333]
    """
    if isinstance(scores, str) or not isinstance(scores, Mapping | Sequence) or hasattr(scores, "top"):
        raise TypeError(f"scores is a {type(scores).__name__}; give a list of sepcap.Scores, or a mapping from name to Scores")
    named = dict(scores) if isinstance(scores, Mapping) else {str(i + 1): one for i, one in enumerate(scores)}
    for name, one in named.items():
        if not hasattr(one, "top"):
            raise TypeError(f"scores[{name!r}] is a {type(one).__name__}; give what sepcap.score returns")
    return SelectionStability({str(name): one.top(fractions, **options) for name, one in named.items()}, None, over)


@drawn
@checked()
def selection_frequency(stability: SelectionStability, *, width: Width = "column") -> go.Figure:
    """Share of the selections that contain each neuron, the most frequent first, one line per site.

    The horizontal axis is the rank of the neuron over the number of neurons that a selection takes. If all selections were equal, the line
    would be 1 up to 1 and 0 from there on (dotted); the slower it falls, the more the selections differ. The legend has the mean Jaccard
    index of two selections, and that of two random sets of the same size.

    Args:
        stability: what `Scores.stability` or `selection_stability` returns.
        width: inches, "column" or "page".
    """
    traces: list[Any] = []
    longest = 1.5
    for row, colour in zip(stability.table.to_dict("records"), PALETTE, strict=False):
        name = capital(SITE_NAMES.get(row["site"], plain(row["site"])))
        values = np.sort(stability.frequency[row["site"]].flatten().numpy())[::-1][: row["ever"] + 1]
        if not row["size"]:
            continue
        ranks = np.arange(1, len(values) + 1) / row["size"]
        longest = max(longest, float(ranks[-1]))
        label = f"{name}: {row['jaccard']:.2f} (random {row['jaccard_random']:.2f})"
        line = {"color": colour, "width": 1.6}
        hover = "rank %{x:.2f} × selected<br>in %{y:.0%} of selections<extra></extra>"
        traces.append(go.Scatter(x=rounded(ranks), y=rounded(values), name=label, mode="lines", line=line, hovertemplate=hover))
    if not traces:
        raise ValueError("stability: the selections are empty; there is nothing to draw")
    equal = {"x": [0, 1, 1, longest], "y": [1, 1, 0, 0], "mode": "lines", "line": DOTTED}
    traces.append(go.Scatter(**equal, name="all selections equal", hoverinfo="skip"))
    layout = {
        "xaxis": {"title": {"text": "Rank of the neuron / number selected"}, "range": [0, longest]},
        "yaxis": {"title": {"text": "Frequency of selection"}, "range": [0, 1.03]},
    }
    layout["legend"] = {"title": {"text": "Mean Jaccard index"}}
    return new_figure(traces, layout, width=width, plot_px=170, legend_rows=len(traces) + 1)
