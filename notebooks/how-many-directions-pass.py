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
# # How many directions pass through a block?
#
# A block adds the outputs of its attention and its mlp to the residual stream. To how many directions of its input does such a part
# respond? The Jacobian ∂output/∂input on a real text, without the residual connection, answers this for small
# changes: its singular values measure how strongly each direction passes, its rank how many do.

# %%
import sepcap

model = sepcap.load_model()

# %% [markdown]
# ## What is computed
# Three tokens of 256 dimensions each give 768 rows and columns. All singular values of every layer are computed on five rows of
# tokens, for the model and for one of the same configuration with random weights.

# %% [markdown]
# ## Attention
# The rank is the number of singular values above a thousandth of the largest. LayerNorm removes one direction at every token, so the
# largest possible rank is 765.

# %%
options = {"task": "local-prose", "rows": 5}
attention = sepcap.jacobian_spectrum(model, part="attn", tokens=3, **options)
attention.summary()

# %%
attention.figure("ranks")

# %%
attention.figure("spectra")

# %% [markdown]
# The threshold matters, because the spectra fall steadily and have no gap. Mean rank over layers and rows:

# %%
attention.tables["ranks"].groupby(["weights", "threshold"])["rank"].mean().unstack("weights")

# %% [markdown]
# ## Mlp
# The mlp does not mix positions, so more tokens cost little.

# %%
mlp = sepcap.jacobian_spectrum(model, part="mlp", tokens=8, **options)
mlp.summary()

# %%
mlp.figure("ranks")

# %%
mlp.figure("spectra")

# %% [markdown]
# Rank per token. The number of active neurons (the model has ReLU) is an upper bound:

# %%
columns = ["weights", "layer", "rank", "rank_low", "rank_high", "bound"]
per_token = mlp.by_layer[columns].copy()
per_token[columns[2:]] /= mlp.config["tokens"]
per_token.round(1)

# %% [markdown]
# ## Difference from random weights
# Trained minus random on the same rows, with its interval.

# %%
differences = {"attention": attention.against_control(), "mlp": mlp.against_control()}
differences["attention"].merge(differences["mlp"], on="layer", suffixes=("_attention", "_mlp")).round(1)

# %% [markdown]
# ## Longer texts
# At 48 tokens the Jacobian of attention has 12,288 rows and columns. Its leading singular values are computed from a few hundred
# products with it. Each is at most the true value of the same index. There are two error bounds: some singular value is within the
# error bound of each (if many are close together, not always the one of the same index), and the true value of the same index is at
# most √(found² + remainder²). The rank is only a lower bound here (`at_least`), equal to the number of directions tried, and is not
# compared; the stable rank is, because the contribution of all other directions to it is estimated without bias.

# %%
longer = sepcap.jacobian_spectrum(model, layers=[2], part="attn", tokens=48, rows=3, k=32, method="randomized")
values, errors = longer.tensors["trained"], longer.tensors["trained_errors"]
print(f"largest relative error bound: {float((errors / values).max()):.1e}")
longer.tables["jacobians"][["weights", "row", "largest", "rank", "at_least", "bound", "stable_rank", "products"]]

# %%
longer.by_layer[["weights", "layer", "stable_rank", "stable_rank_low", "stable_rank_high"]].round(2)

# %% [markdown]
# ## The answer
# In the mlp, few: from layer 1 on its rank equals the number of active neurons, 43 (layer 2, [39, 46]) to 90 (layer 5, [75, 105]) per
# token of 255 possible, where random weights give 254. For layer 0, with 243 [236, 250], a difference from random weights is not shown
# after correction for six layers. (95% intervals over five rows of prose, the first tokens of each, each for its own layer.)
#
# In attention the singular values fall steadily and have no gap, so that the rank depends on the threshold. At a thousandth of the
# largest singular value the mean rank is 445 of 765 (58%) and with random weights 744 (97%); it is lower in all six layers, with
# intervals of the difference that hold for all layers together. At a millionth it is 749 (98%) against 763. The stable rank, which counts
# the strong directions only, is lower than with random weights in all six layers as well. With 48 tokens instead of 3 the stable rank of
# layer 2 is 10.8 [7.1, 14.5], with random weights 63.5 [62.9, 64.1] (three rows).
