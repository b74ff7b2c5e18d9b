"""Similarity of texts: matrices by hand, gaps that were planted, and the numbers of the plain model."""

import numpy as np
import pytest
import torch
from conftest import CONTEXT, words
from plain import LAYOUTS, Plain
from tiny import fresh

import sepcap
from sepcap.models.forward import logits_of
from sepcap.studies.catalog import load_result
from sepcap.studies.similarity.study import gaps, similarities, text_similarities
from sepcap.tasks.labelled import LabelledTexts
from sepcap.tasks.load import load_task

ALPHABETS = {"letters": "abcdefgh", "digits": "0123456789", "xyz": "xyz"}
TEXTS = LabelledTexts({name: tuple(words(0, n=3, alphabet=alphabet)) for name, alphabet in ALPHABETS.items()})
POSITIONS = (5, 9, 20)


def test_cosines_and_scaled_cosines_by_hand():
    vectors = torch.tensor([[3.0, 4.0], [4.0, 3.0], [0.0, 10.0], [0.0, 0.0]])
    cosines = [[1, 0.96, 0.8, 0], [0.96, 1, 0.6, 0], [0.8, 0.6, 1, 0], [0, 0, 0, 0]]
    scaled = [[0.25, 0.24, 0.4, 0], [0.24, 0.25, 0.3, 0], [0.4, 0.3, 1, 0], [0, 0, 0, 0]]
    torch.testing.assert_close(similarities(vectors), torch.tensor(cosines, dtype=torch.float64))
    torch.testing.assert_close(similarities(vectors, scaled=True), torch.tensor(scaled, dtype=torch.float64))


def test_what_changes_neither_and_what_changes_lengths_only():
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(12, 8, generator=generator, dtype=torch.float64)
    lengths = torch.rand(12, 1, generator=generator, dtype=torch.float64) + 0.1
    turn = torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=torch.float64))[0]
    for scaled in (False, True):
        torch.testing.assert_close(similarities(vectors @ turn, scaled), similarities(vectors, scaled))
        torch.testing.assert_close(similarities(vectors * 7, scaled), similarities(vectors, scaled))
    torch.testing.assert_close(similarities(vectors * lengths), similarities(vectors))
    assert (similarities(vectors * lengths, True) - similarities(vectors, True)).abs().max() > 0.1
    norms = vectors.norm(dim=1)
    torch.testing.assert_close(similarities(vectors, True).diagonal(), (norms / norms.max()) ** 2)


def test_texts_are_compared_by_all_pairs_of_positions_and_a_position_is_not_compared_with_itself():
    matrix = torch.tensor([[1.0, 0.2, 0.1, 0.3], [0.2, 1.0, 0.5, 0.7], [0.1, 0.5, 1.0, 0.6], [0.3, 0.7, 0.6, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(text_similarities(matrix[None], 2)[0], torch.tensor([[0.2, 0.4], [0.4, 0.6]], dtype=torch.float64))
    one_position = text_similarities(matrix[None], 4)[0]
    assert one_position.diagonal().isnan().all()
    torch.testing.assert_close(one_position[0, 1:], matrix[0, 1:])


def test_a_gap_is_the_mean_over_pairs_of_texts():
    rng = np.random.default_rng(0)
    matrix = rng.normal(size=(2, 7, 7))
    matrix += matrix.transpose(0, 2, 1)
    labels = np.array([0, 0, 1, 1, 1, 2, 2])
    for given in (labels, rng.permutation(labels)):
        pairs = {True: [], False: []}
        for i in range(7):
            for j in range(i):
                pairs[bool(given[i] == given[j])].append(matrix[:, i, j])
        np.testing.assert_allclose(gaps(matrix, given[None])[0], np.mean(pairs[True], axis=0) - np.mean(pairs[False], axis=0))


def planted(labels, within, between, d_model, lengths=None):
    """Unit vectors, one per text, with exactly these cosines within and between categories."""
    vectors = torch.zeros(len(labels), d_model)
    for text, category in enumerate(labels):
        vectors[text, 0] = between**0.5
        vectors[text, 1 + category] = (within - between) ** 0.5
        vectors[text, 1 + len(set(labels.tolist())) + text] = (1 - within) ** 0.5
    return vectors if lengths is None else vectors * lengths[:, None]


def test_a_planted_gap_is_found_exactly_and_no_relabelling_reaches_it(tiny_opt):
    vectors = planted(TEXTS.labels, 0.7, 0.2, 32)
    noise = torch.randn(9, CONTEXT, 32, generator=torch.Generator().manual_seed(1))
    hooks = [
        ("blocks.0.hook_out", lambda out, hook: noise[:, : out.shape[1]]),
        ("blocks.1.hook_out", lambda out, hook: vectors[:, None].expand_as(out)),
    ]
    with tiny_opt.hooks(fwd_hooks=hooks):
        found = sepcap.compare_activations(tiny_opt, texts=TEXTS, positions=POSITIONS, what="resid_post")
    noisy, row = found.tables["layers"].to_dict("records")
    for name, value in {"within": 0.7, "between": 0.2, "within_text": 1, "gap": 0.5, "low": 0.5, "high": 0.5, "p": 1 / 280}.items():
        assert row[name] == pytest.approx(value, abs=1e-6), name
    assert row["p_uncorrected"] == pytest.approx(1 / 280)
    assert noisy["p"] > 0.05
    assert noisy["low"] < 0 < noisy["high"]
    assert row["critical"] < row["gap"]
    assert noisy["gap"] < noisy["critical"]
    of_pairs = found.tables["pairs"].query("layer == 1").set_index(["first", "second"])["similarity"]
    assert of_pairs["letters", "letters"] == pytest.approx(0.7)
    assert of_pairs["letters", "xyz"] == pytest.approx(0.2)
    assert len(of_pairs) == 6
    summary = found.summary()
    assert "largest in layer 1: 0.500 (within 0.700, between 0.200)" in summary[1]
    assert "1 of 2" in summary[2]
    assert "all 280 relabellings" in summary[2]


def test_one_layer_and_one_position_are_not_several(tiny_opt):
    told = sepcap.compare_activations(tiny_opt, texts=TEXTS, positions=(5,), layer=1, head=2).summary()
    assert "at position 5 of 9 texts" in told[0]
    assert told[1].endswith("of this one layer.")
    assert "(p ≤ 0.05):" in told[2]
    told = sepcap.compare_activations(tiny_opt, texts=TEXTS, positions=(5, 9)).summary()
    assert "at positions 5, 9 of 9 texts" in told[0]
    assert told[1].endswith("corrected for 2 layers; no interval, because the layer was chosen by its value.")


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_a_layer_without_activations_is_no_evidence_and_leaves_the_others_alone(tiny_opt):
    with tiny_opt.hooks(fwd_hooks=[("blocks.1.hook_out", lambda out, hook: out * 0)]):
        layers = sepcap.compare_activations(tiny_opt, texts=TEXTS, positions=POSITIONS, what="resid_post").tables["layers"]
    assert (layers["critical"][1], layers["p"][1], layers["gap"][1]) == (np.inf, 1, 0)
    assert np.isfinite(layers["critical"][0])


def test_lengths_count_only_when_scaled(tiny_opt):
    lengths = torch.tensor([1.0, 2.0, 4.0, 1.0, 1.0, 2.0, 0.5, 1.0, 3.0])
    vectors = planted(TEXTS.labels, 0.7, 0.2, 32, lengths)
    expected = {False: torch.ones(9), True: lengths / 4}
    with tiny_opt.hooks(fwd_hooks=[("blocks.1.hook_out", lambda out, hook: vectors[:, None].expand_as(out))]):
        for scaled, relative in expected.items():
            found = sepcap.compare_activations(tiny_opt, texts=TEXTS, positions=POSITIONS, what="resid_post", scaled=scaled)
            same = torch.from_numpy(TEXTS.labels[:, None] == TEXTS.labels[None])
            matrix = torch.where(same, 0.7, 0.2) * relative[:, None] * relative[None]
            matrix.diagonal().copy_(relative**2)
            torch.testing.assert_close(found.tensors["text_similarity"][1].float(), matrix, atol=1e-6, rtol=0)


class Looked(Plain):
    """What the plain model computes at each place, at all positions."""

    def vectors(self, ids, head):
        blocks, layout, kept = self.hf.get_submodule(self.layout.layers), self.layout, {}
        handles = []

        def keep(name, layer):
            def hook(module, args, output):
                output = output[0] if isinstance(output, tuple) else output
                kept[name, layer] = output.detach().view(*ids.shape, -1)

            return hook

        def keep_head(layer):
            def hook(module, args, output):
                alone = torch.zeros_like(args[0])
                of_head = slice(head * self.d_head, (head + 1) * self.d_head)
                alone[..., of_head] = args[0][..., of_head]
                kept["head", layer] = (module.forward(alone) - module.forward(torch.zeros_like(alone))).view(*ids.shape, -1)

            return hook

        for layer, block in enumerate(blocks):
            handles.append(block.register_forward_hook(keep("resid_post", layer)))
            handles.append(block.get_submodule(layout.out).register_forward_hook(keep("attn_out", layer)))
            handles.append(block.get_submodule(layout.out).register_forward_hook(keep_head(layer)))
            handles.append(block.get_submodule(layout.mlp).register_forward_hook(keep("mlp_out", layer)))
        with torch.no_grad():
            states = self.hf(ids, output_hidden_states=True).hidden_states
        for handle in handles:
            handle.remove()
        # the last hidden state has the final norm behind it; all others are the stream itself
        for layer in range(len(blocks) - 1):
            torch.testing.assert_close(kept["resid_post", layer], states[layer + 1])
        return kept


@pytest.mark.parametrize(
    "where",
    [{"what": "attn_out"}, {"what": "mlp_out"}, {"what": "resid_post"}, {"head": 1}, {"layer": 1, "head": 2}],
    ids=lambda where: "-".join(map(str, where.values())),
)
def test_the_vectors_are_those_of_the_plain_model(tiny, family, tiny_folders, where):
    ids = torch.from_numpy(TEXTS.rows(tiny, 21))
    assert LAYOUTS[family].auto == "AutoModelForCausalLM"
    kept = Looked(family, tiny_folders[family]).vectors(ids, where.get("head", 0))
    found = sepcap.compare_activations(tiny, texts=TEXTS, positions=POSITIONS, **where)
    layers = [1] if "layer" in where else [0, 1]
    told = {
        ("head",): "What head 1 of every layer adds",
        ("layer", "head"): "What head 2 of layer 1 adds",
        "mlp_out": "What the mlp adds, without the residual",
    }
    assert found.summary()[0].startswith(told.get(where.get("what", tuple(where)), ""))
    assert found.tables["layers"]["layer"].tolist() == layers
    for i, layer in enumerate(layers):
        vectors = kept[where.get("what", "head"), layer][:, list(POSITIONS)].flatten(0, 1)
        expected = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=-1)
        torch.testing.assert_close(found.tensors["similarity"][i], expected, atol=2e-5, rtol=0)


def test_heads_and_bias_sum_up_to_what_attention_adds(tiny, family):
    from sepcap.models.blocks.places import head_hooks, place_hooks
    from sepcap.statistics.vectors import vectors_at

    rows = TEXTS.rows(tiny, 21)
    whole = vectors_at(tiny, rows, lambda look: place_hooks(tiny, "attn_out", [0, 1], look), POSITIONS)
    heads = [vectors_at(tiny, rows, lambda look, h=h: head_hooks(tiny, [(0, h), (1, h)], look), POSITIONS) for h in range(4)]
    biases = [getattr(block.attn, "b_O", None) for block in tiny.blocks]
    for layer, bias in enumerate(biases):
        total = sum(head[layer] for head in heads) + (0 if bias is None else bias.detach())
        torch.testing.assert_close(total, whole[layer], atol=1e-5, rtol=0)


def test_the_batch_size_changes_nothing_and_the_model_is_left_as_it_was(tiny_opt):
    ids = torch.arange(3, 20)[None]
    before = logits_of(tiny_opt, ids)
    hooks = sum(len(point.fwd_hooks) for point in tiny_opt.hook_dict.values())
    one, many = (sepcap.compare_activations(tiny_opt, texts=TEXTS, positions=POSITIONS, batch_size=size) for size in (1, 16))
    torch.testing.assert_close(one.tensors["similarity"], many.tensors["similarity"], atol=1e-5, rtol=0)
    assert torch.equal(logits_of(tiny_opt, ids), before)
    assert sum(len(point.fwd_hooks) for point in tiny_opt.hook_dict.values()) == hooks


def test_only_chosen_positions_are_held(tiny_opt):
    from sepcap.models.blocks.places import place_hooks
    from sepcap.statistics.vectors import vectors_at

    rows, sizes = TEXTS.rows(tiny_opt, CONTEXT), []

    def hooks_for(look):
        def measured(layer, vectors):
            sizes.append(tuple(vectors.shape))
            look(layer, vectors)

        return place_hooks(tiny_opt, "resid_post", [0, 1], measured)

    kept = vectors_at(tiny_opt, rows, hooks_for, (5, 9), dims=(3, 30))
    assert kept.shape == (2, 9, 2, 2)
    assert kept.untyped_storage().nbytes() == 2 * 9 * 2 * 2 * 4
    assert sizes == [(9, CONTEXT, 32)] * 2
    full = vectors_at(tiny_opt, rows, lambda look: place_hooks(tiny_opt, "resid_post", [0, 1], look), (5, 9))
    assert torch.equal(full[..., [3, 30]], kept)


def test_results_come_back_and_default_positions_end_the_context(tiny_opt, tmp_path):
    found = sepcap.compare_activations(tiny_opt, texts=TEXTS)
    assert found.config["positions"] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert found.config["study"] == "activation-similarity"
    back = load_result(found.save(tmp_path / "similarity"))
    assert isinstance(back, sepcap.ActivationSimilarity)
    assert back.summary() == found.summary()
    assert torch.equal(back.tensors["similarity"], found.tensors["similarity"])
    assert back.tables["layers"].equals(found.tables["layers"])
    assert back.figure().data
    assert back.figure("matrices").data
    np.testing.assert_array_equal(back.labels, TEXTS.labels)
    with pytest.raises(FileExistsError, match="scaled"):
        sepcap.compare_activations(tiny_opt, texts=TEXTS, scaled=True, out=tmp_path / "similarity")


def test_a_finished_folder_is_read_and_nothing_is_computed(tiny_opt, tmp_path, monkeypatch):
    options, heard = {"texts": TEXTS, "positions": POSITIONS, "out": tmp_path / "similarity"}, []
    found = sepcap.compare_activations(tiny_opt, **options)
    monkeypatch.setattr("sepcap.studies.similarity.study.vectors_at", None)
    again = sepcap.compare_activations(tiny_opt, **options, progress=heard.append)
    assert heard == [f"{tmp_path / 'similarity'} is finished; nothing is recomputed"]
    assert again.summary() == found.summary()


def test_tasks_are_the_categories(tiny_opt):
    tasks = tuple(load_task(words(0, n=40, alphabet=ALPHABETS[name]), name=name) for name in ("letters", "digits"))
    found = sepcap.compare_activations(tiny_opt, tasks=tasks, positions=POSITIONS, per_category=3)
    assert found.config["categories"] == {"letters": 3, "digits": 3}
    others = sepcap.compare_activations(tiny_opt, tasks=tasks, positions=POSITIONS, per_category=3, skip=3)
    assert not set(found.tables["texts"]["name"]) & set(others.tables["texts"]["name"])
    with pytest.raises(ValueError, match="two have the same name"):
        sepcap.compare_activations(tiny_opt, tasks=(*tasks, tasks[0]), positions=POSITIONS)


def test_two_models_are_compared_text_by_text(tiny_opt, tiny_folders):
    options = {"texts": TEXTS, "positions": POSITIONS}
    found = sepcap.compare_activations(tiny_opt, **options)
    same = found.compared(found)
    assert (same[["difference", "low", "high"]] == 0).all(axis=None)
    other = sepcap.compare_activations(fresh(tiny_folders["gpt2"]), **options)
    table, back = found.compared(other), other.compared(found)
    np.testing.assert_allclose(table["difference"], found.tables["layers"]["gap"] - other.tables["layers"]["gap"])
    np.testing.assert_allclose(table["low"], -back["high"])
    assert (table["low"] < table["difference"]).all()
    for name, changed in {"positions": {"positions": (5, 9)}, "what": {"what": "mlp_out"}, "scaled": {"scaled": True}}.items():
        with pytest.raises(ValueError, match=f"other: {name} is"):
            found.compared(sepcap.compare_activations(tiny_opt, **options | changed))
    shallow = sepcap.ActivationSimilarity(found.config, {"layers": found.tables["layers"].head(1)})
    with pytest.raises(ValueError, match="other has 1 layers, this result 2"):
        found.compared(shallow)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"layer": 0, "head": 4}, IndexError, r"head \(0, 4\) does not exist"),
        ({"layer": 2, "head": 0}, IndexError, "layer=[0-9]+: head .* layers are numbered 0 to 1"),
        ({"head": 4}, IndexError, r"head=4: head \(0, 4\)"),
        ({"head": True}, TypeError, "head=True"),
        ({"layer": 1}, ValueError, "layer=1 needs a head: give head too"),
        ({"head": 1, "what": "mlp_out"}, ValueError, "head=1 is a part of attention, and what='mlp_out' is not"),
        ({"tasks": ("local-prose", "local-cpp")}, ValueError, "are both given"),
        ({"positions": ()}, ValueError, r"positions=\[\]"),
        ({"positions": (3, 3)}, ValueError, "distinct ones from 0 to 31"),
        ({"positions": (3, 32)}, ValueError, "from 0 to 31"),
        ({"positions": (3, 20), "context": 20}, ValueError, "from 0 to 19"),
        ({"context": 33}, ValueError, "context=33"),
        ({"permutations": 5}, ValueError, "permutations=5"),
        ({"batch_size": 0}, ValueError, "batch_size=0"),
    ],
)
def test_bad_input_is_named_before_a_folder_is_made(tiny_opt, options, error, says, tmp_path):
    with pytest.raises(error, match=says):
        sepcap.compare_activations(tiny_opt, texts=TEXTS, out=tmp_path / "study", **options)
    assert not (tmp_path / "study").exists()


@pytest.mark.parametrize(
    ("name", "given", "says"),
    [
        ("what", "atn_out", "Did you mean 'attn_out'"),
        ("what", 1, "what=1 is not known"),
        ("head", (1, 2), r"head=\(1, 2\): give a whole number, 0 or more"),
        ("head", 1.5, "head=1.5"),
    ],
)
def test_places_of_the_wrong_kind_are_named(name, given, says):
    # the type checker of the tests would answer first
    config = sepcap.ActivationSimilarityConfig()
    object.__setattr__(config, name, given)
    with pytest.raises(ValueError, match=says):
        config.__post_init__()


def test_broken_weights_are_named(tiny_opt):
    with torch.no_grad():
        tiny_opt.blocks[1].attn.W_O[0, 0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 1 are NaN"):
        sepcap.compare_activations(tiny_opt, texts=TEXTS, positions=POSITIONS)
