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
# # Can the pruned capability be recovered?
#
# Half of the mlp neurons of the embedded model are pruned, those with the highest score on code against prose, and 0.14 [0.11, 0.17] of the
# accuracy on code is left (as many random neurons: 0.34 [0.32, 0.38]; about 16 documents per task). That the accuracy fell does not show
# that the capability is gone. A certificate asks four further questions: does it come back after a few thousand tokens of fine-tuning, when
# the weights are rounded, or with examples in the context, and what does the residual stream still contain?
#
# Each question is also asked of the untouched model, of the model without as many random neurons, and of the model without random neurons
# that do equal damage. The budget here is small: few texts, one seed, one learning rate. The defaults of `certify` are larger.

# %%
import sepcap

model = sepcap.load_model()
forget, retain = (sepcap.collect(model, task, tokens=10_000) for task in ("local-code", "local-prose"))
neurons = sepcap.score(forget, retain).top({"mlp": 0.5})
certificate = sepcap.certify(
    model,
    neurons=neurons,
    forget="local-code",
    retain="local-prose",
    seeds=(0,),
    variants=("all", "retain"),
    lrs=(3e-4,),
    checkpoints=(2_000, 5_000, 10_000),
    tokens=15_000,
    eval_tokens=4_000,
    targets=(0.5, 0.7, 0.9),
    shots=(1, 4),
    probe_tokens=800,
)
for sentence in certificate.summary():
    print(sentence, end="\n\n")

# %% [markdown]
# ## Relearning
# Accuracy on code, relative to that of the untouched model, while the models are fine-tuned. The question is not whether it comes back: a
# model with enough texts learns any task. It is whether the pruned model needs more tokens than one with random damage of equal effect.

# %%
certificate.figure()

# %%
columns = ["kind", "target", "tokens", "tokens_low", "tokens_high", "ratio_matched"]
certificate.tables["targets"].query("variant == 'all'")[columns].round(2)

# %% [markdown]
# The neurons that were pruned stay at zero in fine-tuning: a neuron whose input and output weights are both zero has no gradient. So what
# comes back comes by other weights. Do other neurons now score as the pruned ones did? Here no layer has more of them than before
# fine-tuning.

# %%
certificate.figure("layers")

# %% [markdown]
# ## Rounded weights, examples, other formats

# %%
certificate.figure("before-after")

# %% [markdown]
# ## Accuracy of logit lens and linear probes, by layer
# The logit lens reads the residual stream after every block with the final norm and the unembedding. Two linear probes are fitted to it:
# which of the two tasks a text belongs to, and which of 20 frequent tokens comes next. The dotted line is a probe for random labels.

# %%
certificate.figure("profile")

# %% [markdown]
# ## The answer
# Not shown to be gone or hidden. After 10,166 tokens of fine-tuning 0.37 [0.32, 0.42] of the accuracy on code is back, after random
# pruning of equal effect 0.38 [0.35, 0.42]; neither regains half, so that no number of tokens can be compared. One seed. A run with three
# seeds and 80,000 tokens is in [figures](../figures/README.md#is-it-gone).
