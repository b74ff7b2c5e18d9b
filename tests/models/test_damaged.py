"""A model folder that cannot be right ends in one sentence at load: the folder, the file or field, what came, what would be right."""

import json
import re
import shutil
import warnings

import pytest
from safetensors.torch import load_file, save_file

import sepcap
from sepcap.errors import CorruptFile


@pytest.fixture
def folder(tiny_folders, tmp_path):
    """A copy of the tiny OPT's folder, to be damaged."""
    return shutil.copytree(tiny_folders["opt"], tmp_path / "a model")


def with_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def with_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def said_of(folder):
    """The error of loading it: one sentence of the package's own that names the folder."""
    with pytest.raises((ValueError, RuntimeError, OSError)) as raised:
        sepcap.load_model(folder, device="cpu")
    said = str(raised.value)
    assert str(folder) in said
    assert "\n" not in said
    assert type(raised.value) is not RuntimeError  # which is what a library's own would be
    return said


FIELDS = [
    ("num_hidden_layers", 0, "give a whole number, 1 or more"),
    ("num_attention_heads", -1, "give a whole number, 1 or more"),
    ("hidden_size", "32", "expected int, got str.* a valid value is 768, the default of OPTConfig"),
    ("hidden_size", None, "a valid value is 768"),
    ("activation_function", "rleu", "a valid value is 'relu', the default of OPTConfig"),
    ("dropout", "x", "a valid value is 0.1"),
    ("do_layer_norm_before", "yes", "a valid value is True"),
    ("dtype", "float33", "leave it out"),
    ("vocab_size", 100, "320 would fit"),
    ("ffn_dim", 71, "72 would fit"),
    ("num_hidden_layers", 1, r"further layers: model\.decoder\.layers\.1\.fc1\.bias"),
]


@pytest.mark.parametrize(("field", "value", "right"), FIELDS, ids=str)
def test_a_field_that_cannot_be_is_named_with_what_would_be_right(folder, field, value, right):
    said = said_of(with_config(folder, **{field: value}))
    assert f"config.json has {field}={value!r}" in said or f"config.json, which has {field}={value!r}" in said
    assert re.search(right, said)


def test_fields_that_do_not_fit_each_other_blame_none_of_them(folder):
    assert "no model can be built from its config.json (embed_dim must be divisible" in said_of(with_config(folder, num_attention_heads=5))


FILES = [
    ("tokenizer.json", "{}", r"its tokenizer cannot be read \(tokenizer\.json: Model missing.*\(\.\.\., tokenizer=\.\.\.\)"),
    ("tokenizer.json", '{"version": "1.0", "model', r"\(tokenizer\.json: Unterminated string"),
    ("tokenizer.json", "[1, 2]", r"\(tokenizer\.json: invalid type"),
    ("tokenizer_config.json", "{", r"its tokenizer cannot be read \(tokenizer_config\.json: Expecting property name"),
    ("config.json", "[]", r"config\.json is corrupt \(it holds a list"),
    ("config.json", "{}", r"no model can be built from its config\.json .*`model_type` key"),
    ("config.json", '{"model_type": "optt"}', "model type `optt` but Transformers does not recognize"),
    ("model.safetensors.index.json", "{}", r"its weights cannot be read \(KeyError: 'weight_map'\)"),
    ("model.safetensors", "", "weights are corrupt or truncated|no weights next to it"),
]


@pytest.mark.parametrize(("name", "content", "says"), FILES)
def test_a_file_that_cannot_be_read_is_named(folder, name, content, says):
    if "index" in name:
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(content)
    assert re.search(says, said_of(folder))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_file_that_is_missing_is_named(folder, name):
    (folder / name).unlink()
    assert ("no tokenizer" if name == "tokenizer.json" else name) in said_of(folder)


def test_weights_that_end_early_are_named(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "weights are corrupt or truncated" in said_of(folder)


def test_a_weight_that_is_missing_is_named(folder):
    with_weights(folder, lambda weights: weights.pop("model.decoder.layers.1.fc1.weight"))
    assert "lacks weights of its architecture, OPTForCausalLM, which would be random numbers: model.decoder.layers.1.fc1.weight" in said_of(
        folder
    )


def test_weights_of_another_architecture_are_named(folder):
    said = said_of(with_config(folder, model_type="llama", architectures=["LlamaForCausalLM"]))
    assert "lacks weights of its architecture, LlamaForCausalLM" in said
    assert "; it has others, such as model.decoder." in said


def test_a_weight_without_a_place_is_told_of_at_the_line_that_loads(folder):
    with_weights(folder, lambda weights: weights.update(extra=weights["model.decoder.final_layer_norm.bias"].clone()))
    with pytest.warns(UserWarning, match="OPTForCausalLM, does not use; they are ignored: extra") as told:
        sepcap.load_model(folder, device="cpu")
    assert [warning.filename for warning in told] == [__file__]


def test_a_whole_folder_says_nothing(folder):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sepcap.load_model(folder, device="cpu")
    assert [str(warning.message) for warning in told] == []


def test_random_weights_of_a_field_that_cannot_be(folder):
    with_config(folder, activation_function="rleu")
    with pytest.raises(CorruptFile, match=r"activation_function='rleu', with which no model can be built \(KeyError: 'rleu'\)"):
        sepcap.load_model(folder, device="cpu", random_weights=True)
