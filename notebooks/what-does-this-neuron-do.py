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
# # What does this neuron do?
#
# A score says that a neuron is more active on code than on prose. What is it? Ten mlp neurons of the embedded model are found by their
# score: five that code needs most relative to prose, and five the other way round. Each is described from the collection texts, and every
# description is checked on texts that were not used for it.

# %%
import numpy as np
import pandas as pd
import torch

import sepcap

model = sepcap.load_model(device="cpu")
TASKS = ("local-code", "local-prose")
forget, retain = (sepcap.collect(model, task, tokens=20_000, sites="mlp") for task in TASKS)
scores = sepcap.score(forget, retain)
of_code = scores.top({"mlp": 5})
of_prose = sepcap.score(retain, forget).top({"mlp": 5})
neurons = of_code | of_prose

# %% [markdown]
# ## Profiles
# One pass per task. The table has the tokens at which each neuron is most active relative to all positions, and the tokens whose logits it
# raises and lowers directly.

# %%
profiles = sepcap.examine(model, neurons, tasks=TASKS, scores=scores, tokens=20_000, samples=1, progress=False)
profiles

# %%
shown = ["layer", "neuron", "score", "abs_forget", "abs_retain", "preferred_forget", "preferred_retain", "promoted", "suppressed"]
profiles.table[shown].round(3)

# %%
profiles.figure(0)

# %% [markdown]
# The strongest contexts of every neuron, two per task. `profiles.report("neurons.html")` writes all of them to one page, and
# `profiles.explore(model)` shows them here, with a click that ablates the neuron.

# %%
top = profiles.tables["contexts"].query("group == 'strongest' and rank <= 2")
for unit, rows in top.groupby("unit"):
    print(f"\n{profiles.table.loc[unit, 'layer']}.{profiles.table.loc[unit, 'neuron']}")
    for row in rows.to_dict("records"):
        print(f"  {row['task']:7s} {row['activation']:5.2f}  {row['before'][-60:]!r} [{row['token']!r}] {row['after'][:12]!r}")

# %% [markdown]
# ## Claims
# A profile makes three claims about a neuron:
#
# 1. It is more active at its preferred tokens than elsewhere.
# 2. Where it is active, it raises the tokens that it promotes relative to those that it suppresses: without it, they fall. The direct
#    effect ignores later layers, so this can fail.
# 3. The model needs it on the task on which it is more active, and not on the other.
#
# Held-out texts for the first two: the beginnings of 40 evaluation documents per task.

# %%
rows = {}
for role, task in zip(("forget", "retain"), TASKS, strict=True):
    sources = sepcap.load_task(task).sources
    texts = [text for source in sources for text in source.documents("evaluate").select(range(40 // len(sources)))["text"]]
    ids = [model.tokenizer(text[:2_000], add_special_tokens=False)["input_ids"][:127] for text in texts]
    rows[role] = torch.tensor([[model.tokenizer.bos_token_id, *row] for row in ids if len(row) == 127])
{role: tuple(ids.shape) for role, ids in rows.items()}

# %%
BOOTSTRAP = np.random.default_rng(0)


def with_interval(per_document):
    """Mean over documents with a 95% bootstrap interval."""
    values = np.asarray(per_document)
    means = values[BOOTSTRAP.integers(len(values), size=(1_000, len(values)))].mean(1)
    return f"{values.mean():+.2f} [{np.quantile(means, 0.025):+.2f}, {np.quantile(means, 0.975):+.2f}]"


def listed(unit, name, task=""):
    tokens = profiles.tables["tokens"].query("unit == @unit and list == @name and task == @task")["token"]
    return torch.tensor(tokens.tolist(), dtype=torch.long)


@torch.no_grad()
def checked(unit):
    layer, neuron = (int(profiles.table.loc[unit, name]) for name in ("layer", "neuron"))
    role = "forget" if profiles.table.loc[unit, "abs_forget"] > profiles.table.loc[unit, "abs_retain"] else "retain"
    ids, z = rows[role], []
    hook = (f"blocks.{layer}.mlp.hook_post", lambda x, hook: z.append(x[:, 1:, neuron].clone()))
    before = model.run_with_hooks(ids, return_type="logits", fwd_hooks=[hook])[:, 1:]
    with sepcap.ablate(model, profiles.neurons(unit, model=model)):
        change = before - model(ids, return_type="logits")[:, 1:]
    z, ids = z[0].abs(), ids[:, 1:]
    there = torch.isin(ids, listed(unit, "preferred", role))
    more = [float(a[t].mean() - a[~t].mean()) for a, t in zip(z, there, strict=True) if t.any()]
    active = z > z.flatten().quantile(0.95)
    effect = change[..., listed(unit, "promoted")].mean(-1) - change[..., listed(unit, "suppressed")].mean(-1)
    logits = [float(e[a].mean()) for e, a in zip(effect, active, strict=True) if a.any()]
    return {
        "neuron": f"{layer}.{neuron}",
        "more active on": TASKS[0] if role == "forget" else TASKS[1],
        "1: |z| at preferred − elsewhere": with_interval(more),
        "2: logits promoted − suppressed": with_interval(logits),
        "documents": len(logits),
    }


claims = pd.DataFrame([checked(unit) for unit in profiles.table.index])
claims

# %% [markdown]
# The third claim: every neuron ablated alone, on 4,000 held-out predictions per task. Changes of the cross-entropy in millinats, with
# paired 95% intervals over documents.

# %%
alone = sepcap.ablate_each(
    model, neurons=neurons, forget=TASKS[0], retain=TASKS[1], tokens=4_000, reference_tokens=4_000, progress=False
).table
for role, task in zip(("forget", "retain"), TASKS, strict=True):
    value, low, high = (1_000 * alone[f"delta_loss_{role}{end}"] for end in ("", "_low", "_high"))
    alone[f"3: {task}"] = [f"{v:+.2f} [{a:+.2f}, {b:+.2f}]" for v, a, b in zip(value, low, high, strict=True)]
alone["neuron"] = alone["layer"].astype(str) + "." + alone["neuron"].astype(str)
result = claims.merge(alone[["neuron", *(f"3: {task}" for task in TASKS)]], on="neuron")
result

# %% [markdown]
# How many of the ten claims of each kind hold, in the sense that their interval lies on the side that the profile says:


# %%
def above(text):
    return float(text.split("[")[1].split(",")[0]) > 0


own = [row[f"3: {row['more active on']}"] for row in result.to_dict("records")]
other = [row[f"3: {TASKS[1 - TASKS.index(row['more active on'])]}"] for row in result.to_dict("records")]
pd.Series(
    {
        "1: more active at its preferred tokens": result["1: |z| at preferred − elsewhere"].map(above).sum(),
        "2: raises what it promotes": result["2: logits promoted − suppressed"].map(above).sum(),
        "3: needed on its own task": sum(map(above, own)),
        "3: not needed on the other": sum(not above(text) for text in other),
    },
    name="of 10",
)
