"""What a backend may be; that of HookedTransformer is tried in tests/hooked_transformer, where transformer-lens has one."""

from importlib.metadata import version

import pytest

import sepcap

FOUR = int(version("transformer-lens").split(".")[0]) >= 4


@pytest.mark.skipif(not FOUR, reason="transformer-lens 3 has HookedTransformer")
def test_a_line_without_hooked_transformers_says_which_has_them(tiny_folders):
    with pytest.raises(ImportError, match=r"HookedTransformer, which was removed in 4\.0.*transformer-lens>=3\.9,<4"):
        sepcap.load_model(tiny_folders["opt"], backend="hooked")


@pytest.mark.parametrize("backend", ["hocked", None, dict, 3])
def test_another_backend_is_refused_before_anything_is_read(backend):
    with pytest.raises(ValueError, match=r"backend=.*give 'bridge', 'hooked', or a subclass"):
        sepcap.load_model("no/such/model/anywhere", backend=backend)
