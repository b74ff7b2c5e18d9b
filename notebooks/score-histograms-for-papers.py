# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Histograms of neuron scores for a paper
#
# From two tasks to a printable figure: collect, score, choose, draw, write a PDF of the width of a column. At the end, what the
# histogram hides: the scatter of importance, and scores made of whole distributions instead of one number.

# %%
import tempfile
from pathlib import Path

import sepcap

model = sepcap.load_model()
forget = sepcap.collect(model, "local-code", tokens=20_000, histogram=True)
retain = sepcap.collect(model, "local-prose", tokens=20_000, histogram=True)
forget

# %% [markdown]
# ## Scores per layer, with the neurons that would be pruned

# %%
scores = sepcap.score(forget, retain, importance="abs")
neurons = scores.top({"mlp": 0.05})
figure = scores.figure(site="mlp", neurons=neurons)
figure

# %% [markdown]
# ## On paper
# `save` writes the figure at exactly the printed width: 3.3 inches for a column, 6.9 for the page.

# %%
folder = Path(tempfile.mkdtemp())
try:
    for suffix in ("pdf", "svg", "png"):
        print(suffix, sepcap.plots.save(figure, folder / f"scores.{suffix}", width="column").stat().st_size, "bytes")
except (ImportError, RuntimeError) as error:  # no browser for the export on this machine
    print(error)

# %% [markdown]
# ## Attention: by head

# %%
sepcap.plots.head_scores(scores, aggregate="mean")

# %% [markdown]
# ## What the ratio hides
# A high score can come from a neuron that does much on code, or from one that does nothing on prose.

# %%
sepcap.plots.importance_scatter(forget, retain, "abs", neurons, site="mlp")

# %% [markdown]
# ## Scores from whole distributions
# The divergences between the two tasks' activation histograms are scores by themselves. How much do the chosen sets overlap?

# %%
import pandas as pd

names = ("abs", "std", "freq", "js", "wasserstein")
chosen = {name: sepcap.score(forget, retain, name, sites=["mlp"]).top({"mlp": 0.05}) for name in names}
overlap = {a: {b: len(x & y) / len(x) for b, y in chosen.items()} for a, x in chosen.items()}
pd.DataFrame(overlap).round(2)

# %%
sepcap.score(forget, retain, "js", sites=["mlp"]).figure(site="mlp")

# %% [markdown]
# ## The answer
# Per-layer histograms with the chosen neurons marked are one call and one `save`; the scatter shows that a high ratio
# mostly comes from neurons that are nearly silent on prose; and sets chosen by `abs`, by another statistic
# or by a divergence share only a part.
