"""Planted models of which it is known how fast a capability that was cut comes back (METHODS 22)."""

import planted_relearning as planted
import pytest

import sepcap
from sepcap.models.weights import fingerprint

pytestmark = pytest.mark.slow

HOW = {
    "parts": ("relearn",),
    "variants": ("all",),
    "seeds": (0, 1, 2),
    "lrs": (0.01,),
    "tokens": 2_000,
    "eval_tokens": 400,
    "checkpoints": (60, 120, 240, 360, 480, 600),
    "step_tokens": 60,
    "targets": (0.5,),
    "batch_size": 64,
    "progress": False,
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    return planted.cut(tmp_path_factory.mktemp("cut"))


def certified(cut, **what):
    return sepcap.certify(cut.model, forget=cut.texts_a, retain=cut.texts_b, reference=cut.never, **what, **HOW)


@pytest.fixture(scope="module")
def deleted(cut):
    return certified(cut, neurons=cut.a)


def test_a_circuit_that_was_deleted_needs_what_a_fresh_one_needs(deleted):
    found = deleted.target(0.5)
    assert not found["censored"]
    assert found["anamnesis_index_low"] <= 1 <= found["anamnesis_index_high"]
    assert found["anamnesis_index"] == pytest.approx(1, abs=0.1)
    assert any("no evidence of a trace" in sentence for sentence in deleted.summary())


def test_a_circuit_of_which_only_the_output_was_cut_is_back_in_a_few_steps_and_is_told_apart(cut, deleted):
    hidden = certified(cut, pruned=planted.output_cut(cut))
    before = hidden.tables["models"].set_index("kind")["forget"]
    assert before["pruned"] == pytest.approx(deleted.tables["models"].set_index("kind")["forget"]["pruned"], abs=0.01)
    assert hidden.target(0.5)["tokens"] < 0.4 * deleted.target(0.5)["tokens_low"]
    assert hidden.target(0.5)["anamnesis_index_high"] < deleted.target(0.5)["anamnesis_index_low"]
    assert any("a trace of it is left" in sentence for sentence in hidden.summary())


def test_a_backup_circuit_that_the_output_does_not_show_is_seen_in_relearning(deleted, tmp_path):
    backed = planted.cut(tmp_path, backup=0.4)
    found = certified(backed, neurons=backed.a)
    assert found.tables["models"].set_index("kind")["forget"]["pruned"] < 0.05
    assert found.target(0.5)["tokens_high"] < 0.5 * deleted.target(0.5)["tokens_low"]


def test_the_curve_of_the_untouched_model_does_not_fall_and_hardly_rises(deleted):
    """Not flat within its interval: more training on a task improves the model a little, here by 1%, and the interval is as narrow."""
    rows = deleted.tables["relearning"].query("kind == 'untouched'")
    assert len(rows) == len(HOW["checkpoints"]) + 1
    assert (rows["forget_high"] >= 1).all()
    assert (rows["forget_low"] <= 1.02).all()


def test_all_models_have_their_bits_back(cut, deleted):
    assert fingerprint(cut.model) == deleted.config["model_fingerprint"]
    assert fingerprint(cut.never) == deleted.config["reference"]
