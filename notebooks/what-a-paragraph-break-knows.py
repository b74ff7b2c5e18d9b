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
# # What does a paragraph break know about the next paragraph?
#
# The activations at the break ("\n\n") after 128 tokens of context are put into the same break that stands alone. If the break knows what
# comes next, the true next paragraph becomes more likely. Three comparisons decide what a change means: the whole context (all there is to
# gain), the break of *another* text of the same kind (what any break would bring), and a model with random weights.

# %%
import dataclasses

import pandas as pd
from IPython.display import Markdown
from scipy.stats import ttest_1samp

import sepcap

model = sepcap.load_model()
KINDS = ["local-prose", "local-python", "local-cpp"]
drawn = sepcap.draw_passages(model.tokenizer, KINDS, 32, context=128, following=48)
searched, texts = drawn[::4], [text for i, text in enumerate(drawn) if i % 4]  # 8 and 24 of every kind


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
# Prose, Python and C++ of the evaluation part, which the model was not trained on. Intervals are 95%, paired over texts.

# %%
every = sepcap.transfer(model, texts, generate=False)
for sentence in every.summary():
    print(sentence)

# %% [markdown]
# ## At which layers?

# %%
every.figure("layers")

# %% [markdown]
# The first two layers do harm, and the break of another text does as much of it. So it is nothing about the text.

# %%
every.figure("positions")

# %% [markdown]
# ## From which layer on?
# The layers that are patched from here on are chosen on texts of their own, a quarter of those that were drawn: the first layer from
# which on a break gains most over another text's break. All that follows is measured on the other three quarters.

# %%
LAYERS = range(model.cfg.n_layers)
gains = {}
for first in LAYERS:
    found = sepcap.transfer(model, searched, layers=tuple(LAYERS[first:]), generate=False, profile="none")
    gains[first] = found.difference("nats", "transferred", "mismatched")["difference"]
LATER = tuple(LAYERS[max(gains, key=gains.get) :])
print(LATER)
pd.Series(gains, name="own − another's, nats per token").rename_axis("first layer").round(4)

# %% [markdown]
# ## Is the harm the position?
# This model has learned positions: the early layers say where in the text a token stands, and a break from position 129 is put at
# position 1. Then the harm must go away with short contexts, and without the first layers.

# %%
rows = []
for context in (8, 128):
    shorter = [dataclasses.replace(p, context=p.context[-context:]) for p in texts]
    for layers in ("all", LATER):
        found = sepcap.transfer(model, shorter, layers=layers, generate=False, profile="none")
        said = {"context tokens": context, "layers": str(layers), "whole context": row(found, "original")}
        said |= {"own break": row(found, "transferred"), "another's": row(found, "mismatched")}
        rows.append(said | {"own − another's": row(found, "transferred", "mismatched")})
later = found
pd.DataFrame(rows)

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
untrained = sepcap.transfer(sepcap.load_model(random_weights=True), texts, layers=LATER, generate=False, profile="none")
pd.DataFrame(
    {name: {"own break": row(r, "transferred"), "own − another's": row(r, "transferred", "mismatched"), "whole context": row(r, "original")}
     for name, r in {"trained": later, "random weights": untrained}.items()}
)

# %% [markdown]
# ## What the model writes
# Sixty tokens at temperature 0.3 after each prompt. Tokens that were given away count nowhere: not in what was written, and not in what
# it is compared with: the medians with tokens given are held against less of the paragraph than the others, and do not compare with them;
# the differences below have the same rest on both sides. Distances are those of TF-IDF vectors, which see shared words alone; with
# sentence embeddings (`embedder="all-mpnet-base-v2"`) they would be comparable with the published ones.

# %%
some = [p for kind in KINDS for p in [p for p in texts if p.kind == kind][:10]]
options = {"layers": LATER, "tokens": 60, "given": (0, 5, 20), "profile": "none", "embedder": "tf-idf"}
written = sepcap.transfer(model, some, **options)
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
share = later.difference("nats", "transferred")
part = f"{share['share']:.0%} [{share['share_low']:.0%}, {share['share_high']:.0%}] of" if share["share"] > 0 else "beside"
alone = every.tables["layers"].query("kind == 'all' and part == 'alone' and donor == 'difference'")
sure = alone[alone["low"] > 0]
best = (alone if sure.empty else sure).sort_values("gain").iloc[-1]
Markdown(
    f"""In this small model a break knows how the next paragraph **begins**, and little more. Patched from layer {LATER[0]} on (chosen on
other texts), it makes the true paragraph more likely by {row(later, "transferred")} nats per token, {part} what the whole context gives
({row(later, "original")}).
Another text's break brings {row(later, "mismatched")}, so that {row(later, "transferred", "mismatched")} is about this very text.

Where in the paragraph, in nats per token over the break alone:

| token | own break | another's | own − another's |
| --- | --- | --- | --- |
| 1 | {" | ".join(places[1, 1])} |
| 2 to 48 | {" | ".join(places[2, 48])} |

Single layers that carry something about the text (own minus another's, interval above 0, not corrected for {len(alone)} layers):
{", ".join(map(str, sure["layer"])) or "none"}. Of these, or of all where there are none, layer
{best["layer"]} carries most:
{best["gain"]:+.3f} [{best["low"]:+.3f}, {best["high"]:+.3f}].

The first two layers carry the position instead: all layers patched, the same break costs {row(every, "transferred")}, another's
{row(every, "mismatched")}. With random weights the own break brings {row(untrained, "transferred", "mismatched")} more than another's.

What the model then writes, mean TF-IDF distance to the true paragraph: own break minus the break alone
{row(written, "transferred", metric="distance")}, another text's break minus the break alone
{row(written, "mismatched", metric="distance")}, own minus another's
{row(written, "transferred", "mismatched", "distance")}. It sees shared words alone, a coarse
measure; the likelihoods above are the firmer ground."""
)
