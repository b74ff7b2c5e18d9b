"""Texts compared: embedders of every kind, distances by hand, shared tokens."""

import sys

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, tiny_tokenizer

from sepcap.evaluation import texts
from sepcap.evaluation.texts import TF_IDF_NAME, bigrams_found, cosine_distance, embed, get_embedder, probe, unigram_f1

CORPUS = ["the quick brown fox", "the lazy dog", "the end"]


def test_cosine_distance_by_hand():
    a = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0], [0.0, 0.0]])
    b = np.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]])
    np.testing.assert_allclose(cosine_distance(a, b), [0, 1 - np.sqrt(0.5), 2, 1], atol=1e-12)


def test_tf_idf_is_that_of_scikit_learn_and_says_what_it_is():
    from sklearn.feature_extraction.text import TfidfVectorizer

    fit, name = get_embedder("tf-idf")
    embedder = fit(CORPUS)
    assert name == TF_IDF_NAME
    assert "no sentence embeddings" in name
    found = embed(embedder, ["quick fox", "nothing known", "the fox, the fox"])
    # rows have length 1 or 0; words of the corpus alone count, rare ones more: idf = ln((1 + n)/(1 + df)) + 1, tf = 1 + ln(count)
    idf = {"quick": np.log(4 / 2) + 1, "fox": np.log(4 / 2) + 1, "the": 1.0}
    words = sorted({word for text in CORPUS for word in text.split()})
    first = np.array([idf.get(word, 0.0) if word in ("quick", "fox") else 0.0 for word in words])
    np.testing.assert_allclose(found[0], first / np.linalg.norm(first))
    np.testing.assert_allclose(found[1], 0)
    third = np.array([idf[word] * (1 + np.log(2)) if word in ("the", "fox") else 0.0 for word in words])
    np.testing.assert_allclose(found[2], third / np.linalg.norm(third))
    assert TfidfVectorizer().fit(CORPUS).get_feature_names_out().tolist() == words


def test_without_a_model_at_hand_auto_is_tf_idf_by_name(monkeypatch):
    monkeypatch.setattr(texts, "SENTENCES", "nobody/has-this-model")
    assert get_embedder("auto")[1] == TF_IDF_NAME
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    assert get_embedder("auto")[1] == TF_IDF_NAME


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A tiny BERT with mean pooling, saved as sentence-transformers saves."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers import models as parts
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=64, pad_token_id=1, **sizes)).save_pretrained(folder / "bert")
    tiny_tokenizer().save_pretrained(folder / "bert")
    word = parts.Transformer(str(folder / "bert"), max_seq_length=32)
    made = SentenceTransformer(modules=[word, parts.Pooling(16, pooling_mode="mean")], device="cpu")
    made.save(str(folder / "sentences"))
    return folder / "sentences"


def test_a_sentence_transformers_folder_gives_the_mean_of_its_token_vectors(sentences):
    from transformers import AutoModel

    fit, name = get_embedder(sentences)
    assert name == "sentences"
    found = embed(fit([]), ["the quick fox", "dog", "the quick fox"])
    assert found.shape == (3, 16)
    np.testing.assert_array_equal(found[0], found[2])
    bert = AutoModel.from_pretrained(sentences).eval()
    ids = torch.tensor([tiny_tokenizer()("the quick fox", add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        expected = bert(input_ids=ids).last_hidden_state[0].mean(0)
    np.testing.assert_allclose(found[0], expected.numpy(), atol=1e-5)


def test_auto_takes_the_sentence_model_where_it_lies_on_the_machine(sentences, monkeypatch):
    monkeypatch.setattr(texts, "SENTENCES", str(sentences))
    assert get_embedder("auto")[1] == str(sentences)


def test_what_is_not_there_is_an_error_that_names_the_way_out(monkeypatch, tmp_path):
    with pytest.raises(OSError, match=r"embedder='nobody/none' .*'tf-idf' needs no model"):
        get_embedder("nobody/none")
    monkeypatch.setattr(texts, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"sepcap\[embeddings\]"):
        get_embedder("nobody/none")
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ImportError, match=r"sepcap\[embeddings\]"):
        get_embedder("tf-idf")


def test_a_function_embeds_each_text_once_and_is_checked():
    asked = []

    def lengths(batch):
        asked.extend(batch)
        return [[len(text), 1] for text in batch]

    fit, name = get_embedder(lengths)
    assert name == "function lengths"
    np.testing.assert_array_equal(embed(fit([]), ["aa", "b", "aa"]), [[2, 1], [1, 1], [2, 1]])
    assert asked == ["aa", "b"]
    for wrong in (lambda batch: [1.0] * len(batch), lambda batch: [[1.0]], lambda batch: [[np.nan]] * len(batch)):
        with pytest.raises(ValueError, match="one vector of finite numbers for each"):
            embed(wrong, ["a", "b"])


def test_nothing_is_embedded_where_nobody_asks():
    assert get_embedder(None) == (None, None)


def test_a_probe_tells_embedders_apart_by_what_they_do(sentences, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    def of(embedder):
        return probe(get_embedder(embedder)[0])

    assert of(lambda batch: [[len(text), 1] for text in batch]) == of(lambda batch: [[3.0 * len(text), 3.0] for text in batch])
    assert of(lambda batch: [[len(text), 1] for text in batch]) != of(lambda batch: [[text.count("o"), 1] for text in batch])
    # vectors of nothing are at distance 1; at right angles, too; turned around, distances stay
    assert of(lambda batch: [[0.0]] * len(batch)) == of(lambda batch: np.eye(len(batch))) == [1.0] * 6
    turn = np.array([[0.6, 0.8], [-0.8, 0.6]])
    assert of(lambda batch: [[len(text), 9] for text in batch]) == of(lambda batch: np.array([[len(text), 9] for text in batch]) @ turn)
    with pytest.raises(ValueError, match="one vector of finite numbers"):
        of(lambda batch: [[1.0]])
    # a folder of the same name with other weights
    assert of(sentences) == of(sentences)
    other = shutil.copytree(sentences, tmp_path / "sentences")
    (path,) = other.rglob("model.safetensors")
    weights = load_file(path)
    name = next(key for key in weights if "word_embeddings" in key)
    save_file({**weights, name: weights[name].flip(0)}, path, {"format": "pt"})
    assert get_embedder(other)[1] == get_embedder(sentences)[1]
    assert of(other) != of(sentences)


def test_overlap_by_hand():
    assert unigram_f1([1, 1, 2, 3], [1, 3, 3]) == pytest.approx(2 * 2 / 7)
    assert unigram_f1([1, 2], [1, 2]) == 1
    assert unigram_f1([], [1]) == 0
    assert bigrams_found([1, 2, 1, 2], [1, 2, 3, 1, 2]) == pytest.approx(1 / 3)  # 12, 23, 31
    assert bigrams_found([], [1, 2]) == 0
    assert np.isnan(bigrams_found([1, 2], [1]))
