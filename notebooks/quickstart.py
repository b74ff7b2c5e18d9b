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
# # Quickstart: does this model use separate neurons for code?
#
# Load a model, collect statistics of its neurons on code and on prose, plot the scores, prune the neurons with the highest importance on
# code relative to prose, and measure the accuracy that remains. Everything here runs on the embedded model, without a network.

# %%
import tempfile

import sepcap

model = sepcap.load_model()
model.cfg.n_layers, model.cfg.d_model

# %% [markdown]
# ## Collect
# One forward pass per task. Activations are reduced to sums inside the hooks, so memory does not grow with the number of tokens.

# %%
forget = sepcap.collect(model, "local-code", tokens=20_000)
retain = sepcap.collect(model, "local-prose", tokens=20_000)
forget

# %%
forget["mlp"].abs.shape, forget["attn_pre_out"].rms.shape

# %% [markdown]
# ## Score and plot
# The score of a neuron is its importance on code over its importance on prose; the highest scores are selected first.

# %%
scores = sepcap.score(forget, retain, importance="abs")
scores.figure(site="mlp")

# %%
neurons = scores.top({"mlp": 0.2})
neurons

# %% [markdown]
# ## Ablate
# Within the `with` block the neurons are set to their mean on prose; afterwards the model is unchanged.

# %%
before = sepcap.evaluate(model, "local-code", tokens=10_000)
with sepcap.ablate(model, neurons, "mean", reference=retain):
    ablated = sepcap.evaluate(model, "local-code", tokens=10_000)
before, ablated

# %% [markdown]
# ## Prune, step by step
# A run is stored in a folder: after an interruption the same call resumes it. The random run is the baseline.

# %%
folder = tempfile.mkdtemp()
config = sepcap.PruningConfig(fractions={"mlp": 0.125}, steps=8, tokens=10_000, eval_tokens=10_000)
run = sepcap.prune(model, config, out=f"{folder}/code")
run

# %%
random_config = sepcap.PruningConfig(fractions={"mlp": 0.125}, steps=8, tokens=10_000, eval_tokens=10_000, importance="random")
random = sepcap.prune(model, random_config, out=f"{folder}/random")

# %% [markdown]
# ## Measure
# An area of 1 means that code and prose are lost together, 2 that prose is retained until all of code is lost.

# %%
run.separability("top1", baseline=random)

# %%
run.separability("top1").retain_cost(50)

# %%
sepcap.plots.trajectory({"selective": run, "random": random})

# %% [markdown]
# The pruned model of a step has all neurons deleted that were pruned up to it. It can be saved as a plain Hugging Face checkpoint:

# %%
sepcap.delete(model, run.neurons(3))
sepcap.save_pretrained(model, f"{folder}/without-code")
sepcap.evaluate(model, "local-code", tokens=10_000), sepcap.evaluate(model, "local-prose", tokens=10_000)

# %% [markdown]
# One seed of random neurons, drawn over the whole model, and about 45 documents per task: an illustration of the calls, not a
# result. The demo of the [README](../README.md) has five seeds, matched per layer.
