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
# # Is there a tight pass?
#
# Whatever a block adds to the residual stream went through its attention or its mlp. How many directions of the input does such a
# part respond to at all? The Jacobian ∂output/∂input at a real text, without the residual connection, answers this for small
# changes: its singular values say how strongly each direction passes, its rank how many do.

# %%
import sepcap

model = sepcap.load_model()

# %% [markdown]
# ## What it costs, said before
# Three tokens of 256 numbers each: 768 rows and columns. All singular values of every layer, at five places in the texts, for the
# model and for one of the same configuration with random weights.

# %%
options = {"task": "local-prose", "rows": 5}
sepcap.plan_tight_pass(model, sepcap.TightPassConfig(part="attn", tokens=3, **options)).cost()

# %% [markdown]
# ## Attention
# A direction counts when its singular value is above a thousandth of the largest. LayerNorm takes one direction away at every token,
# so that 765 is the most that is possible.

# %%
attention = sepcap.tight_pass(model, "all", "attn", tokens=3, **options)
attention.summary()

# %%
attention.figure("ranks")

# %%
attention.figure("spectra")

# %% [markdown]
# Where the line is drawn matters, because the spectra fall steadily and have no gap. Mean rank over layers and rows:

# %%
attention.tables["ranks"].groupby(["weights", "threshold"])["rank"].mean().unstack("weights")

# %% [markdown]
# ## Mlp
# Positions do not mix, so that more tokens cost little.

# %%
mlp = sepcap.tight_pass(model, "all", "mlp", tokens=8, **options)
mlp.summary()

# %%
mlp.figure("ranks")

# %%
mlp.figure("spectra")

# %% [markdown]
# Per token, with the number of neurons that are active there (the model has ReLU) as what is possible at most:

# %%
columns = ["weights", "layer", "rank", "rank_low", "rank_high", "bound"]
per_token = mlp.by_layer[columns].copy()
per_token[columns[2:]] /= mlp.config["tokens"]
per_token.round(1)

# %% [markdown]
# ## The difference from random weights, with its interval
# Trained minus random on the same rows.

# %%
differences = {"attention": attention.against_control(), "mlp": mlp.against_control()}
differences["attention"].merge(differences["mlp"], on="layer", suffixes=("_attention", "_mlp")).round(1)

# %% [markdown]
# ## Longer texts
# At 48 tokens the Jacobian of attention has 12,288 rows and columns. Its leading singular values come from a few hundred products
# with it. Each is at most the true value at its place. Two bounds say how good they are: some singular value lies within the error
# bound of each, though not always the one with the same number where many lie close together, and the true value at its place is at
# most √(found² + remainder²). The rank is only a lower bound here (`at_least`), as large as the directions that were tried, and is
# not compared; the stable rank is, because what the directions miss of it is estimated without bias.

# %%
longer = sepcap.tight_pass(model, 2, "attn", tokens=48, rows=3, k=32, method="randomized")
values, errors = longer.tensors["trained"], longer.tensors["trained_errors"]
print(f"largest relative error bound: {float((errors / values).max()):.1e}")
longer.tables["jacobians"][["weights", "row", "largest", "rank", "at_least", "bound", "stable_rank", "products"]]

# %%
longer.by_layer[["weights", "layer", "stable_rank", "stable_rank_low", "stable_rank_high"]].round(2)

# %% [markdown]
# ## The answer
# Yes, in the mlp: from layer 1 on it passes exactly as many directions as neurons are active, 41 to 88 per token (95% intervals over
# rows from 34 to 95) of 255 possible, and the model with random weights passes 254. There is no further narrowing: the rank is as
# large as the active neurons allow. Layer 0 passes 239 [228, 251].
#
# In attention there is a slope, not a hole. At a thousandth of the largest singular value 46% (layer 2: 349 [330, 368]) to 69% (layer
# 4: 526 [494, 558]) of 765 directions are left, against 97% with random weights, and the 95% interval of the difference leaves 0 out
# in every layer; but at a millionth 97% pass. A handful carries most: the stable rank is 3.1 [2.4, 3.8] in layer 2, with random
# weights 48 on average. Sixteen times as many tokens do not widen that much: the stable rank of layer 2 at 48 tokens is 11 [5, 17],
# against 63.
