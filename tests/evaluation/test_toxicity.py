"""Toxicity: continuations against the plain model, scores against classifiers with a planted answer."""

import base64
import dataclasses
import functools
import importlib
import json
import math
import re
import shutil
import sys
import types

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_tokenizer
from plain import Plain

import sepcap
from sepcap.errors import CorruptFile
from sepcap.evaluation.harness import run_lm_eval
from sepcap.evaluation.sampling import continuations, draw
from sepcap.evaluation.scorers import get_scorer
from sepcap.evaluation.toxicity import Toxicity, read_prompts
from sepcap.storage import digest_of

toxicity = functools.partial(sepcap.evaluate_toxicity, task=None)
"""Without the perplexity beside it, where a test is of something else."""

PROMPTS = ["abc", "the lazy dog", "x", "", "def return", "yes"]
EOS = 2
BAD_LETTERS = "aeiou"
SHARP = 1.5


def ids_of(tokenizer, text):
    return [0, *tokenizer(text, add_special_tokens=False)["input_ids"]]


def step_by_step(plain, ids, pick, steps, zero=None):
    """Tokens that the plain Hugging Face model goes on with, without a cache, one row at a time."""
    ids, start = list(ids), len(ids)
    for step in range(steps):
        ids.append(pick(plain.run(torch.tensor([ids]), zero=zero)[0, -1], step))
        if ids[-1] == EOS:
            return ids[start:-1]
    return ids[start:]


def most_likely(logits, step):
    values, tokens = logits.topk(2)
    assert values[0] - values[1] > 1e-4, "nearly a tie: another machine could go on with the other token"
    return int(tokens[0])


def vowels(texts):
    return [sum(letter in BAD_LETTERS for letter in text) / max(1, len(text)) for text in texts]


def planted_classifier(folder, labels=("fine", "toxic"), **changes):
    """BERT without layers: the first token decides, ±1 standardised, through tanh, times ±SHARP."""
    from transformers import BertConfig, BertForSequenceClassification

    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 2, "num_hidden_layers": 0, "num_attention_heads": 1, "intermediate_size": 2, "max_position_embeddings": 34}
    config = BertConfig(vocab_size=VOCABULARY, id2label=dict(enumerate(labels)), layer_norm_eps=1e-12, pad_token_id=1, **sizes, **changes)
    classifier = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in classifier.parameters():
            parameter.zero_()
        embeddings = classifier.bert.embeddings
        embeddings.LayerNorm.weight.fill_(1)
        for number in tokenizer.get_vocab().values():
            bad = tokenizer.decode([number])[:1] in tuple(BAD_LETTERS)
            embeddings.word_embeddings.weight[number] = torch.tensor([1.0, -1.0]) * (1 if bad else -1)
        classifier.bert.pooler.dense.weight.copy_(torch.eye(2))
        classifier.classifier.weight[-1] = torch.tensor([SHARP, -SHARP])
    classifier.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LOGIT = 2 * SHARP * math.tanh(1.0)


def planted_score(text):
    """What the planted classifier says, by hand: the logit is ±LOGIT against 0."""
    return 1 / (1 + math.exp(-LOGIT if text[:1] in tuple(BAD_LETTERS) else LOGIT))


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return planted_classifier(tmp_path_factory.mktemp("classifier"))


@pytest.fixture
def result(tiny_opt):
    return toxicity(tiny_opt, PROMPTS, vowels, 24, tokens=4, threshold=0.25)


def test_greedy_continuations_are_the_argmax_of_the_plain_model_step_by_step(tiny, family, tiny_folders):
    plain = Plain(family, tiny_folders[family])
    prompts = [ids_of(tiny.tokenizer, text) for text in PROMPTS]
    expected = [step_by_step(plain, ids, most_likely, 8) for ids in prompts]
    assert continuations(tiny, prompts, len(prompts), tokens=8, temperature=0) == expected
    assert continuations(tiny, prompts, len(prompts), tokens=8, temperature=0, batch_size=1) == expected


def test_sampled_continuations_invert_the_cumulative_distribution_of_the_plain_model(tiny, family, tiny_folders):
    plain, temperature, n, tokens = Plain(family, tiny_folders[family]), 0.7, 9, 6
    prompts = [ids_of(tiny.tokenizer, text) for text in PROMPTS]
    luck = np.random.default_rng(3).random((n, tokens))

    def pick_of(i):
        def pick(logits, step):
            p = np.exp((logits.double().numpy() - float(logits.max())) / temperature)
            edges = np.cumsum(p / p.sum())
            assert np.abs(edges - luck[i, step]).min() > 1e-6, "at the edge between two tokens another machine could draw the other"
            return int(np.flatnonzero(edges > luck[i, step])[0])

        return pick

    expected = [step_by_step(plain, prompts[i % len(prompts)], pick_of(i), tokens) for i in range(n)]
    assert len(set(map(tuple, expected))) > 4
    assert continuations(tiny, prompts, n, tokens=tokens, temperature=temperature, seed=3, batch_size=2) == expected


def test_an_end_of_text_token_ends_a_continuation_and_no_other(tiny_opt):
    prompts = [ids_of(tiny_opt.tokenizer, text) for text in PROMPTS]
    whole = continuations(tiny_opt, prompts, 6, tokens=6, seed=1)
    stop = whole[0][3]
    tiny_opt.tokenizer.eos_token = tiny_opt.tokenizer.convert_ids_to_tokens(stop)
    expected = [ids[: ids.index(stop)] if stop in ids else ids for ids in whole]
    assert len(expected[0]) <= 3
    assert max(map(len, expected)) == 6
    assert continuations(tiny_opt, prompts, 6, tokens=6, seed=1) == expected


def test_without_an_end_of_text_token_every_continuation_has_all_its_tokens(tiny_opt):
    prompts = [ids_of(tiny_opt.tokenizer, text) for text in PROMPTS]
    ended = continuations(tiny_opt, prompts, 6, tokens=6, seed=1)
    tiny_opt.tokenizer.eos_token = None
    whole = continuations(tiny_opt, prompts, 6, tokens=6, seed=1)
    assert [len(ids) for ids in whole] == [6] * 6
    assert all(ids[: len(short)] == short for ids, short in zip(whole, ended, strict=True))
    found = toxicity(tiny_opt, PROMPTS, vowels, 6, tokens=6)
    assert found.table["continuation"].str.len().min() > 0


def test_tokens_are_drawn_as_often_as_they_are_likely():
    logits = torch.tensor([-math.inf, 1.0, 0.0, 3.0, -2.0])
    n = 10_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for temperature in (1.0, 0.5):
        counts = torch.bincount(draw(logits.expand(n, -1), uniform, temperature), minlength=5)
        exact = (logits.double() / temperature).softmax(0) * n
        assert (counts - exact).abs().max() <= 1
    ends = torch.tensor([0.0, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits.expand(2, -1), ends, 1.0).tolist() == [1, 4]  # what is impossible is never drawn


def test_a_seed_gives_the_same_bits_and_touches_nothing_global(tiny_opt, result):
    torch.manual_seed(5)
    np.random.seed(5)
    tiny_opt.train()  # dropout would draw from the global state
    states = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    again = toxicity(tiny_opt, PROMPTS, vowels, 24, tokens=4, threshold=0.25)
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert (np.random.get_state()[1] == states[1]).all()
    assert again.table.equals(result.table)
    assert tiny_opt.training
    assert not toxicity(tiny_opt, PROMPTS, vowels, 24, tokens=4, seed=1).table.equals(result.table)


def test_fewer_continuations_are_the_first_of_more_in_batches_of_any_size(tiny_opt, result):
    """But for one: a random number at the edge between two tokens may fall to either side in other shapes."""
    for n, size in ((7, 32), (24, 3)):
        found = toxicity(tiny_opt, PROMPTS, vowels, n, tokens=4, threshold=0.25, batch_size=size).table["continuation"]
        assert (found != result.table["continuation"][:n]).sum() <= 1


def test_a_classifier_from_a_folder_sees_how_often_the_model_begins_with_a_vowel(tiny_opt, tiny_folders, classifier):
    found = toxicity(tiny_opt, None, classifier, 2000, tokens=1, batch_size=500)
    p = Plain("opt", tiny_folders["opt"]).run(torch.tensor([[0]]))[0, -1].double().softmax(0)
    bad = sum(float(p[i]) for i in range(VOCABULARY) if tiny_opt.tokenizer.decode([i], skip_special_tokens=True)[:1] in tuple(BAD_LETTERS))
    assert 0.005 < bad < 0.995
    assert abs(found.fraction - bad) < 3.5 * math.sqrt(bad * (1 - bad) / 2000)
    np.testing.assert_allclose(found.table["score"], [planted_score(text) for text in found.table["continuation"]], atol=1e-6)
    assert found.info["scorer"] == classifier.name


def test_softmax_or_sigmoid_and_which_label(tmp_path, classifier):
    texts = ["a quick fox", "the end", "", "x" * 100]
    cpu = torch.device("cpu")
    expected = np.array([planted_score(text) for text in texts])
    np.testing.assert_allclose(get_scorer(classifier, None, cpu)[0](texts), expected, atol=1e-6)
    np.testing.assert_allclose(get_scorer(str(classifier), "fine", cpu)[0](texts), 1 - expected, atol=1e-6)
    np.testing.assert_allclose(get_scorer(classifier, None, cpu)[0]([""]), expected[2:3], atol=1e-6)
    # independent labels: the other one's logit of 0 is not in the denominator, which makes no difference to this one
    several = planted_classifier(tmp_path / "several", ("rude", "odd", "Toxicity"), problem_type="multi_label_classification")
    np.testing.assert_allclose(get_scorer(several, None, cpu)[0](texts), expected, atol=1e-6)
    np.testing.assert_allclose(get_scorer(several, "odd", cpu)[0](texts), 0.5, atol=1e-6)
    single = planted_classifier(tmp_path / "single", ("LABEL_0",))
    np.testing.assert_allclose(get_scorer(single, None, cpu)[0](texts), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        (("LABEL_0",), None),
        (("LABEL_0",), "regression"),
        (("rude", "toxic"), "regression"),
        (("rude", "toxic"), "multi_label_classification"),
        (("rude", "toxic"), "single_label_classification"),
        (("rude", "odd", "toxic"), None),
    ],
)
def test_scores_are_those_of_the_pipeline_of_transformers(labels, problem, tmp_path):
    from transformers import pipeline

    folder = planted_classifier(tmp_path / "classifier", labels, problem_type=problem)
    texts = ["a quick fox", "the end"]
    said = pipeline("text-classification", model=str(folder), tokenizer=str(folder), device="cpu", top_k=None)(texts)
    expected = [next(answer["score"] for answer in answers if answer["label"] == labels[-1]) for answers in said]
    assert expected[0] != expected[1]
    np.testing.assert_allclose(get_scorer(folder, None, torch.device("cpu"))[0](texts), expected, atol=1e-6)


class Harmful:
    """What would make a file if it were unpickled as code."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_read_as_tensors_and_never_as_code(tmp_path, classifier):
    from safetensors.torch import load_file

    folder = tmp_path / "pickled"
    shutil.copytree(classifier, folder)
    (folder / "model.safetensors").unlink()
    weights = load_file(classifier / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    texts = ["a quick fox", "the end"]
    expected = get_scorer(classifier, None, torch.device("cpu"))[0](texts)
    assert get_scorer(folder, None, torch.device("cpu"))[0](texts) == expected
    torch.save(weights | {"more": Harmful(tmp_path / "made")}, folder / "pytorch_model.bin")
    with pytest.raises(CorruptFile, match="pickled and hold more than tensors"):
        get_scorer(folder, None, torch.device("cpu"))
    assert not (tmp_path / "made").exists()


def test_a_classifier_that_cannot_be_used_is_refused(tmp_path, tiny_folders, classifier):
    cpu = torch.device("cpu")
    unnamed = planted_classifier(tmp_path / "unnamed", ("LABEL_0", "LABEL_1"))
    with pytest.raises(ValueError, match=r"label.*LABEL_0, LABEL_1"):
        get_scorer(unnamed, None, cpu)
    with pytest.raises(ValueError, match=r"label='toxi'.*Did you mean 'toxic'"):
        get_scorer(classifier, "toxi", cpu)
    with pytest.raises(ValueError, match=r"lacks weights of a classifier.*score.weight"):
        get_scorer(tiny_folders["opt"], "LABEL_1", cpu)
    with pytest.raises(ValueError, match=r"scorer='detoxyfy' is not known\. Did you mean 'detoxify'"):
        get_scorer("detoxyfy", None, cpu)
    with pytest.raises(ValueError, match="a function has no labels"):
        get_scorer(vowels, "toxic", cpu)


def test_detoxify_is_an_extra(monkeypatch, tiny_opt):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(ImportError, match=re.escape("sepcap[toxicity]")):
        toxicity(tiny_opt, PROMPTS)


def test_detoxify_gives_the_column_of_its_label(monkeypatch, tiny_opt):
    """A stand-in with the interface of detoxify 0.5: one text gives a number, several a list."""

    class Detoxify:
        class_names = ("toxicity", "insult")

        def __init__(self, kind, device):
            assert (kind, device) == ("original", torch.device("cpu"))

        def predict(self, texts):
            columns = {"toxicity": vowels(texts), "insult": [0.5] * len(texts)}
            return columns if len(texts) > 1 else {name: column[0] for name, column in columns.items()}

    monkeypatch.setitem(sys.modules, "detoxify", types.SimpleNamespace(Detoxify=Detoxify))
    for n in (1, 65):  # the second batch has one text
        found = toxicity(tiny_opt, PROMPTS, n=n, tokens=3)
        assert found.table["score"].tolist() == vowels(found.table["continuation"])
    assert toxicity(tiny_opt, PROMPTS, n=2, tokens=3, label="insult").mean == 0.5


@pytest.mark.parametrize(
    ("scores", "error", "said"),
    [
        ([0.5], ValueError, "one number for each"),
        ([0.5, 1.5], ValueError, "1.5 for text 1"),
        ([math.nan, 0.5], ValueError, "nan for text 0"),
        ([-0.1, 0.5], ValueError, "between 0 and 1"),
        (["much", "little"], TypeError, "list of numbers"),
        ({"toxicity": [0, 1]}, TypeError, "dict"),
    ],
)
def test_a_function_must_give_a_number_from_0_to_1_for_each_text(tiny_opt, scores, error, said):
    with pytest.raises(error, match=said):
        toxicity(tiny_opt, PROMPTS, lambda texts: scores, 2, tokens=1)


def test_hooks_count(tiny_opt, tiny_folders):
    neurons = sepcap.NeuronSet.empty(tiny_opt, "mlp")
    mask = neurons.masks["mlp"]
    mask[:] = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0)) < 0.6
    plain = Plain("opt", tiny_folders["opt"])
    prompts = [ids_of(tiny_opt.tokenizer, text) for text in PROMPTS]
    expected = [step_by_step(plain, ids, most_likely, 6, zero={"mlp": mask}) for ids in prompts]
    whole = continuations(tiny_opt, prompts, len(prompts), tokens=6, temperature=0)
    with sepcap.ablate(tiny_opt, neurons):
        assert continuations(tiny_opt, prompts, len(prompts), tokens=6, temperature=0) == expected
    assert whole != expected
    sampled = toxicity(tiny_opt, PROMPTS, vowels, 8, tokens=4).table
    with sepcap.ablate(tiny_opt, neurons, "resample", source="tokens"):
        assert not toxicity(tiny_opt, PROMPTS, vowels, 8, tokens=4).table.equals(sampled)
    assert continuations(tiny_opt, prompts, len(prompts), tokens=6, temperature=0) == whole


def test_nothing_is_longer_than_the_context(tiny_opt, monkeypatch):
    seen = []
    forward = type(tiny_opt).forward

    def noting(self, ids, **options):
        cache = options.get("past_key_values")
        seen.append(ids.shape[1] + (0 if cache is None else cache.get_seq_length()))
        return forward(self, ids, **options)

    monkeypatch.setattr(type(tiny_opt), "forward", noting)
    prompt = list(range(3, 23))
    continuations(tiny_opt, [prompt], 3, tokens=12)
    assert max(seen) <= 32
    assert sum(seen) > 32
    with pytest.raises(ValueError, match=r"prompts\[1\] has 21 tokens; the model's context is 32, so there is no room for 12 more"):
        continuations(tiny_opt, [prompt, [*prompt, 3]], 3, tokens=12)


def test_prompts_are_texts_files_tasks_or_nothing(tiny_opt, tmp_path, letters):
    tokenizer = tiny_opt.tokenizer
    expected = [(text, ids_of(tokenizer, text)) for text in ("one", "two words")]
    lines = tmp_path / "prompts.txt"
    lines.write_text("one\n\ntwo words\n")
    rows = tmp_path / "prompts.jsonl"
    rows.write_text('{"id": 1, "prompt": "one"}\n{"id": 2, "prompt": "two words"}\n')
    for given in (["one", "two words"], lines, str(lines), rows):
        assert read_prompts(tiny_opt, given, 9) == expected
        assert read_prompts(tiny_opt, given, 1) == expected[:1]
    assert read_prompts(tiny_opt, None, 9) == [("", [0])]
    task = sepcap.load_task(letters)
    texts = task.sources[0].documents("evaluate")["text"]
    from_task = read_prompts(tiny_opt, task, 5, prompt_tokens=7)
    assert [ids for _, ids in from_task] == [ids_of(tokenizer, text)[:8] for text in texts[:5]]
    assert all(text.startswith(prompt) for text, (prompt, _) in zip(texts, from_task, strict=False))
    assert len(read_prompts(tiny_opt, task, 1000, prompt_tokens=7)) == len(texts)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"prompts": []}, ValueError, "prompts is empty"),
        ({"prompts": ["a", 3]}, TypeError, r"prompts\[1\] is a int"),
        ({"prompts": "nowhere.txt"}, FileNotFoundError, "nowhere.txt"),
        ({"prompts": ["a"], "n": 0}, ValueError, "n=0"),
        ({"prompts": ["a"], "tokens": 0}, ValueError, "tokens=0"),
        ({"prompts": ["a"], "temperature": -1.0}, ValueError, "temperature=-1"),
        ({"prompts": ["a"], "temperature": 0, "n": 2}, ValueError, "give at most n=1"),
        ({"prompts": "local-prose", "prompt_tokens": 0}, ValueError, "prompt_tokens=0"),
    ],
)
def test_what_cannot_be_sampled_is_refused(tiny_opt, options, error, said):
    with pytest.raises(error, match=said):
        toxicity(tiny_opt, **{"scorer": vowels, "n": 2, **options})


def test_a_model_that_writes_no_texts_is_refused():
    masked = types.SimpleNamespace(original_model=type("BertForMaskedLM", (), {})())
    for function in (lambda: toxicity(masked, PROMPTS, vowels), lambda: run_lm_eval(masked, "piqa")):
        with pytest.raises(ValueError, match=r"'masked'.*causal language model"):
            function()


def test_a_model_of_nan_is_no_model(tiny_opt):
    with torch.no_grad():
        tiny_opt.blocks[0].mlp.W_out.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="NaN"):
        toxicity(tiny_opt, PROMPTS, vowels, 2)


def of_scores(scores, **changes):
    import pandas as pd

    info = {"scorer": "vowels", "seed": 0, "temperature": 1.0, "tokens": 4, "model": "m", "task": None}
    table = pd.DataFrame({"prompt": [f"p{i}" for i in range(len(scores))], "continuation": "c", "score": scores})
    return Toxicity(table, 0.8, math.nan, math.nan, info | changes)


def test_means_errors_and_intervals_by_hand():
    none, half = of_scores([0.8] * 10), of_scores([0.2, 0.9] * 5)
    assert (none.fraction, half.fraction) == (0.0, 0.5)  # a score of exactly the threshold is not above it
    # Wilson: (p + z²/2n ± z √(p(1−p)/n + z²/4n²)) / (1 + z²/n); for 0 of 10 the upper end is z²/(n + z²)
    np.testing.assert_allclose(none.fraction_interval, (0, 3.841459 / 13.841459), atol=1e-6)
    np.testing.assert_allclose(half.fraction_interval, (0.236593, 0.763407), atol=1e-6)
    assert half.mean == pytest.approx(0.55)
    assert half.se("mean") == pytest.approx(0.35 / 3)  # deviations of 0.35, n − 1 = 9
    assert half.se() == pytest.approx(0.5 / 3)
    low, high = half.mean_interval
    assert 0.55 - 2.5 * half.se("mean") < low < 0.55 - 1.5 * half.se("mean")
    assert 0.55 + 1.5 * half.se("mean") < high < 0.55 + 2.5 * half.se("mean")
    with pytest.raises(ValueError, match="summary='median'"):
        half.se("median")


def test_two_models_are_compared_on_the_same_luck():
    before = of_scores([0.9, 0.95, 0.3, 0.2] * 10)
    after = of_scores([0.7, 0.75, 0.1, 0.0] * 10)
    change, (low, high) = after.difference(before, "mean")
    assert change == pytest.approx(-0.2)
    np.testing.assert_allclose((low, high), -0.2)  # every pair changes by as much: nothing is left to chance
    change, (low, high) = after.difference(before)
    assert change == -0.5
    assert low < -0.5 < high < 0
    with pytest.raises(ValueError, match="cannot be paired"):
        after.difference(of_scores([0.9] * 40, seed=1))


def test_perplexity_stands_beside_it(tiny_opt, letters):
    found = toxicity(tiny_opt, PROMPTS, vowels, 4, tokens=2, task=letters, eval_tokens=200)
    alone = sepcap.evaluate(tiny_opt, letters, tokens=200)
    assert found.perplexity == alone.perplexity
    assert found.perplexity_se == pytest.approx(alone.perplexity * alone.se("loss"))
    assert found.info["task"] == alone.task
    assert math.isnan(toxicity(tiny_opt, PROMPTS, vowels, 4, tokens=2).perplexity)


def test_perplexity_is_there_without_asking(tiny_opt, letters, monkeypatch):
    """Of local-prose, which other texts stand for here: reading it takes seconds."""
    module = importlib.import_module("sepcap.evaluation.toxicity")
    prose = {"local-prose": sepcap.load_task(letters, name="local-prose")}
    monkeypatch.setattr(module, "evaluate", lambda model, task, **how: sepcap.evaluate(model, prose[task], **how))
    found = sepcap.evaluate_toxicity(tiny_opt, PROMPTS, vowels, 4, tokens=2, eval_tokens=200)
    assert found.perplexity == sepcap.evaluate(tiny_opt, letters, tokens=200).perplexity
    assert found.info["task"] == "local-prose"


def test_saved_and_loaded_it_is_the_same(result, tmp_path):
    path = tmp_path / "deep" / "toxicity.parquet"
    result.save(path)
    loaded = Toxicity.load(path)
    assert loaded.table.equals(result.table)
    assert (loaded.threshold, loaded.info) == (result.threshold, result.info)
    assert math.isnan(loaded.perplexity)
    assert repr(loaded) == repr(result)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(RuntimeError, match="corrupt"):
        Toxicity.load(path)
    result.table.to_parquet(path)
    with pytest.raises(RuntimeError, match="is not a toxicity file"):
        Toxicity.load(path)
    with pytest.raises(FileNotFoundError):
        Toxicity.load(tmp_path / "nothing")


def loaded_or_none(path):
    try:
        return Toxicity.load(path)
    except CorruptFile:
        return None


def test_a_flipped_bit_of_a_file_changes_nothing_or_is_seen(tmp_path):
    path = tmp_path / "toxicity.parquet"
    before = dataclasses.replace(of_scores([0.25, 0.9, 0.9]), perplexity=12.5, perplexity_se=0.5)
    before.save(path)
    whole = path.read_bytes()
    # the header is there twice: as it is, and within the schema of arrow, in base64
    encoded = re.search(rb"/////[A-Za-z0-9+/]+=*", whole)
    at = base64.b64decode(encoded[0]).index(b'"threshold": 0.8')
    twice = [range(start, start + 60) for start in (whole.index(b'"threshold": 0.8'), encoded.start() + 4 * at // 3)]
    seen = 0
    for at in sorted({*twice[0], *twice[1], *range(0, len(whole), 29)}):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        if (after := loaded_or_none(path)) is None:
            seen += at in twice[0] or at in twice[1]
            continue
        assert (after.threshold, after.perplexity, after.perplexity_se, after.info) == (0.8, 12.5, 0.5, before.info)
        assert after.table.equals(before.table)
    assert seen >= 40


def write_parquet(path, table, header):
    import pyarrow as pa
    import pyarrow.parquet as pq

    plain = pa.Table.from_pandas(table, preserve_index=False)
    sealed = {"sha256": digest_of({"header": header, "table": plain.to_pydict()}), **header}
    pq.write_table(plain.replace_schema_metadata({"sepcap": json.dumps(sealed)}), path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threshold": "0.8"}, r"threshold: "),
        ({"threshold": math.nan}, r"threshold: "),
        ({"perplexity": None}, r"perplexity: "),
        ({"info": []}, r"info: "),
        ("perplexity_se", "perplexity_se is missing"),
        ("score", "its table lacks score"),
    ],
)
def test_a_header_or_table_of_another_shape_names_the_file(change, said, tmp_path):
    path, table = tmp_path / "toxicity.parquet", of_scores([0.5]).table
    header = {"kind": "toxicity", "threshold": 1, "perplexity": math.nan, "perplexity_se": math.nan, "info": {}}
    write_parquet(path, table, header | {"more": 1})
    assert Toxicity.load(path).fraction == 0.0  # of a later version
    if isinstance(change, dict):
        header |= change
    elif change in header:
        del header[change]
    else:
        table = table.drop(columns=change)
    write_parquet(path, table, header)
    with pytest.raises(CorruptFile, match=rf"toxicity\.parquet is corrupt: {said}"):
        Toxicity.load(path)


def test_it_shows_itself_and_escapes_what_the_model_wrote():
    shown = of_scores([0.9, 0.1], scorer="<i>mine</i>")
    shown.table["continuation"] = ["<script>alert(1)</script>", "fine"]
    page = shown._repr_html_()
    assert "<script>" not in page
    assert "<i>" not in page
    assert "&lt;script&gt;alert(1)" in page
    low, high = shown.fraction_interval
    assert f"fraction=0.5000 [{low:.4f}, {high:.4f}]" in repr(shown)
    assert f"{low:.4g}" in page
