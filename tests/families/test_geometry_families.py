"""Similarity and traces of dimensions on every family of the table: they are measured, or the error says why not."""

import os

import pytest
import torch
from conftest import words
from family_rows import FAMILIES, save_family

import sepcap
from sepcap.models.blocks.places import head_hooks, place_hooks
from sepcap.statistics.vectors import vectors_at
from sepcap.tasks.labelled import LabelledTexts

pytestmark = pytest.mark.slow  # five families are compared in tests/studies; these are all others

TEXTS = LabelledTexts({name: tuple(words(0, n=3, alphabet=alphabet)) for name, alphabet in (("a", "abcdefgh"), ("1", "0123456789"))})
POSITIONS = (5, 12)
ROWS = {row.name: row for row in FAMILIES}
WORDS = [row for row in FAMILIES if row.layout != "vit"]
NO_SINGLE_MLP = [row for row in WORDS if "mlp" in row.refused or "DeepSeek-V3" in row.name]
NO_HEADS = [row for row in WORDS if "attn_pre_out" in row.refused]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def model(row):
        if row.name not in made:
            made[row.name] = sepcap.load_model(save_family(row, tmp_path_factory.mktemp("family")), device="cpu")
        return made[row.name]

    return model


@pytest.fixture(autouse=True)
def no_flushing(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.mark.parametrize("row", WORDS, ids=lambda row: row.name)
def test_the_stream_adds_up(row, models):
    """What leaves a block is what enters the next, and traces are the same numbers as similarity's vectors."""
    model = models(row)
    rows = TEXTS.rows(model, 14)
    out = vectors_at(model, rows, lambda look: place_hooks(model, "resid_post", [0], look), POSITIONS)[0]
    into = vectors_at(model, rows, lambda look: place_hooks(model, "resid_pre", [1], look), POSITIONS)[0]
    torch.testing.assert_close(out, into)
    values = sepcap.trace_dimensions(model, texts=TEXTS, dims=(0, 31), positions=POSITIONS).tables["values"]
    assert len(values) == 2 * 3 * 6 * 2
    at = torch.from_numpy(values[values["location"] == 1]["value"].to_numpy(copy=True)).view(2, 6, 2).permute(1, 2, 0)
    torch.testing.assert_close(at, out[..., [0, 31]], atol=1e-5, rtol=1e-4)
    compared = sepcap.compare_activations(model, texts=TEXTS, positions=POSITIONS, what="resid_post")
    assert compared.tables["layers"]["p"].between(1 / 10, 1).all()


@pytest.mark.parametrize("row", [row for row in WORDS if row not in NO_HEADS], ids=lambda row: row.name)
def test_heads_and_bias_are_what_attention_adds(row, models):
    model = models(row)
    rows = TEXTS.rows(model, 14)
    whole = vectors_at(model, rows, lambda look: place_hooks(model, "attn_out", [0, 1], look), POSITIONS)
    heads = [vectors_at(model, rows, lambda look, h=h: head_hooks(model, [(0, h), (1, h)], look), POSITIONS) for h in range(4)]
    for layer, block in enumerate(model.blocks):
        bias = getattr(block.attn, "b_O", None)
        torch.testing.assert_close(
            sum(h[layer] for h in heads) + (0 if bias is None else bias.detach()), whole[layer], atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("row", NO_HEADS, ids=lambda row: row.name)
def test_heads_that_cannot_be_told_apart_are_refused(row, models):
    with pytest.raises(NotImplementedError, match="attn_pre_out"):
        sepcap.compare_activations(models(row), texts=TEXTS, positions=POSITIONS, head=0)


@pytest.mark.parametrize("row", NO_SINGLE_MLP, ids=lambda row: row.name)
def test_a_mixture_of_experts_has_no_mlp_out_and_says_what_works(row, models):
    with pytest.raises(NotImplementedError, match=r"'mlp_out' .* layer \d has no mlp\.out\.hook_out\. What works everywhere: 'resid_post'"):
        sepcap.compare_activations(models(row), texts=TEXTS, positions=POSITIONS, what="mlp_out")


def test_layers_without_attention_are_refused(models):
    with pytest.raises(NotImplementedError, match=r"'attn_out' .* layer 0 has no attn"):
        sepcap.compare_activations(models(ROWS["Qwen-3.5 (linear attention)"]), texts=TEXTS, positions=POSITIONS)


@pytest.mark.parametrize("study", ["compare_activations", "trace_dimensions", "find_dimensions", "load_labelled_texts"])
def test_an_image_classifier_is_refused(study, models):
    pytest.importorskip("PIL")
    with pytest.raises(NotImplementedError, match="is an image classifier: there are no texts"):
        getattr(sepcap, study)(models(ROWS["ViT"]))


@pytest.mark.parametrize("name", ["BERT", "RoBERTa"])
def test_rows_of_masked_models_are_closed_and_the_last_position_is_a_word(name, models):
    model = models(ROWS[name])
    rows = TEXTS.rows(model, 14)
    ends = model.tokenizer.eos_token_id if model.tokenizer.sep_token_id is None else model.tokenizer.sep_token_id
    assert (rows[:, -1] == ends).all()
    assert (rows[:, 1:-1] != ends).all()
    found = sepcap.compare_activations(model, texts=TEXTS)
    assert max(found.config["positions"]) == 30
    with pytest.raises(ValueError, match="from 0 to 30"):
        sepcap.compare_activations(model, texts=TEXTS, positions=(31,))


@pytest.mark.parametrize(
    ("name", "norm", "says"),
    [
        ("Gemma-2", "output", "outputs, before the norm that follows it"),
        ("OLMo-2 (post-norm)", "output", "outputs, before the norm that follows it"),
        ("OPT-350m (post-norm)", "sum", "adds, before the norm of the sum"),
        ("BERT", "sum", "adds, before the norm of the sum"),
        ("GPT-2", None, "adds"),
    ],
)
def test_what_stands_behind_an_output_is_said_and_true(name, norm, says, models):
    """The sum of stream and outputs is what leaves the block only where no norm is in between."""
    model = models(ROWS[name])
    found = sepcap.compare_activations(model, texts=TEXTS, positions=POSITIONS)
    assert found.config["norm"] == norm
    assert found.summary()[0].startswith(f"What attention {says}, without the residual stream: cosine")
    of_head = sepcap.compare_activations(model, texts=TEXTS, positions=POSITIONS, head=1)
    assert of_head.summary()[0].startswith(f"What head 1 of every layer {says}: cosine")
    assert sepcap.compare_activations(model, texts=TEXTS, positions=POSITIONS, what="resid_post").config["norm"] is None
    rows = TEXTS.rows(model, 14)
    seen = {
        place: vectors_at(model, rows, lambda look, p=place: place_hooks(model, p, [0], look), POSITIONS)[0]
        for place in ("resid_pre", "attn_out", "mlp_out", "resid_post")
    }
    adds_up = torch.allclose(seen["resid_pre"] + seen["attn_out"] + seen["mlp_out"], seen["resid_post"], atol=1e-4, rtol=1e-3)
    assert adds_up == (norm is None)
