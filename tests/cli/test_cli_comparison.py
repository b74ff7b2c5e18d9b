"""`sepcap demo` where there are no continuations or no areas: what there is gets printed and drawn all the same."""

import random

import pytest
from conftest import words
from encoders import save_masked, save_vit

import sepcap
from sepcap import plots
from sepcap.cli.main import main


@pytest.fixture(autouse=True)
def pages_only(monkeypatch):
    """As where there is no browser for SVG and PNG."""
    save = plots.save

    def save_page(figure, path, **options):
        if path.suffix != ".html":
            raise ImportError("no browser")
        save(figure, path, **options)

    monkeypatch.setattr(plots, "save", save_page)


def compare(tmp_path, model, forget, retain, **options):
    options = {"fractions": "mlp=0.5", "steps": "2", "tokens": "100", "eval-tokens": "200", "baseline-seeds": "2", **options}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    main(
        ["demo", "--model", str(model), "--forget", str(forget), "--retain", str(retain), *arguments, "--out", str(tmp_path / "c")]
    )
    return {path.stem for path in (tmp_path / "c" / "figures").glob("*.html")}


def a_file(folder, name, texts):
    (folder / f"{name}.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return folder / f"{name}.jsonl"


PICTURES = {"trajectory", "metric", "areas", "pruned", "threshold", "scores"}


@pytest.mark.thorough
def test_masked_language_models(tmp_path, capsys):
    letters, digits = a_file(tmp_path, "letters", words(0)), a_file(tmp_path, "digits", words(0, alphabet="012"))
    drawn = compare(tmp_path, save_masked("roberta", tmp_path / "model"), letters, digits, **{"eval-tokens": "800"})
    printed = capsys.readouterr().out
    assert "predicts masked tokens, so there is no text to continue" in printed
    assert "forget letters" in printed
    assert drawn == PICTURES


@pytest.mark.slow
def test_image_classifiers(tmp_path, capsys):
    drawn = compare(tmp_path, save_vit(tmp_path / "model"), "local-digits-low", "local-digits-high")
    assert "predicts labels of images, so there is no text to continue" in capsys.readouterr().out
    assert drawn >= PICTURES - {"trajectory", "areas"}  # which an untrained model may have nothing for


@pytest.mark.thorough
def test_a_task_that_the_unpruned_model_gets_nothing_of(tmp_path, trained_folder, capsys):
    rng = random.Random(0)
    strange = ["".join(rng.choices("QXZJ", k=60)) for _ in range(40)]  # no word of which the model has seen
    letters, unknown = a_file(tmp_path, "letters", words(0)), a_file(tmp_path, "strange", strange)
    drawn = compare(tmp_path, trained_folder, letters, unknown)
    run = sepcap.Run.load(tmp_path / "c" / "forward")
    top1 = run.trajectory.set_index(["step", "role"]).top1
    assert top1[0, "retain"] == 0 < top1[0, "forget"]
    printed = capsys.readouterr().out
    row = next(line for line in printed.splitlines() if line.lstrip().startswith("forget letters"))
    assert f"{top1[0, 'forget']:.3f} → {top1[2, 'forget']:.3f}" in row
    assert "no separability of forget letters: top1 of the unpruned model is 0 on the retain task" in printed
    assert "(no figure 'areas': top1 of the unpruned model is 0" in printed
    assert "letters prompt, after forgetting letters" in printed
    assert drawn == PICTURES - {"trajectory", "areas"}
