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
# # What do activations at a paragraph break encode about the next paragraph?
#
# The activations at the break ("\n\n") after 128 tokens of context are patched into the same break alone. If they encode the next
# paragraph, the true one becomes more likely. A change is compared with three others: that of the whole context (the largest possible
# gain), of the break of *another* text of the same kind (the gain from any break), and of a model with random weights.

# %%
import dataclasses

import pandas as pd
from IPython.display import Markdown
from scipy.stats import ttest_1samp

import sepcap

model = sepcap.load_model()
KINDS = ["local-prose", "local-python", "local-cpp"]
drawn = sepcap.sample_passages(model.tokenizer, KINDS, 32, context=128, following=48)
searched, texts = drawn[::4], [text for i, text in enumerate(drawn) if i % 4]  # 8 and 24 of each kind


def row(result, condition, against="neutral", metric="nats", kind="all"):
    found = result.difference(metric, condition, against, kind)
    return f"{found['difference']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def at_tokens(result, first, last, condition, against):
    """Mean gain over tokens first to last of the paragraph, counted from 1, with its 95% interval (Student's t over texts)."""
    nats = dict(zip(result.config["conditions"], result.tensors["log_likelihood"].numpy(), strict=True))
    gains = (nats[condition] - nats[against])[:, first - 1 : last].mean(axis=1)
    low, high = ttest_1samp(gains, 0).confidence_interval()
    return f"{gains.mean():+.3f} [{low:+.3f}, {high:+.3f}]"


# %% [markdown]
# ## All layers
# Prose, Python and C++ of the evaluation part, on which the model was not trained. Intervals are 95%, paired over texts.

# %%
every = sepcap.transfer_paragraphs(model, texts=texts, generate=False)
for sentence in every.summary():
    print(sentence)

# %% [markdown]
# ## At which layers?

# %%
every.figure("layers")

# %% [markdown]
# With the first layers patched the paragraph becomes less likely, with another text's break nearly as much: own minus another's is 0.040
# [0.003, 0.076] of 1.6 nats.

# %%
every.figure("positions")

# %% [markdown]
# ## From which layer on?
# The layers patched below are all layers from a first one on. The first one is chosen on a separate quarter of the texts, as the one with
# the largest gain of the true paragraph over the break alone. All following results are measured on the other three quarters.

# %%
LAYERS = range(model.cfg.n_layers)
gains = {}
for first in LAYERS:
    found = sepcap.transfer_paragraphs(model, texts=searched, layers=tuple(LAYERS[first:]), generate=False, profile="none")
    gains[first] = found.difference("nats", "transferred")["difference"]
LATER = tuple(LAYERS[max(gains, key=gains.get) :])
print(LATER)
pd.Series(gains, name="own break − break alone, nats per token").rename_axis("first layer").round(4)

# %% [markdown]
# ## Is the position the cause?
# This model has learned positions: the early layers encode the position of a token, and a break from position 129 is patched at
# position 1. If this is the cause, the loss must disappear with short contexts, and without the first layers.

# %%
rows = []
for context in (8, 128):
    shorter = [dataclasses.replace(p, context=p.context[-context:]) for p in texts]
    for layers in ("all", LATER):
        found = sepcap.transfer_paragraphs(model, texts=shorter, layers=layers, generate=False, profile="none")
        said = {"context tokens": context, "layers": str(layers), "whole context": row(found, "original")}
        said |= {"own break": row(found, "transferred"), "another's": row(found, "mismatched")}
        rows.append(said | {"own − another's": row(found, "transferred", "mismatched")})
later = found
pd.DataFrame(rows)

# %% [markdown]
# The loss is gone in both, as it would be if the position were the cause; shorter contexts and later layers differ in more than that.

# %% [markdown]
# ## Where in the paragraph, and for which kind of text?

# %%
later.figure("positions")

# %%
columns = ["kind", "condition", "against", "difference", "low", "high", "share"]
table = later.tables["differences"]
table[table["condition"] == "transferred"][columns].round(3)

# %% [markdown]
# ## The control: random weights

# %%
random = sepcap.load_model(random_weights=True)
untrained = sepcap.transfer_paragraphs(random, texts=texts, layers=LATER, generate=False, profile="none")
pd.DataFrame(
    {name: {"own break": row(r, "transferred"), "own − another's": row(r, "transferred", "mismatched"), "whole context": row(r, "original")}
     for name, r in {"trained": later, "random weights": untrained}.items()}
)

# %% [markdown]
# ## Generated text
# Sixty tokens are generated at temperature 0.3 after each prompt. Given tokens of the paragraph count nowhere: neither in the generated
# text nor in the text it is compared with. Medians with given tokens are therefore against less of the paragraph than the others, and not
# comparable with them; the differences below use the same rest on both sides. Distances are between TF-IDF vectors, which depend on
# shared words only; with sentence embeddings (`embedder="all-mpnet-base-v2"`) they would be comparable with the published ones.

# %%
some = [p for kind in KINDS for p in [p for p in texts if p.kind == kind][:10]]
options = {"layers": LATER, "tokens": 60, "given": (0, 5, 20), "profile": "none", "embedder": "tf-idf"}
written = sepcap.transfer_paragraphs(model, texts=some, **options)
written.figure("distances")

# %%
table = written.tables["differences"]
table[(table["kind"] == "all") & (table["metric"] != "nats")].drop(columns=["kind", "texts", "share", "share_low", "share_high"]).round(3)

# %%
shown = written.tables["generations"]
shown[(shown["text"] == 0) & shown["condition"].isin(["original", "transferred", "mismatched", "neutral"])][["condition", "written"]]

# %% [markdown]
# ## The answer

# %%
COUNTED = [(1, 1), (2, 48)]
PAIRS = [("transferred", "neutral"), ("mismatched", "neutral"), ("transferred", "mismatched")]
places = {span: [at_tokens(later, *span, *pair) for pair in PAIRS] for span in COUNTED}
specific = later.difference("nats", "transferred", "mismatched")
verdict = {
    True: "The break carries information that is specific to its text",
    False: "Nothing specific to the text is shown",
}[bool(specific["low"] > 0)]
chosen = every.tables["chosen_layers"].query("part == 'alone'").iloc[0]
Markdown(
    f"""{verdict}: with the break's activations in layers {LATER[0]} to {LATER[-1]} (chosen on other texts), the
log-likelihood of the true paragraph changes by {row(later, "transferred")} nats per token relative to the
break alone; the whole context gives {row(later, "original")}.
The break of another text changes it by {row(later, "mismatched")}. The difference between the two, which is specific to the text, is
{row(later, "transferred", "mismatched")}, measured on {len(texts)} texts.

By token of the paragraph, in nats per token relative to the break alone:

| token | own break | another's | own − another's |
| --- | --- | --- | --- |
| 1 | {" | ".join(places[1, 1])} |
| 2 to 48 | {" | ".join(places[2, 48])} |

Single layers: the layer with the largest difference between own and another's break on one half of the texts is layer
{chosen["layer"]:.0f}; on the other half its difference is {chosen["gain"]:+.3f} [{chosen["low"]:+.3f}, {chosen["high"]:+.3f}].

With all layers patched, the own break changes the log-likelihood by {row(every, "transferred")}, another's by
{row(every, "mismatched")}. With random weights the difference between own and another's break is
{row(untrained, "transferred", "mismatched")}.

Texts generated from {len(some)} of them, mean TF-IDF distance to the true paragraph: own break minus the break alone
{row(written, "transferred", metric="distance")}, another text's break minus the break alone
{row(written, "mismatched", metric="distance")}, own minus another's
{row(written, "transferred", "mismatched", "distance")}. TF-IDF measures shared words only."""
)
