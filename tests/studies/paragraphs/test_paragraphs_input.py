"""What a transfer is given: numbers, layers, passages of one's own, line ends typed in a shell."""

import numpy as np
import pytest
import torch

from sepcap.studies.paragraphs.config import ParagraphTransferConfig
from sepcap.studies.paragraphs.study import plan_paragraph_transfer, transfer_paragraphs
from sepcap.tasks.passages import Passage, check_passage


def changed(thing, **parts):
    """With parts of any type, as it can be made where types are not enforced."""
    for name, value in parts.items():
        object.__setattr__(thing, name, value)
    return thing


def made(**parts):
    return changed(Passage((4,), (5,), (6,)), **parts)


def test_what_types_refuse_in_tests_is_refused_in_words_elsewhere(tiny_opt):
    for layers in ([0.5], 1, None, [[1]], [0, True]):
        with pytest.raises(TypeError, match="layers="):
            changed(ParagraphTransferConfig(), layers=layers).__post_init__()
    for layers in (np.arange(3), range(3), [0, 1, 2]):
        config = changed(ParagraphTransferConfig(), layers=layers)
        config.__post_init__()
        assert config.layers == (0, 1, 2)
    for options in ({"scale": "1"}, {"tokens": "5"}, {"temperature": None}, {"seed": 0.5}, {"which": "last"}):
        ((name, value),) = options.items()
        with pytest.raises(TypeError, match=f"{name}={value!r}: give a "):
            changed(ParagraphTransferConfig(), **options).__post_init__()
    for options, said in (({"layers": "last"}, "layers='last'"), ({"sites": ("mpl",)}, "Did you mean 'mlp'")):
        with pytest.raises(ValueError, match=said):
            changed(ParagraphTransferConfig(), **options).__post_init__()
    with pytest.raises(TypeError, match="texts=3: give a text, several texts, or passages"):
        plan_paragraph_transfer(tiny_opt, ParagraphTransferConfig(texts=3))
    with pytest.raises(ValueError, match=r"tasks=\(\): give a tuple of at least one"):
        ParagraphTransferConfig(tasks=())
    with pytest.raises(TypeError, match=r"source\[0\]\.gap=5: give token ids"):
        check_passage(made(gap=5), "source[0]", 100)


def test_passages_in_lists_are_those_in_tuples(tiny_opt):
    options = {"generate": False, "profile": "none"}
    plain = [Passage((4, 5), (6,), (7, 8)), Passage((5, 6), (6,), (8, 9))]
    lists = [made(context=list(p.context), gap=list(p.gap), following=np.array(p.following)) for p in plain]
    assert [check_passage(p, "source", 100) for p in lists] == plain
    found = [transfer_paragraphs(tiny_opt, texts=some, **options).tensors["log_likelihood"] for some in (lists, plain)]
    torch.testing.assert_close(*found)


def test_line_ends_can_be_typed_in_a_shell():
    import tyro

    from sepcap.cli import paragraphs as cli_paragraphs

    def read(*arguments):
        return tyro.cli(cli_paragraphs.Paragraphs, args=list(arguments))

    assert (read().at, read().into) == ("\n\n", "\n\n")
    assert read("--at", r"\n", "--into", r"So:\t\\n\n").at == "\n"
    assert read("--at", r"\n", "--into", r"So:\t\\n\n").into == "So:\t\\n\n"
    assert read("--at", "\n\n\n").at == "\n\n\n"
    for text in ("\n\n", "a\tb\\n", "\\\\t"):
        assert cli_paragraphs.typed(cli_paragraphs.as_typed(text)) == text


def test_the_help_shows_line_ends_in_letters(capsys):
    from sepcap.cli.main import main

    with pytest.raises(SystemExit):
        main(["paragraphs", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert said.count(r"(default: '\n\n')") == 2
    assert said.count("default is two line ends") == 2
