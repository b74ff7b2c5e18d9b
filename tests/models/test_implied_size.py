"""A configuration that implies what cannot be is refused before anything of that size is made."""

import json
import os

import pytest

from sepcap.errors import CorruptFile
from sepcap.models.loading.implied_size import check_size


def folder_of(tmp_path, **config):
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 320} | config))
    return tmp_path


HUGE = [{"num_hidden_layers": 10**9}, {"hidden_size": 10**7}, {"text_config": {"n_layer": 10**8}}, {"vocab_size": 10**10}]


@pytest.mark.parametrize("config", HUGE, ids=str)
def test_sizes_beyond_the_weights_are_refused(tmp_path, config):
    with pytest.raises(CorruptFile, match=r"config\.json implies at least .* the weights next to it have 118,000 bytes"):
        check_size(folder_of(tmp_path, **config), 118_000)
    check_size(folder_of(tmp_path), 118_000)
    check_size(folder_of(tmp_path), 0)


@pytest.mark.parametrize("content", ["[" * 100_000, "{", "9" * 5000])
def test_a_configuration_that_is_no_json_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(CorruptFile, match=r"config\.json is corrupt"):
        check_size(tmp_path, 1)


def test_a_configuration_that_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(CorruptFile, match=r"config\.json is a FIFO"):
        check_size(tmp_path, 1)
