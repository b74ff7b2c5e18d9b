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
# # Which score can be trusted?
#
# Selective pruning ranks neurons by a cheap score. What a neuron really does is known only if the model is run without it. Here five
# scores are compared with that exact effect on the embedded model, for a random sample of neurons: Δ is the rise of the loss on a task
# when one neuron alone is set to 0, and a good score ranks neurons as Δ_forget − Δ_retain does.
#
# A sample of 100 neurons and few documents keep this notebook to a few minutes, and its intervals wide. All scores, 1,500 neurons and
# three seeds: `python figures/make.py --parts importances`, with the results in
# [figures/README.md](../figures/README.md#which-score-to-trust).

# %%
import sepcap

model = sepcap.load_model()
SCORES = ("abs", "std", "taylor-difference", "atp", "random")

# %%
found = sepcap.compare_importances(
    model,
    sites=("mlp",),
    scores=SCORES,
    seeds=(0, 1),
    tokens=2_000,
    sample=100,
    effect_tokens=800,
    steps=5,
    eval_tokens=2_000,
    choice_tokens=1_000,
    best=1,
)
for sentence in found.summary():
    print(sentence, end="\n\n")

# %% [markdown]
# ## Agreement with the exact effect
# Intervals cover documents, calibration texts and the sample of neurons. The dotted lines are the ceiling: the correlation of a score
# without any error, because Δ is itself measured on few documents.

# %%
found.figure("ranks")

# %%
columns = ["score", "spearman_difference", "spearman_difference_low", "spearman_difference_high", "recall_5"]
found.table.query("direction == 'forward'")[columns].round(2)

# %% [markdown]
# The same on random weights: what correlation does the architecture alone give?

# %%
found.tables["control"].query("direction == 'forward'")[columns].round(2)

# %%
found.figure("effects")

# %% [markdown]
# ## Pruning by the scores
# The best score is chosen on collection texts; then it and `abs` are measured on evaluation texts.

# %%
found.figure("trajectories")

# %%
found.tables["choice"].pivot(index="score", columns="direction", values="area").round(2)

# %% [markdown]
# ## A model whose answer is known
# In a compiled model it is known which program uses every neuron. In `sort-and-reverse` both programs run on every input.
# AUROC: the probability that a neuron of the forget program ranks above one that only the retain program uses; 0.5 is chance.

# %%
compiled = sepcap.compare_importances(
    compiled="sort-and-reverse",
    sites=("mlp",),
    scores=("abs", "taylor", "atp", "relp", "random"),
    seeds=(0, 1),
    tokens=1_000,
    effect_tokens=200,
    steps=5,
    eval_tokens=400,
    choice_tokens=400,
    best=1,
    control=False,
)
labels = compiled.tables["labels"].query("among == 'used'")
labels.pivot(index="score", columns="direction", values="auroc").round(2)

# %%
for sentence in compiled.summary():
    print(sentence, end="\n\n")

# %% [markdown]
# ## The answer
# On this sample no score is shown to agree better with the exact effects than `abs`, and none to prune better in both directions:
# the paired intervals contain 0. With random weights `atp` has 0.38 [0.10, 0.66], so that agreement alone is no evidence of
# something learned. In the compiled model, where every neuron has a label, `taylor` finds the forget neurons best (AUROC 0.94 and
# 0.74; `abs` 0.80 and 0.72; no interval).
