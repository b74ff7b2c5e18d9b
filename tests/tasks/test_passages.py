"""Passages: where a break lies among tokens, whatever the tokenizer makes of it."""

import pytest
from conftest import tiny_tokenizer

import sepcap
from sepcap.tasks.passages import Passage, passages, sample_passages


def made(pieces):
    """A tokenizer whose words are given pieces, the longest first."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    whole = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(["<unk>", *pieces])}, unk_token="<unk>"))
    pattern = "|".join(piece.replace(".", "\\.") for piece in sorted(pieces, key=len, reverse=True))
    whole.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    return PreTrainedTokenizerFast(tokenizer_object=whole, unk_token="<unk>", eos_token="<unk>")


def spelled(tokenizer, text, **options):
    (found,) = passages(tokenizer, [text], **options)
    return tuple([tokenizer.decode([token]) for token in part] for part in (found.context, found.gap, found.following))


@pytest.mark.parametrize(
    ("pieces", "text", "expected"),
    [
        (["a", "b", "\n\n"], "ab\n\nba", (["a", "b"], ["\n\n"], ["b", "a"])),
        (["a", "b", "\n"], "ab\n\nba", (["a", "b"], ["\n", "\n"], ["b", "a"])),
        (["a", "b", ".\n\n"], "ab.\n\nba", (["a", "b"], [".\n\n"], ["b", "a"])),
        (["a", "b", "\n\n   ", " "], "ab\n\n    ba", (["a", "b"], ["\n\n   "], [" ", "b", "a"])),
        (["a", "b", ".\n", "\n   "], "ab.\n\n   ba", (["a", "b"], [".\n", "\n   "], ["b", "a"])),
        # line ends after the break are part of it
        (["a", "b", "\n\n", "\n"], "ab\n\n\nba", (["a", "b"], ["\n\n", "\n"], ["b", "a"])),
    ],
)
def test_all_tokens_with_a_part_of_the_break_belong_to_it(pieces, text, expected):
    assert spelled(made(pieces), text) == expected


def test_the_last_break_that_a_paragraph_follows_is_taken():
    tokenizer = made(["a", "b", "c", "\n\n"])
    text = "a\n\nbb\n\nccc\n\n"
    assert spelled(tokenizer, text) == (["a", "\n\n", "b", "b"], ["\n\n"], ["c", "c", "c"])
    assert spelled(tokenizer, text, which=0) == (["a"], ["\n\n"], ["b", "b"])  # and the paragraph ends at the next break
    assert spelled(tokenizer, text, which=-2) == (["a"], ["\n\n"], ["b", "b"])
    assert spelled(tokenizer, text, most=2)[2] == ["c", "c"]
    with pytest.raises(ValueError, match=r"which=2: texts\[0\] has 2"):
        passages(tokenizer, [text], which=2)


def test_another_break_can_be_asked_for():
    assert spelled(made(["a", "b", "\n"]), "a\nbb", at="\n") == (["a"], ["\n"], ["b", "b"])


@pytest.mark.parametrize("text", ["no break", "\n\nnothing before", "nothing after\n\n", "one\nline end", ""])
def test_a_text_without_a_break_is_refused_by_its_number(text):
    with pytest.raises(ValueError, match=r"texts\[1\] has no '\\n\\n' with text before and after it"):
        passages(tiny_tokenizer(), ["a\n\nb", text])


def test_what_is_no_text_is_refused():
    with pytest.raises(TypeError, match=r"texts\[0\] is a int"):
        passages(tiny_tokenizer(), [3])
    with pytest.raises(ValueError, match="at is empty"):
        passages(tiny_tokenizer(), ["a\n\nb"], at="")


def test_the_tokens_are_those_of_the_whole_text():
    tokenizer = tiny_tokenizer()
    text = "Größe, the quick\n\nbrown – fox"
    (found,) = passages(tokenizer, [text])
    assert [*found.context, *found.gap, *found.following] == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(found.context) == "Größe, the quick"
    assert tokenizer.decode(found.following) == "brown – fox"


def test_passages_of_a_task_have_the_lengths_asked_for_and_come_from_the_evaluation_part():
    tokenizer = tiny_tokenizer()
    texts = [f"{'the quick brown fox ' * 9}{i}\n\n{'self None ' * 3}\n\n{'lazy dog ' * 12}{i}" for i in range(12)]
    task = sepcap.load_task(texts, name="foxes")
    found = sample_passages(tokenizer, [task], 4, context=20, following=11)
    assert len(found) == 4
    held_out = task.sources[0].documents("evaluate")["text"]
    assert len(held_out) >= 4
    for passage, text in zip(found, held_out, strict=False):
        assert (len(passage.context), len(passage.following), passage.kind) == (20, 11, "foxes")
        written = tokenizer.decode([*passage.context, *passage.gap, *passage.following])
        assert written in text
        assert "\n\n" in written
    # "self None self None self None" is too short, so it is a part of the context
    assert all("self None" in tokenizer.decode(p.context) for p in found)


def test_too_few_passages_are_an_error_that_says_how_many_there_are():
    task = sepcap.load_task([f"the quick {i}\n\nbrown fox" for i in range(10)], name="foxes")
    with pytest.raises(ValueError, match=r"'foxes' has \d documents .* after 4 tokens and before a paragraph of 2, and n=50"):
        sample_passages(tiny_tokenizer(), [task], 50, context=4, following=2)
    with pytest.raises(ValueError, match="context=0"):
        sample_passages(tiny_tokenizer(), [task], 1, context=0)


def test_a_passage_is_hashable_and_says_its_kind():
    assert Passage((1,), (2,), (3,)) == Passage((1,), (2,), (3,), "texts")
    assert len({Passage((1,), (2,), (3,)), Passage((1,), (2,), (3,), "other")}) == 2
