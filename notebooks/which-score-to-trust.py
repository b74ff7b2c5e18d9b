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
# # Which score deserves trust?
#
# Selective pruning ranks neurons by a cheap score. What a neuron really does is known only if the model is run without it. Here every
# score is compared with that exact effect on the embedded model, for a random sample of neurons so that this notebook takes a few minutes:
# Δ is the rise of the loss on a task when one neuron alone is set to 0, and a good score ranks neurons as Δ_forget − Δ_retain does.
# `python figures/make.py --parts importances` runs the whole table: all neurons, all seeds, attention, and the compiled models.

# %%
import sepcap

model = sepcap.load_model()
SCORES = ("abs", "std", "wasserstein", "taylor", "taylor-guarded", "atp", "relp", "snip", "random", "learned")

# %%
found = sepcap.compare_importances(
    model,
    sites=("mlp",),
    scores=SCORES,
    seeds=(0, 1),
    tokens=5_000,
    sample=250,
    effect_tokens=1_500,
    steps=8,
    eval_tokens=3_000,
    choice_tokens=2_000,
    best=1,
    learn_steps=40,
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
columns = ["direction", "score", "passes", "spearman_forget", "spearman_difference", "recall_5", "one_shot_area", "iterative_area"]
found.table[columns].round(2)

# %% [markdown]
# The same on random weights: what correlation does architecture alone give?

# %%
found.tables["control"][["direction", "score", "spearman_difference", "spearman_difference_low", "spearman_difference_high"]].round(2)

# %%
found.figure("effects")

# %% [markdown]
# ## Pruning by the scores
# The best score is chosen on collection texts, and then it, `abs` and the learned order are measured on evaluation texts.

# %%
found.figure("trajectories")

# %%
found.tables["choice"].pivot(index="score", columns="direction", values="area").round(2)

# %% [markdown]
# ## A model whose answer is known
# In a compiled model it is known which program every neuron belongs to. In `sort-and-reverse` both programs run on every input.

# %%
compiled = sepcap.compare_importances(
    compiled="sort-and-reverse",
    sites=("mlp",),
    scores=("abs", "taylor", "atp", "relp", "fisher", "random"),
    seeds=(0, 1),
    tokens=3_000,
    effect_tokens=500,
    steps=8,
    eval_tokens=1_000,
    choice_tokens=1_000,
    best=1,
    control=False,
)
labels = compiled.tables["labels"].query("among == 'used'")
labels.pivot(index="score", columns="direction", values="auroc").round(2)

# %%
for sentence in compiled.summary():
    print(sentence, end="\n\n")
