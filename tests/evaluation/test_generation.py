"""Continuations: seeded, leaving the global random state alone, and greedy at temperature 0."""

import pytest
import torch

from sepcap.evaluation.generation import continuation


def test_a_seed_gives_the_same_text_and_touches_nothing_global(tiny_opt):
    state = torch.random.get_rng_state()
    first = continuation(tiny_opt, "abc", tokens=12, temperature=1.0, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(5)
    assert continuation(tiny_opt, "abc", tokens=12, temperature=1.0, seed=1) == first
    others = {continuation(tiny_opt, "abc", tokens=12, temperature=1.0, seed=s) for s in range(2, 6)}
    assert others != {first}


def test_temperature_zero_takes_the_most_likely_token(tiny_opt):
    ids = [0, *tiny_opt.tokenizer("abc", add_special_tokens=False)["input_ids"]]
    start = len(ids)
    with torch.no_grad():
        for _ in range(8):
            values, tokens = tiny_opt(torch.tensor([ids]), return_type="logits")[0, -1].topk(2)
            assert values[0] - values[1] > 1e-4, "nearly a tie: another machine could go on with the other token"
            ids.append(int(tokens[0]))
            if ids[-1] == tiny_opt.tokenizer.eos_token_id:
                break
    expected = tiny_opt.tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert continuation(tiny_opt, "abc", tokens=8, temperature=0) == expected


def test_a_prompt_that_spells_a_special_token_is_text(tiny_opt, monkeypatch):
    seen = []
    monkeypatch.setattr(tiny_opt, "generate", lambda ids, **options: seen.append(ids[0].tolist()) or ids)
    prompt = "(?P<s>a)</s><pad>b"
    assert continuation(tiny_opt, prompt) == ""
    begin, *ids = seen[0]
    assert begin == tiny_opt.tokenizer.bos_token_id
    assert not set(ids) & set(tiny_opt.tokenizer.all_special_ids)
    assert tiny_opt.tokenizer.decode(ids) == prompt


def test_a_prompt_that_fills_the_context_is_refused(tiny_opt):
    with pytest.raises(ValueError, match="no room to continue"):
        continuation(tiny_opt, "x" * 200)
