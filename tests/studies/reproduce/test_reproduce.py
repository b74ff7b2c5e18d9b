"""The studies of the papers: the stored data against METHODS, and every study on a tiny model against its own runs."""

import itertools
import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from tiny import fresh

import sepcap
from sepcap.evaluation.result import COUNTS
from sepcap.selection.overlap import overlap
from sepcap.statistics.collect import collect_sample
from sepcap.studies.ablations import random_neurons as sweep_module
from sepcap.studies.ablations.random_neurons import AblationSweep
from sepcap.studies.base import task_sets as several_tasks
from sepcap.studies.base.seed_samples import disjoint_parts
from sepcap.studies.pruning import prune as pruning
from sepcap.studies.pruning.run import Run
from sepcap.studies.pruning.separability import separability
from sepcap.studies.reproduce.config import KINDS, OverlapConfig, ReproductionConfig, studies
from sepcap.studies.reproduce.study import MEASURES, ROWS, RUNNERS, Reproduction, reproduce
from sepcap.tasks.registry import TASKS
from sepcap.tasks.samples import sample_task

METHODS = re.sub(r"\s+", " ", (Path(__file__).parents[3] / "docs" / "METHODS.md").read_text(encoding="utf-8"))
FOUR = ["facebook/opt-1.3b", "facebook/galactica-1.3b", "EleutherAI/pythia-1.4b", "FacebookAI/roberta-large"]
COLUMNS = ["study", "model", "quantity", "measured", "low", "high", "seeds_sd", "n_documents", "published", "source"]


def published(study, **where):
    (found,) = [q["published"] for q in studies()[study].quantities if all(q.get(key) == value for key, value in where.items())]
    return found


# the stored data


@pytest.mark.parametrize("name", studies())
def test_every_configuration_of_a_study_is_valid(name):
    study = studies()[name]
    assert study.kind in KINDS
    assert set(RUNNERS) == set(ROWS) == set(KINDS)
    assert set(study.budgets) == {"paper", "minutes"}
    assert study.models["default"] == "local"
    for model, budget in itertools.product([*study.models, "some/other-model"], study.budgets):
        configs = ReproductionConfig(name, model, budget).runs()
        assert list(configs) == list(study.runs)
        for config in configs.values():
            assert type(config) is KINDS[study.kind]
            assert config.model == model
            assert config.tokens == study.budgets[budget]["tokens"]
    for quantity in study.quantities:
        assert set(quantity["published"]) <= set(study.models)
        if study.kind != "overlap":
            assert quantity["run"] in study.runs
            assert quantity["measure"] in MEASURES
    words = [quantity["quantity"] for quantity in study.quantities]
    assert len(set(words)) == len(words)


@pytest.mark.parametrize("name", studies())
def test_models_and_tasks_of_a_study_have_names_that_exist(name):
    study = studies()[name]
    for model, chosen in study.models.items():
        assert model == "default" or re.fullmatch(r"[A-Za-z0-9][\w.-]*/[\w.-]+", model)
        assert chosen in study.tasks
    roles = None if study.kind == "overlap" else set(study.tasks["paper"])
    for tasks in study.tasks.values():
        assert set(tasks.values()) <= set(TASKS)
        assert roles is None or set(tasks) == roles
    assert all(task.startswith("local-") for task in study.tasks["local"].values())


def test_published_values_of_table_2_are_those_of_methods():
    line = re.search(r"mlp ([\d./ ]+), attention ([\d./ ]+) for OPT-1.3B / Galactica-1.3B / Pythia-1.4B / RoBERTa-355M", METHODS)
    assert line is not None
    for run, numbers in zip(("mlp", "attention"), line.groups(), strict=True):
        assert published("sp-table2", run=run) == dict(zip(FOUR, map(float, numbers.split("/")), strict=True))


def test_published_values_of_figure_1_and_of_the_areas_are_those_of_methods():
    found = re.search(r"OPT-6.7B: (\d+)% code drop costs about (\d+)% pile; (\d+)% for (\d+)%", METHODS)
    drop, cost, other, less = map(int, found.groups())
    assert published("sp-figure1", run="mlp", at=drop) == {"facebook/opt-6.7b": cost}
    assert published("sp-figure1", run="mlp", at=other) == {"facebook/opt-6.7b": less}
    large, small = re.search(r"pile vs code (\S+)% for large models, (\S+)% for small", METHODS).groups()
    most, least = re.search(r"code vs python (up to \d+)% at 6.7B, (under \S+)% at 125M", METHODS).groups()
    for runs, values in (
        (("forget-code-keep-pile", "forget-pile-keep-code"), (large, small)),
        (("forget-python-keep-code", "forget-code-keep-python"), (most, least)),
    ):
        for run in runs:
            expected = {"facebook/opt-6.7b": values[0], "facebook/opt-125m": values[1]}
            assert published("sep-areas", run=run, measure="percent") == expected


def test_published_values_of_peak_ablation_are_those_of_methods():
    found = re.search(
        r"OPT-1.3B peak ([\d.]+), mean ([\d.]+), zero ([\d.]+), resample (\S+); "
        r"Mistral-7B ([\d.]+), ([\d.]+), ([\d.]+), ([\d–]+)\.",
        METHODS,
    ).groups()
    for i, kind in enumerate(("peak", "mean", "zero", "resample")):
        values = {model: str(value) for model, value in published("peak-ablation", of=kind).items()}
        assert values == {"facebook/opt-1.3b": found[i], "mistralai/Mistral-7B-v0.1": found[4 + i]}


def test_nothing_else_is_published():
    """What METHODS does not give is left empty: 8 values of table 2, 2 of figure 1, 8 of the areas, 8 of peak ablation."""
    counted = {name: sum(len(q["published"]) for q in study.quantities) for name, study in studies().items()}
    assert counted == {"sp-table2": 8, "sp-figure1": 2, "sep-areas": 8, "peak-ablation": 8, "modularity-overlap": 0}


def test_protocols_are_those_of_the_papers():
    def runs(name):
        return ReproductionConfig(name, "facebook/opt-1.3b").runs()

    for config in runs("sp-table2").values():
        assert (config.steps, config.importance, config.forget, config.retain, config.tokens) == (50, "abs", "code", "pile", 100_000)
    assert [c.fractions for c in runs("sp-table2").values()] == [{"mlp": 0.02}, {"attn_pre_out": 0.02}]
    assert all((c.steps, c.fractions) == (20, {"mlp": 0.05}) for c in runs("sep-areas").values())
    protocol = runs("peak-ablation")["protocol"]
    assert (protocol.steps, len(protocol.seeds), protocol.site) == (10, 3, "attn_pre_out")
    assert [c.seeds for c in runs("modularity-overlap").values()] == [(0, 1, 2)]


def test_the_words_about_a_protocol_are_those_of_the_configuration_that_is_run():
    paper = {name: ReproductionConfig(name, "facebook/opt-1.3b").protocol() for name in studies()}
    assert paper["sp-table2"] == (
        "Protocol: 50 steps of 2% of the mlp neurons, by importance abs (mlp); "
        "50 steps of 2% of the attn_pre_out neurons, by importance abs (attention)."
    )
    assert not any("differs from the stored protocol" in words for words in paper.values())
    own = {"steps": 3, "tokens": 1_500, "fractions": {"attn_value": 0.25}, "importance": "rms"}
    words = ReproductionConfig("sp-figure1", "default", own).protocol()
    assert words == (
        "Protocol: 3 steps of 25% of the attn_value neurons, by importance abs (mlp); "
        "3 steps of 25% of the attn_value neurons, at random (random). "
        "This differs from the stored protocol of the paper: fractions attn_value 0.25 in place of mlp 0.02, steps 3 in place of 50, "
        "tokens 1,500 in place of 100,000."
    )
    words = ReproductionConfig("sep-areas").protocol()
    assert "20 steps of 5% of the mlp neurons, at random (random-pile-code, random-code-python)" in words
    assert words.endswith("tokens 10,000 in place of 100,000, eval_tokens 15,000 in place of 100,000.")
    words = ReproductionConfig("peak-ablation", budget={"steps": 4, "seeds": (7,), "kinds": ("zero", "peak")}).protocol()
    assert words.startswith("Protocol: attn_pre_out neurons in 4 equal steps and 1 random order, with the kinds zero, peak on the same n")
    assert "seeds 7 in place of 0, 1, 2" in words
    words = ReproductionConfig("modularity-overlap", budget={"fractions": [0.25], "sites": ("mlp",)}).protocol()
    assert words.startswith("Protocol: 25% of the neurons of mlp with the highest score against the common retain task, by")


@pytest.mark.parametrize("name", studies())
def test_nothing_stored_states_what_a_budget_can_change(name):
    assert not re.search(r"\d+ steps|\d+% |three seeds|is? left out", studies()[name].note)


def test_what_is_chosen_is_checked():
    with pytest.raises(ValueError, match=r"study='sp-table3' is not known. Did you mean 'sp-table2'"):
        reproduce(study="sp-table3")
    with pytest.raises(ValueError, match=r"budget='minute' is not known. Did you mean 'minutes'"):
        reproduce(study="sp-table2", budget="minute")
    with pytest.raises(ValueError, match=r"field of the budget='token' is not known. Did you mean 'tokens'"):
        reproduce(study="sp-table2", budget={"token": 3})
    with pytest.raises(ValueError, match=r"task='coed' is not known. Did you mean 'code'"):
        reproduce(study="sp-table2", tasks={"coed": "local-code"})
    with pytest.raises(ValueError, match="give at least two"):
        OverlapConfig(tasks=("local-code",))
    assert ReproductionConfig("sp-table2").chosen_budget == "minutes"
    assert ReproductionConfig("sp-table2", "facebook/opt-1.3b").chosen_budget == "paper"
    assert ReproductionConfig("sp-table2").runs()["mlp"].forget == "local-code"
    own = ReproductionConfig("sp-table2", budget={"tokens": 5}).runs()["mlp"]
    assert (own.tokens, own.eval_tokens, own.forget) == (5, 100_000, "local-code")


# on a tiny model


@pytest.fixture
def counted(monkeypatch):
    """How often a step of pruning, an ablated set or a collection for a selection was computed."""
    calls = []
    for module, name in ((pruning, "_step"), (sweep_module._Sweep, "_ablated"), (several_tasks, "collect_sample")):
        before = getattr(module, name)

        def again(*args, before=before, name=name, **options):
            calls.append(name)
            return before(*args, **options)

        monkeypatch.setattr(module, name, again)
    return calls


def tiny_study(name, folder, tasks, out, budget, said=None):
    return reproduce(folder, study=name, budget=budget, tasks=tasks, out=out, progress=False if said is None else said.append)


def measured(result, quantity, model=None):
    table = result.table.set_index(["model", "quantity"])
    row = table.loc[(model or result.asked.model, quantity)]
    return row["measured"], row["low"], row["high"]


PAIR = {"tokens": 150, "eval_tokens": 300, "steps": 10}


@pytest.mark.thorough
def test_table_2_on_a_tiny_model(trained_folder, letters, digits, tmp_path, counted):
    said = []
    options = ("sp-table2", trained_folder, {"code": letters, "pile": digits}, tmp_path, PAIR)
    result = tiny_study(*options, said)
    assert counted == ["_step"] * 22
    assert any("mlp: " in line and "10 steps of 2% of mlp" in line and "M tokens" in line for line in said)
    assert any("minutes at the" in line for line in said)
    for words in (said[0], result.summary()[0], Reproduction.load(result.folder).summary()[0]):
        assert "10 steps of 2% of the mlp neurons" in words
        assert "steps 10 in place of 50" in words
        assert "50 steps" not in words
    table = result.table
    assert list(table.columns) == COLUMNS
    # two rows of this model without published values, then those of the paper
    assert list(table["model"]) == [str(trained_folder)] * 2 + [model for model in FOUR for _ in range(2)]
    assert table["published"].isna().tolist() == [True] * 2 + [False] * 8
    assert table["measured"].notna().tolist() == [True] * 2 + [False] * 8
    assert set(table["source"]) == {"[SP] table 2"}
    for name, site in (("mlp", "mlp"), ("attention", "attn_pre_out")):
        run = Run.load(tmp_path / "sp-table2" / f"{trained_folder.name}-own-budget" / name)
        assert list(run.config["fractions"]) == [site]
        value, low, high = measured(result, f"maximum differential drop, {name} (percentage points)")
        assert value == run.separability("top1").max_drop
        assert low <= value <= high
        assert (low < value < high) == (name == "mlp")  # the tiny model reads letters without its attention
    assert table["published"].dropna().tolist() == [59.6, 28.4, 52.4, 41.7, 46.2, 46.6, 58.3, 41.5]
    # the same call again opens what is there
    said.clear()
    again = tiny_study(*options, said)
    assert counted == ["_step"] * 22
    assert "nothing is recomputed" in said[-1]
    assert again.table.equals(table)
    assert len(again.figure().data) == 3  # two runs and the diagonal


def test_an_interrupted_study_goes_on(trained_folder, letters, digits, tmp_path, counted):
    options = ("sp-table2", trained_folder, {"code": letters, "pile": digits}, tmp_path, PAIR | {"steps": 2})
    table = tiny_study(*options).table
    run = tmp_path / "sp-table2" / f"{trained_folder.name}-own-budget" / "attention"
    (run / "steps" / "0002" / "record.json").unlink()
    counted.clear()
    said = []
    assert tiny_study(*options, said).table.equals(table)
    assert counted == ["_step"]
    assert not any(line.startswith("mlp: ") for line in said)
    with pytest.raises(FileExistsError, match="another configuration"):
        tiny_study(*options[:-1], PAIR | {"steps": 3})


def test_figure_1_on_a_tiny_model(trained_folder, letters, digits, tmp_path):
    budget = PAIR | {"fractions": {"mlp": 0.2}, "steps": 3}
    result = tiny_study("sp-figure1", trained_folder, {"code": letters, "pile": digits}, tmp_path, budget)
    runs = list(result.results)
    assert runs == ["mlp", "random"]
    for run, at in itertools.product(runs, (35, 80)):
        (quantity,) = [q["quantity"] for q in result.study.quantities if (q["run"], q["at"]) == (run, at)]
        top1 = result.results[run].trajectory.pivot(index="step", columns="role", values="top1")
        forget, retain = (100 * (1 - top1[role] / top1[role][0]).to_numpy() for role in ("forget", "retain"))
        step = int(np.argmax(forget >= at))
        reached = np.interp(at, forget[step - 1 : step + 1], retain[step - 1 : step + 1]) if step else math.nan
        assert measured(result, quantity)[0] == pytest.approx(reached, nan_ok=True)
    assert {trace.name.split(":")[0] for trace in result.figure().data} == {"mlp", "random", "not separable"}
    assert result.results["random"].config["importance"] == "random"


class Planted(Run):
    """A run of two documents in each half of either task, so that the bootstrap can be written out."""

    def __init__(self, forget, retain):
        self._sums = {"forget": self.sums(forget), "retain": self.sums(retain)}

    def per_cluster(self, role, cluster="document"):
        return self._sums[role]

    def separability(self, metric, specific="forget", **options):
        return separability(self._sums["forget"], self._sums["retain"], metric, specific=specific, **options)

    @staticmethod
    def sums(hits):
        """Hits per step and document, of 10 predictions each."""
        hits = np.array(hits, dtype=float)
        rows = np.zeros((*hits.shape, len(COUNTS)))
        rows[..., COUNTS.index("n")] = 10
        rows[..., COUNTS.index("top1")] = hits
        return rows

    def resampled(self):
        """Accuracies of all nine outcomes of drawing two of two documents in both tasks; the rarest have a probability of 1/16."""
        weights = ((2, 0), (1, 1), (0, 2))
        top1 = {role: rows[..., COUNTS.index("top1")] for role, rows in self._sums.items()}
        return [(top1["forget"] @ f, top1["retain"] @ r) for f in weights for r in weights]


def test_intervals_are_those_of_all_draws_of_the_documents():
    run = Planted([[8, 6], [5, 5], [1, 0]], [[6, 4], [5, 4], [3, 4]])
    # with two documents Student's t has one degree of freedom: the interval is all that can be drawn
    costs = [np.interp(60, 100 * (1 - f / f[0]), 100 * (1 - r / r[0])) for f, r in run.resampled()]
    value = 10 + 20 * (60 - 100 * 4 / 14) / (100 * 13 / 14 - 100 * 4 / 14)  # between (4/14, 1/10) and (13/14, 3/10)
    assert MEASURES["retain_cost"](run, {"at": 60})[:3] == pytest.approx((value, min(costs), max(costs)))
    # some draws reach 90% and some do not: the interval has no upper end
    fewer, low, high, _ = MEASURES["retain_cost"](run, {"at": 92})
    assert low <= fewer < 30
    assert math.isinf(high)
    assert np.isnan(MEASURES["retain_cost"](run, {"at": 99})).all()
    for specific, sign in (("forget", 1), ("retain", -1)):
        area, low, high, _ = MEASURES["area"](run, {"specific": specific})
        assert sign * (area - 1) > 0
        assert low < area < high
        assert MEASURES["percent"](run, {"specific": specific})[0] == pytest.approx(sign * 100 * (area - 1))


def test_a_single_text_has_no_interval():
    run = Planted([[8], [1]], [[6], [5]])
    for measure, quantity in (("max_drop", {}), ("retain_cost", {"at": 50})):
        value, low, high, _ = MEASURES[measure](run, quantity)
        assert value > 0
        assert math.isnan(low)
        assert math.isnan(high)


def test_top1_at_half_has_its_interval_over_texts_and_its_spread_over_seeds():
    row = {"kind": "peak", "top1_at_50": 0.325, "top1_at_50_low": 0.3, "top1_at_50_high": 0.34, "top1_at_50_seeds_sd": 0.05}
    result = AblationSweep({}, {"by_kind": pd.DataFrame([row])})
    assert MEASURES["top1_at_half"](result, {"of": "peak"}) == pytest.approx((32.5, 30, 34, 5))
    assert np.isnan(MEASURES["top1_at_half"](result, {"of": "mean"})).all()


@pytest.mark.thorough
def test_areas_on_a_tiny_model(trained_folder, letters, digits, tmp_path):
    budget = {"tokens": 300, "eval_tokens": 600, "steps": 3, "fractions": {"mlp": 0.2}}
    tasks = {"pile": digits, "code": letters, "python": letters[:80], "other-code": digits[:80]}
    result = tiny_study("sep-areas", trained_folder, tasks, tmp_path, budget)
    names = {name: (run.config["forget"], run.config["retain"]) for name, run in result.results.items()}
    assert names["forget-code-keep-pile"] == names["forget-pile-keep-code"][::-1] == names["random-pile-code"]
    assert names["forget-python-keep-code"] == names["forget-code-keep-python"][::-1] == names["random-code-python"]
    for run, words in (
        ("forget-code-keep-pile", "code forgotten and the Pile retained"),
        ("forget-pile-keep-code", "the Pile forgotten and code retained"),
    ):
        accuracy = result.results[run].trajectory.pivot(index="step", columns="role", values="top1")
        code, pile = ("forget", "retain") if run == "forget-code-keep-pile" else ("retain", "forget")
        x, y = ([0.0, *accuracy[role][::-1]] for role in (code, pile))  # code, the specific task, is on the x axis in both directions
        area = sum((x[i] - x[i - 1]) * (y[i] + y[i - 1]) / 2 for i in range(1, len(x))) / (x[-1] * y[-1] / 2)
        best = "2 at best" if code == "forget" else "0 at best"
        value, low, high = measured(result, f"area, {words} ({best})")
        assert value == pytest.approx(area)
        assert low <= high
        assert measured(result, f"separability, {words} (%)")[0] == pytest.approx(100 * abs(area - 1))
    assert result.table["published"].isna()[:12].all()
    assert "65–75" in set(result.table["published"])
    assert result.figure().layout.xaxis.title.text.startswith("Area")
    assert result.figure("study") == result.figure()
    with pytest.raises(ValueError, match="figure='nonsense' is not known"):
        result.figure("nonsense")


def test_peak_ablation_on_a_tiny_model(trained_folder, letters, tmp_path, counted):
    budget = {"steps": 4, "seeds": (0, 1), "tokens": 300, "reference_tokens": 300, "kinds": ("zero", "peak")}
    options = ("peak-ablation", trained_folder, {"pile": letters}, tmp_path, budget)
    said = []
    result = tiny_study(*options, said)
    assert counted == ["_ablated"] * 8
    assert any("random attn_pre_out neurons in 4 steps, 2 seeds, zero, peak" in line for line in said)
    lines = result.results["protocol"].table
    half = lines[(lines["fraction"] == 0.5) & (lines["kind"] == "peak")]["top1"].to_numpy() * 100
    assert len(half) == 2
    value, low, high = measured(result, "top-1 with half of the neurons ablated, peak (%)")
    assert value == pytest.approx(half.mean())
    assert low <= value <= high
    row = result.table.query("quantity == 'top-1 with half of the neurons ablated, peak (%)'").iloc[0]
    assert row["seeds_sd"] == pytest.approx(half.std(ddof=1))
    assert math.isnan(measured(result, "top-1 with half of the neurons ablated, mean (%)")[0])  # left out by the budget
    opt = result.table.set_index(["model", "quantity"]).loc["facebook/opt-1.3b"]["published"]
    assert opt["top-1 with half of the neurons ablated, peak (%)"] == 44.5
    said.clear()
    assert tiny_study(*options, said).table.equals(result.table)
    assert counted == ["_ablated"] * 8
    assert "nothing is recomputed" in said[-1]
    assert result.figure().data


THREE = {"tokens": 100, "fractions": (0.25,), "seeds": (0,)}


@pytest.mark.thorough
def test_overlaps_on_a_tiny_model(trained_folder, letters, digits, tmp_path, counted):
    tasks = {"retain": digits, "code": letters[:80], "python": letters[80:], "law": digits[:80] + letters[:80]}
    tasks |= {role: digits[5 * i :] + letters[5 * i : 5 * i + 5] for i, role in enumerate(("medicine", "mathematics", "patents"))}
    options = ("modularity-overlap", trained_folder, tasks, tmp_path, THREE)
    said = []
    result = tiny_study(*options, said)
    assert counted == ["collect_sample"] * 24  # a pass for each of six tasks and for its retain texts, and again for random weights
    assert any("and as many in randomly initialised models" in line for line in said)
    # the sets, selected by hand: statistics, score, top
    found, labels = result.results["overlap"], {"trained": str(trained_folder), "random": f"{trained_folder}, random weights"}
    shares = {"mlp": 0.25, "attn_pre_out": 0.25}
    retained = sample_task(fresh(trained_folder), sepcap.load_task(digits), "collect", 600)
    parts = disjoint_parts(retained, 6)
    for weights, label in labels.items():
        model = sepcap.load_model(trained_folder, device="cpu", random_weights=weights == "random", seed=0)
        sets = [
            sepcap.score(sepcap.collect(model, tasks[role], tokens=100), collect_sample(model, part, tuple(shares))).top(shares)
            for role, part in zip(("code", "python"), parts, strict=False)
        ]
        assert found.neurons("code", shares, weights) == sets[0]
        row = overlap(*sets).query("layer.isna() and site == 'mlp'").iloc[0]
        assert row["a"] == row["b"] == 36  # a quarter of 2 × 72
        tests = int(found.table.query("weights == @weights")["log10_p"].count())
        for quantity, expected in (
            ("neurons of one that are the other's too (%)", 100 * row["both"] / 36),
            ("intersection over union (%)", 100 * row["both"] / (72 - row["both"])),
            ("ratio to random sets of the same layers", row["ratio"]),
            ("log10 of the largest corrected p-value of the seeds", min(0, row["log10_p"] + math.log10(tests))),
        ):
            assert measured(result, f"{quantity}, 0.25 of mlp, code and python", label)[0] == pytest.approx(expected)
    assert found.neurons("code", shares) != found.neurons("code", shares, "random")
    assert len(result.table) == 2 * 15 * 2 * 5  # models, pairs of six tasks, sites, quantities
    assert result.table["published"].isna().all()
    figure = result.figure()
    assert len(figure.data) == 4
    at = dict(zip(figure.layout.yaxis.ticktext, figure.layout.yaxis.tickvals, strict=True))
    for trace, label in zip(figure.data[::2], labels.values(), strict=True):
        shown = dict(zip(np.round(trace.y), trace.x, strict=True))
        for pair, site in itertools.product(("code and python", "python and law"), ("mlp", "attn_pre_out")):
            value = measured(result, f"ratio to random sets of the same layers, 0.25 of {site}, {pair}", label)[0]
            assert shown[at[f"{pair.replace(' and', ',')} ({site})"]] == pytest.approx(value, rel=1e-4)
    # taken up again: one task was not collected
    folder = tmp_path / "modularity-overlap" / f"{trained_folder.name}-own-budget" / "overlap"
    (folder / "result.json").unlink()
    (folder / "statistics" / "trained-0" / "3.safetensors").unlink()
    counted.clear()
    assert tiny_study(*options).table.equals(result.table)
    assert counted == ["collect_sample"]
    with pytest.raises(FileExistsError, match="tokens: 100 stored, 200 requested"):
        tiny_study(*options[:-1], THREE | {"tokens": 200})
