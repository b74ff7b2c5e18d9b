"""What a backend may be; that of HookedTransformer is tried in tests/hooked_transformer, where transformer-lens has one."""

from types import SimpleNamespace

import pytest

import sepcap
from sepcap.models import hooked_transformers


@pytest.mark.skipif(hooked_transformers.line() < 4, reason="transformer-lens 3 has HookedTransformer")
def test_a_line_without_hooked_transformers_says_which_has_them(tiny_folders):
    with pytest.raises(ImportError, match=r"HookedTransformer, which was removed in 4\.0.*transformer-lens>=3\.9,<4"):
        sepcap.load_model(tiny_folders["opt"], backend="hooked")


@pytest.mark.parametrize("backend", ["hocked", None, dict, 3])
def test_another_backend_is_refused_before_anything_is_read(backend):
    with pytest.raises(ValueError, match=r"backend=.*give 'bridge', 'hooked', or a subclass"):
        sepcap.load_model("no/such/model/anywhere", backend=backend)


@pytest.mark.parametrize("model_type", ["deepseek_v3", "qwen3_5_text"])
def test_bridges_of_the_older_line_that_compute_something_else_are_refused(model_type, monkeypatch):
    config = SimpleNamespace(model_type=model_type)
    monkeypatch.setattr(hooked_transformers, "line", lambda: 4)
    hooked_transformers.check_line(config, "name")
    monkeypatch.setattr(hooked_transformers, "line", lambda: 3)
    with pytest.raises(NotImplementedError, match=f"computes a {model_type} differently"):
        hooked_transformers.check_line(config, "name")
