"""Pruned neurons per layer and step."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from sepcap.checks import checked
from sepcap.drawing.parts import above, axes_of, colour_bar, panel_axes
from sepcap.drawing.style import SHARES, SITE_NAMES, Width, capital, chosen_layers, every, in_lines, layer_ticks, new_figure, rounded
from sepcap.drawing.themes import drawn
from sepcap.studies.pruning.figures.labels import named, sizes
from sepcap.studies.pruning.on_disk.run_folder import RunFolder

GAP_PX = 34


@drawn
@checked()
def pruned_neurons(run: RunFolder, *, layers: Sequence[int] | None = None, width: Width = "column") -> go.Figure:
    """Share of every layer that is pruned after every step, one panel per site.

    Args:
        run: a run with at least step 0.
        layers: layers to draw; default all.
        width: inches, "column" or "page".
    """
    named(run)
    table = run.pruned_per_layer
    panels = sizes(run)
    steps = run.steps_done + 1
    shown = {site: chosen_layers(layers, range(count)) for site, (count, _) in panels.items()}
    heights = [min(300, max(96, 16 * len(numbers))) for numbers in shown.values()]
    total = sum(heights) + GAP_PX * (len(panels) - 1)
    traces: list[Any] = []
    layout: dict[str, Any] = {"annotations": []}
    top = total
    for i, ((site, (count, each)), height) in enumerate(zip(panels.items(), heights, strict=True)):
        key, axes = axes_of(i)
        pruned = np.zeros((count, steps), dtype=np.int64)
        of_site = table[table["site"] == site]
        pruned[of_site["layer"], of_site["step"]] = of_site["pruned"]
        pruned = pruned[shown[site]]
        hover = (
            f"<b>{SITE_NAMES[site]}</b><br>layer %{{text}}, step %{{x}}<br>"
            f"%{{customdata:,}} of {each:,} neurons pruned (%{{z:.1%}})<extra></extra>"
        )
        traces.append(
            go.Heatmap(
                z=[rounded(row, 4) for row in pruned / each],
                customdata=pruned.tolist(),
                text=[[str(n)] * steps for n in shown[site]],
                coloraxis="coloraxis",
                hovertemplate=hover,
                **axes,
            )
        )
        bottom, last = top - height, i == len(panels) - 1
        x = {"title": {"text": "Pruning step"} if last else {}, "showticklabels": last, "tick0": 0, "dtick": every(steps, 12)}
        y = {"title": {"text": "Layer"}, **layer_ticks(shown[site], height / 14)}
        layout |= panel_axes(key, x, y, down=(bottom / total, top / total))
        layout["annotations"].append(above(capital(SITE_NAMES[site]), y=top / total))
        top = bottom - GAP_PX
    bar = colour_bar(in_lines("Share of layer pruned", total), tickformat=".0%", dtick=0.25)
    layout["coloraxis"] = {"colorscale": SHARES, "cmin": 0, "cmax": 1, "colorbar": bar}
    return new_figure(traces, layout, width=width, plot_px=total, left=48, right=90, top=26)
