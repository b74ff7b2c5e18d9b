"""LaTeX of tables: intervals beside their values, everything escaped."""

import pandas as pd
import pytest

import sepcap
from sepcap.latex import escaped, latex_table

TABLE = pd.DataFrame(
    {
        "task_name": ["a_b & 50%", "C<T>"],
        "n": [1200, -3],
        "drop": [0.34, -0.1],
        "drop_low": [0.27, float("nan")],
        "drop_high": [0.42, 0.03],
        "loss": [1234.5, 0.001],
    }
)


def test_intervals_stand_beside_their_values():
    lines = latex_table(TABLE, digits=2).splitlines()
    assert lines[0] == r"\begin{tabular}{lrrr}"
    assert lines[1:3] == [r"\toprule", r"task name & n & drop & loss \\"]
    assert lines[4] == r"a\_b \& 50\% & 1,200 & 0.34 [0.27, 0.42] & 1234 \\"
    assert lines[5] == r"C\textless{}T\textgreater{} & $-$3 & $-$0.10 [--, 0.03] & 0 \\"
    assert lines[-2:] == [r"\bottomrule", r"\end{tabular}"]


def test_columns_can_be_chosen_and_a_caption_makes_it_a_float():
    made = latex_table(TABLE, ["drop"], caption="50% of C", label="tab:drop")
    assert r"\caption{50\% of C}" in made
    assert r"\label{tab:drop}" in made
    assert "task" not in made
    assert "0.340 [0.270, 0.420]" in made


def test_bad_columns_and_digits():
    with pytest.raises(ValueError, match="columns: 'drp' is not in the table, which has task_name, n, drop"):
        latex_table(TABLE, ["drp"])
    with pytest.raises(ValueError, match="digits=0: give at least 1"):
        latex_table(TABLE, digits=0)


def test_no_character_of_a_text_is_a_command():
    assert escaped("\\{}$&%#_~^<>") == (
        r"\textbackslash{}\{\}\$\&\%\#\_\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"
    )


def test_every_kind_of_result_has_its_table(tmp_path, trained, letters, digits):
    run = sepcap.prune(
        trained,
        sepcap.PruningConfig(forget=letters, retain=digits, fractions={"mlp": 9}, steps=2, tokens=200, eval_tokens=200, context=16),
        out=tmp_path / "run",
    )
    for result, words in (
        (run, "pruned mlp & forget & retain"),
        (run.scores(), "layer & neuron & score"),
        (run.neurons(1), "site & layer & neuron"),
        (sepcap.evaluate(trained, letters, tokens=200, context=16), "metric & "),
        (sepcap.compare_ablations(trained, task=letters, layer=0, head=1, kinds=("zero",), tokens=100, context=16), "delta loss"),
    ):
        made = result.to_latex()
        assert words in made, result
        assert made.count(r"\toprule") == made.count(r"\bottomrule") == 1
    assert "[" in run.to_latex()
    found = run.separability("top1")
    area, ends = found.area, found.interval
    assert found.table.loc[0, ["area", "area_low", "area_high"]].tolist() == [area, *ends]
    assert found.to_latex().count("[") == 3
    evaluated = sepcap.evaluate(trained, letters, tokens=200, context=16)
    top1 = evaluated.table.set_index("metric").loc["top1"]
    assert top1["value"] == evaluated.top1
    assert (top1["value_low"], top1["value_high"]) == pytest.approx(evaluated.interval("top1"))


def test_results_without_a_model_have_their_tables():
    said = pd.DataFrame({"prompt": ["a"] * 4, "continuation": ["b"] * 4, "score": [0.9, 0.1, 0.3, 0.5]})
    toxicity = sepcap.Toxicity(said, 0.8, 2.0, 0.1, {})
    low, high = toxicity.fraction_interval
    assert f"fraction above 0.8 & 0.25 [{low:.2f}, {high:.2f}]" in toxicity.to_latex(digits=2)
    overlap = sepcap.TextOverlap("mine", {"collect": 10, "evaluate": 5}, {"collect": 1, "evaluate": 0}, 0.02, 0.1)
    assert "evaluate & 5 & 0 & 0.0200 & 0.100" in overlap.to_latex()
