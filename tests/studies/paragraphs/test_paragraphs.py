"""ParagraphTransfer as a study: resumed, seeded, batched; what is compared with what; what is refused."""

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import CONTEXT
from encoders import load as load_tiny
from encoders import save_masked

import sepcap
from sepcap.studies.paragraphs import study as paragraphs
from sepcap.studies.paragraphs.conditions import Condition, compared, donors_of, matched, profile
from sepcap.studies.paragraphs.config import ParagraphTransferConfig
from sepcap.studies.paragraphs.study import ParagraphTransfer, plan_paragraph_transfer, transfer_paragraphs
from sepcap.tasks.passages import Passage

TEXTS = ["XYZVW\n\nQRSTUV", "KLMNO\n\nABCDEFG", "HIJK\n\n01234", "56789\n\nZYXWV"]
OPTIONS = {"tokens": 5, "paragraph_tokens": 5, "given": (0, 1, 2), "temperature": 1.0, "embedder": "tf-idf"}


def same(a, b):
    for name, table in a.tables.items():
        pd.testing.assert_frame_equal(table, b.tables[name], rtol=1e-6)
    torch.testing.assert_close(a.tensors["log_likelihood"], b.tensors["log_likelihood"], equal_nan=True, atol=1e-5, rtol=1e-5)


def nearly_all(one, other):
    """The same texts written, but for one: a random number at the edge between two tokens may fall to either side in other shapes."""
    assert len(one) == len(other)
    assert sum(a != b for a, b in zip(one, other, strict=True)) <= 1


@pytest.fixture
def result(tiny_opt):
    return transfer_paragraphs(tiny_opt, texts=TEXTS, **OPTIONS)


def test_every_condition_is_there_with_its_tables(result):
    assert result.config["conditions"] == ["original", "transferred", "mismatched", "neutral"]
    assert result.config["embedder"].startswith("TF-IDF (scikit-learn")
    assert result.config["breaks"] == [[["\n", "\n"], 4]]
    assert set(result.tables["generations"]["condition"]) == {*result.config["conditions"], "given 1", "given 2"}
    assert len(result.tables["generations"]) == 24
    said = " ".join(result.summary())
    parts = (
        "one token in 0 of 4 texts",
        "'\\n' '\\n' in 4",
        "TF-IDF",
        "another text of the same kind",
        "Layers with the largest gain on 2 of the texts, tested on the other 2",
    )
    for part in (*parts, "the last of the breaks"):
        assert part in said


def test_likelihoods_are_those_of_the_model_itself(tiny_opt, result):
    text = result.tables["texts"].iloc[0]
    assert (text["before"], text["following_tokens"]) == ("XYZVW", 5)
    ids = tiny_opt.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]
    first = ids.index(tiny_opt.tokenizer("\n", add_special_tokens=False)["input_ids"][0])
    following = ids[first + 2 : first + 7]
    for name, before in (("original", ids[: first + 2]), ("neutral", ids[first : first + 2])):
        with torch.no_grad():
            logits = tiny_opt(torch.tensor([[0, *before, *following]]), return_type="logits", use_cache=False)[0]
        p = logits.double().log_softmax(-1)[len(before) : -1]
        expected = [float(row[token]) for row, token in zip(p, following, strict=True)]
        found = result.tensors["log_likelihood"][result.config["conditions"].index(name), 0]
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.thorough
def test_a_seed_gives_the_same_and_the_batch_size_is_nothing_but_rounding(tiny_opt, result):
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    same(transfer_paragraphs(tiny_opt, texts=TEXTS, **OPTIONS), result)
    for size in (1, 3):
        other = transfer_paragraphs(tiny_opt, texts=TEXTS, **OPTIONS, batch_size=size)
        likelihoods = other.tensors["log_likelihood"], result.tensors["log_likelihood"]
        torch.testing.assert_close(*likelihoods, equal_nan=True, atol=1e-5, rtol=1e-5)
        nearly_all(*(found.tables["generations"]["written"].tolist() for found in (other, result)))
    assert torch.equal(torch.random.get_rng_state(), state)
    written = transfer_paragraphs(tiny_opt, texts=TEXTS, **OPTIONS, seed=1).tables["generations"]["written"]
    assert not written.equals(result.tables["generations"]["written"])


def test_what_a_text_is_patched_from_and_its_luck_do_not_depend_on_later_texts(tiny_opt, result):
    fewer = transfer_paragraphs(tiny_opt, texts=TEXTS[:2], **OPTIONS).tables["generations"]
    own = result.tables["generations"]
    kept = ("original", "transferred", "neutral", "given 2")
    nearly_all(*(table[table["condition"].isin(kept) & (table["text"] < 2)]["written"].tolist() for table in (fewer, own)))


@pytest.mark.thorough
def test_interrupted_it_goes_on_where_it_stopped_and_gives_the_same(tiny_opt, tmp_path, monkeypatch):
    options = {**OPTIONS, "batch_size": 2}
    result = transfer_paragraphs(tiny_opt, texts=TEXTS, **options)
    sampler, calls = paragraphs.sampled, []

    def breaking(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return sampler(*args, **kwargs)

    monkeypatch.setattr(paragraphs, "sampled", breaking)
    with pytest.raises(KeyboardInterrupt):
        transfer_paragraphs(tiny_opt, texts=TEXTS, **options, out=tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()
    again = transfer_paragraphs(tiny_opt, texts=TEXTS, **options, out=tmp_path / "run")
    assert len(calls) == 4 + 12 - 3  # two batches of six conditions; three parts were done
    same(again, result)
    n = len(calls)
    same(transfer_paragraphs(tiny_opt, texts=TEXTS, **options, out=tmp_path / "run"), result)  # a finished one is read
    assert len(calls) == n
    with pytest.raises(FileExistsError, match=r"temperature: 1\.0 stored, 0\.5 requested"):
        transfer_paragraphs(tiny_opt, texts=TEXTS, **{**options, "temperature": 0.5}, out=tmp_path / "run")
    loaded = sepcap.load_result(tmp_path / "run")
    assert isinstance(loaded, ParagraphTransfer)
    same(loaded, result)
    assert loaded.summary() == result.summary()


def test_the_cost_is_known_beforehand(tiny_opt, monkeypatch):
    config = ParagraphTransferConfig(texts=TEXTS, profile="none", generate=False, paragraph_tokens=5, embedder=None)
    plan = plan_paragraph_transfer(tiny_opt, config)
    sepcap.load_model(tiny_opt)  # a model object is probed by one pass, once
    seen, said = [], []
    forward = type(tiny_opt).forward
    monkeypatch.setattr(type(tiny_opt), "forward", lambda self, ids, **kw: seen.append(ids) or forward(self, ids, **kw))
    transfer_paragraphs(tiny_opt, config, progress=lambda text: said.append((text, len(seen))))
    lengths = [len(p.context) + len(p.gap) + 1 for p in plan.passages], [len(p.following) for p in plan.passages]
    # two donors' sources, one likelihood after the whole context and three after the break alone
    assert plan.tokens() == {
        "sources": 2 * sum(lengths[0]),
        "likelihood": sum(lengths[0]) + 3 * 4 * 3 + 4 * sum(lengths[1]),
        "generation": 0,
    }
    assert sum(ids.numel() for ids in seen) >= sum(plan.tokens().values())  # padding counts in passes
    assert said == [(plan.cost(), 0)]
    assert "4 texts, mlp and attn_pre_out patched" in plan.cost()


def test_with_a_scale_of_one_the_own_text_is_no_other(tiny_opt):
    """Patched with the whole text as neutral prompt, nothing changes: these are its own activations."""
    found = transfer_paragraphs(tiny_opt, texts=TEXTS[0], into="XYZVW\n\n", generate=False, paragraph_tokens=5)
    original, transferred, neutral = found.tensors["log_likelihood"]
    torch.testing.assert_close(transferred, original, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(neutral, original, atol=1e-5, rtol=1e-5)
    assert "There is no control" in " ".join(found.summary())


def test_donors_are_other_texts_of_the_kind_each_used_once():
    def made(kind, gap, n):
        return [Passage((1, i), gap, (2,), kind) for i in range(n)]

    texts = made("prose", (9,), 5) + made("code", (9,), 3) + made("code", (8, 8), 1)
    donors = donors_of(texts, 0)
    assert donors["own"] == list(range(9))
    assert sorted(donors["another"][:5]) == list(range(5))
    assert all(i != j for i, j in enumerate(donors["another"]))
    assert sorted(donors["another"][5:8]) == [5, 6, 7]
    assert donors["another"][8] in (5, 6, 7)  # nobody of its kind spells its break so
    assert all(texts[j].kind != p.kind for j, p in zip(donors["other kind"], texts, strict=True))
    assert donors_of(texts, 0) == donors
    assert donors_of(texts, 1) != donors
    assert list(donors_of(texts[:1], 0)) == ["own"]


def test_a_text_that_is_there_twice_is_never_its_own_control():
    def made(*contexts, gap=(9,)):
        return [Passage(tuple(map(ord, context)), gap, (2, i)) for i, context in enumerate(contexts)]

    for seed in range(5):
        texts = made(*"aabbbcd")
        another = donors_of(texts, seed)["another"]
        assert sorted(another) == list(range(7))  # none is over half of all: each still gives to one
        assert all(texts[i].context != texts[j].context for i, j in enumerate(another))
        texts = made(*"aaaab")
        another = donors_of(texts, seed)["another"]
        assert another[:4] == [4] * 4
        assert another[4] in range(4)
    # of three copies and one that spells its break otherwise, the copies have that one alone
    texts = made(*"aaa") + made("b", gap=(8, 8))
    donors = donors_of(texts, 0)
    assert donors["another"][:3] == [3, 3, 3]
    assert matched(texts, donors) == {"another": {"texts": 4, "spelled otherwise": 4}}
    assert list(donors_of(made(*"aaa"), 0)) == ["own"]


def test_copies_of_a_text_alone_have_no_control_and_that_is_said(tiny_opt):
    found = transfer_paragraphs(tiny_opt, texts=[TEXTS[0]] * 3, generate=False, profile="none", paragraph_tokens=5)
    assert found.config["conditions"] == ["original", "transferred", "neutral"]
    assert "There is no control: there is no other text" in " ".join(found.summary())


def test_the_summary_says_how_many_donors_spell_the_break_otherwise(tiny_opt):
    def made(context, gap, kind="k"):
        return Passage((40, context), gap, (50, 51, 52), kind)

    texts = [made(4, (9,)), made(5, (9,)), made(6, (8, 9)), made(7, (9,), "alone")]
    said = " ".join(transfer_paragraphs(tiny_opt, texts=texts, generate=False, profile="none").summary())
    assert "For 1 of 3 texts that donor's break has other tokens" in said
    assert "1 of 4 texts have no such donor" in said


def test_names_of_parts_stay_short_with_many_layers():
    many = tuple(range(200))
    conditions = [*compared(many, ["own", "another"]), *profile(many, ["own", "another"]).values()]
    conditions += [Condition("transferred", "own", layers) for layers in (many[::2], many[1::2], (0, 1, 3), (0, 2, 3), (0, 3))]
    slugs = {c: c.slug for c in conditions}
    assert max(map(len, slugs.values())) < 60
    assert len(set(slugs.values())) == len(slugs)


def test_where_the_whole_context_gains_nothing_no_share_is_told(result):
    table = result.tables["differences"].copy()
    row = (table["condition"] == "original") & (table["metric"] == "nats")
    table.loc[row, ["difference", "low", "high"]] = [-0.006, -0.02, 0.01]
    table.loc[:, ["share", "share_low", "share_high"]] = np.nan
    said = " ".join(dataclasses.replace(result, tables={**result.tables, "differences": table}).summary())
    assert "the interval of the gain of the whole context is not above 0 (−0.006 [−0.020, +0.010])" in said
    assert "%" not in said
    assert "nan" not in said


def test_medians_against_the_whole_paragraph_stand_apart_from_those_against_its_rest(tiny_opt):
    found = transfer_paragraphs(tiny_opt, texts=[*TEXTS[:3], "56789\n\nZY"], **{**OPTIONS, "given": (0, 1, 3, 40)})
    whole, rest, left = found.summary()[-3:]
    assert "to the whole paragraph: original" in whole
    assert "given" not in whole
    assert rest.startswith("Compared with the rest of the paragraph only, median: 1 given ")
    less = found.difference("distance", "transferred", "given 3")
    assert f"mean on the same rest: {less['difference']:+.3f}".replace("-", "−") in rest
    assert ", 3 texts)" in rest  # the fourth paragraph has but two tokens
    assert left == "Left out, because no paragraph is longer: 40 tokens given."


def test_a_finished_folder_does_not_answer_for_another_embedder_of_the_same_name(tiny_opt, tmp_path):
    options = {**OPTIONS, "profile": "none", "given": (0,), "out": tmp_path / "run"}
    by_length = transfer_paragraphs(tiny_opt, texts=TEXTS, **{**options, "embedder": lambda texts: [[len(t), 1] for t in texts]})
    assert by_length.config["embedder"] == "function <lambda>"
    again = transfer_paragraphs(tiny_opt, texts=TEXTS, **{**options, "embedder": lambda texts: [[2 * len(t), 2] for t in texts]})
    same(again, by_length)  # vectors of the same direction: the same distances
    with pytest.raises(FileExistsError, match="embedder_probe"):
        transfer_paragraphs(tiny_opt, texts=TEXTS, **{**options, "embedder": lambda texts: [[t.count("o"), 1] for t in texts]})


@pytest.mark.parametrize(
    ("source", "options", "error", "said"),
    [
        ([], {}, ValueError, "texts is empty"),
        (["no break"], {}, ValueError, r"texts\[0\] has no '\\n\\n'"),
        (["a\n\nb", "x" * CONTEXT + "\n\nb"], {"tokens": 1}, ValueError, r"texts\[1\] is too long: 35 tokens"),
        (TEXTS, {"tokens": CONTEXT}, ValueError, "is too long"),
        (TEXTS, {"sites": ("resid", "mlp")}, ValueError, "patch 'resid' alone"),
        (TEXTS, {"layers": (7,)}, IndexError, "layers 0 to 1"),
        (TEXTS, {"at": ""}, ValueError, "at is empty"),
        (TEXTS, {"scale": float("nan")}, ValueError, "scale=nan"),
        (TEXTS, {"temperature": -1.0}, ValueError, "temperature=-1"),
        (TEXTS, {"temperature": 0.0, "samples": 2}, ValueError, "samples=2"),
        (TEXTS, {"given": (1, 1)}, ValueError, "without repeats"),
        (TEXTS, {"generate": False, "profile": "generation"}, ValueError, "needs generate=True"),
        (TEXTS, {"seed": -1}, ValueError, "seed=-1"),
        (TEXTS, {"tokns": 3}, ValueError, "Did you mean 'tokens'"),
        (["a\n\nb", Passage((4,), (5,), (6,))], {}, ValueError, "texts has 1 passages among 2 texts"),
        ([Passage((4,), (), (6,))], {}, ValueError, r"texts\[0\]\.gap is empty"),
        ([Passage((4,), (5,), (6,)), Passage((4,), (5,), ())], {}, ValueError, r"texts\[1\]\.following is empty"),
        ([Passage((4,), (5,), (6, 100_000))], {}, ValueError, r"texts\[0\]\.following contains 100000: this model's tokens are 0 to"),
        ([Passage((4, -1), (5,), (6,))], {}, ValueError, r"texts\[0\]\.context contains -1"),
        (TEXTS, {"embedder": "nobody/none"}, OSError, "'tf-idf' needs no model"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is(tiny_opt, tmp_path, source, options, error, said):
    with pytest.raises(error, match=said):
        transfer_paragraphs(tiny_opt, texts=source, **{**OPTIONS, **options}, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_summary_says_of_chosen_layers_what_they_carry_on_the_other_texts(result):
    rows = [
        {"part": "alone", "layer": 1, "among": 2, "donor": "difference", "searched": 3, "gain": 0.5, "low": 0.4, "high": 0.6, "texts": 4},
        {"part": "last", "layer": 0, "among": 2, "donor": "own", "searched": 3, "gain": -0.5, "low": -0.6, "high": -0.4, "texts": 4},
    ]
    said = " ".join(dataclasses.replace(result, tables={**result.tables, "chosen_layers": pd.DataFrame(rows)}).summary())
    assert "Layers with the largest gain on 3 of the texts, tested on the other 4: layer 1 alone (of 2): +0.500 [" in said
    assert "layer 1 alone (of 2): +0.500 [+0.400, +0.600] nats per" in said
    assert "the last layers from 0 (of 2): −0.500 [−0.600, −0.400] nats per token, over the break alone, without a control." in said
    none = dataclasses.replace(result, tables={**result.tables, "chosen_layers": pd.DataFrame(rows).head(0)})
    assert not any("Layers with the largest gain" in sentence for sentence in none.summary())


@pytest.mark.slow
def test_in_the_embedded_model_the_own_break_says_more_than_another_and_with_random_weights_it_does_not():
    texts = sepcap.sample_passages(sepcap.load_model().tokenizer, ["local-prose", "local-python", "local-cpp"], 12)
    options = {"layers": (2, 3, 4, 5), "generate": False, "profile": "none"}
    trained = transfer_paragraphs(sepcap.load_model(), texts=texts, **options)
    assert trained.difference("nats", "transferred", "mismatched")["low"] > 0
    assert trained.difference("nats", "transferred")["low"] > 0
    untrained = transfer_paragraphs(sepcap.load_model(random_weights=True), texts=texts, **options)
    assert abs(untrained.difference("nats", "transferred", "mismatched")["difference"]) < 0.005


def test_a_model_that_continues_no_texts_is_refused(tmp_path):
    masked = load_tiny(save_masked("roberta", tmp_path / "roberta"))
    with pytest.raises(ValueError, match=r"'masked'.*causal language model"):
        transfer_paragraphs(masked, texts=TEXTS)


@pytest.mark.thorough
def test_the_command_writes_table_figures_and_the_study(tiny_folders, tmp_path, capsys):
    from sepcap.cli.main import main

    lines = tmp_path / "foxes.jsonl"
    lines.write_text("".join(json.dumps({"text": f"the quick {i}\n\nbrown fox {i}"}) + "\n" for i in range(16)))
    out = tmp_path / "run"
    arguments = ["paragraphs", "--model", str(tiny_folders["opt"]), "--tasks", str(lines), "--n", "3", "--context", "4", "--following", "3"]
    arguments += ["--tokens", "4", "--given", "0", "1", "--embedder", "tf-idf", "--out", str(out), "--profile", "likelihood"]
    main(arguments)
    printed = capsys.readouterr().out
    assert "3 texts, mlp and attn_pre_out patched at the break" in printed
    assert "Log-likelihood of the true next paragraph" in printed
    for name in ("result.json", "table.csv", "figures/layers.html", "figures/distances.html", "figures/positions.html"):
        assert (out / name).exists()
    assert sepcap.load_result(out).config["kinds"] == {"foxes": 3}
    main(arguments)  # goes on, and finds it finished
