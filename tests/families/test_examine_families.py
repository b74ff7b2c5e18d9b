"""Profiles of neurons in every family: what works, and what is refused in one sentence."""

import numpy as np
import pytest
import torch
from family_checks import load, tasks_of
from family_rows import FAMILIES, SITES, save_family

import sepcap
from sepcap.models.forward import call, with_hooks
from sepcap.models.kinds import inner, is_hooked_transformer, kind_of
from sepcap.models.linearised import linearised
from sepcap.models.sites import bind

EVERY_DAY = {"OPT-350m (post-norm)", "GPT-2", "Mistral", "Gemma-2", "BERT", "ViT"}

ROWS = [
    pytest.param(row, sites, id=row.name, marks=[] if row.name in EVERY_DAY else [pytest.mark.slow])
    for row in FAMILIES
    if not row.missing() and (sites := tuple(s for s in SITES if not row.refusal("sites", s)))
]

WITHOUT_LOGITS = {"OPT-350m (post-norm)": "norms the sum", "BERT": "has a layer of its own", "RoBERTa": "has a layer of its own"}

WITHOUT_RULES = {"Qwen-3.5 (linear attention)"}
"""Families with a sigmoid, for which the linearised pass that checks the direct effect has no rule."""


@pytest.mark.thorough
@pytest.mark.parametrize(("row", "sites"), ROWS)
def test_profiles_of_every_site(row, sites, tmp_path):
    if row.layout == "vit":
        pytest.importorskip("PIL")
    model = load(save_family(row, tmp_path))
    tasks = tasks_of(model)
    how = {"tasks": tasks, "tokens": 150, "k": 3, "window": 8, "progress": False, "min_count": 2}
    if kind_of(model) == "images":
        with pytest.raises(NotImplementedError, match=r"takes images, and profiles are of tokens; what works for it: sepcap\.collect"):
            sepcap.examine(model, [(0, 1)], **how)
        return
    for site in sites:
        shape = bind(model, site).shape
        places = [tuple(0 for _ in shape), tuple(n - 1 for n in shape)]
        found = sepcap.examine(model, places, site=site, **how)
        active = float(found.table.loc[1, ["abs_forget", "abs_retain"]].sum()) > 0  # after a ReLU a random neuron may never be
        assert len(found.contexts(1).query("group == 'strongest'")) >= 2 or not active
        notes = " ".join(found.tables["notes"]["note"])
        sources = found.tensors["forget/top/source"]
        there = bool((sources >= 0).all())
        assert there or bool((sources < 0).all())
        assert ("no source tokens" in notes) == (site == "attn_pre_out" and not there)
        assert there == (site == "attn_pre_out") or row.name not in EVERY_DAY
        if row.name in WITHOUT_LOGITS:
            assert WITHOUT_LOGITS[row.name] in notes
            assert "promoted/token" not in found.tensors
        else:
            assert "logit" not in notes, notes
            assert found.tokens(1).query("list == 'promoted'")["value"].is_monotonic_decreasing
    if "attn_pre_out" in sites:
        heads = sepcap.examine(model, [(0, 1)], site="attn_pre_out", whole_heads=True, **how)
        assert float(heads.table["abs_forget"][0]) > 0
    if "mlp" in sites and row.name not in {*WITHOUT_LOGITS, *WITHOUT_RULES} and not is_hooked_transformer(model):
        check_gradients(model, sepcap.examine(model, [(1, 5)], listed=4, **how))


def check_gradients(model, found):
    """Gradients of logits with the scales of all norms held constant are proportional to the direct effects."""
    ids = torch.tensor([[0, 5, 9, 30, 12, 7]])
    kept = {}

    def leaf(z, hook):
        kept["z"] = z.detach().requires_grad_()
        return kept["z"]

    with torch.enable_grad(), linearised(model) as rules, with_hooks(model, [("blocks.1.mlp.hook_post", leaf)]):
        with rules:
            logits = call(model, ids)[0, -1]
        rows = found.tokens(0)
        rows = rows[rows["list"].isin(["promoted", "suppressed"])]
        slopes = [torch.autograd.grad(logits[i], kept["z"], retain_graph=True)[0][0, -1, 5] for i in rows["token"].tolist()]
    slopes = torch.stack(slopes).double()
    cap = getattr(inner(model).config, "final_logit_softcapping", None)
    if cap:  # it is propagated as its value over its input
        capped = logits[torch.tensor(rows["token"].tolist())].detach().double()
        slopes = slopes * cap * torch.atanh(capped / cap) / capped
    scale = float(slopes[0]) / rows["value"].iloc[0]
    assert scale > 0
    np.testing.assert_allclose(slopes.numpy(), scale * rows["value"].to_numpy(), rtol=2e-3, atol=1e-4 * float(slopes.abs().max()))
