"""Task neurons that form modules by construction, and ones that cannot: the study must say so (METHODS 12, 16)."""

import pytest
import torch
from planted import LAYERS, Blueprint

import sepcap
from sepcap.studies.clusters.study import ModularityConfig

WORDS, PER_GROUP, COPIES = 12, 3, 3
GROUPS = 2 * WORDS // PER_GROUP
WIDTH = GROUPS * COPIES


@torch.no_grad()
def plant(folder, *, modular, seed=0):
    """In every layer COPIES neurons for each of GROUPS groups of words of one task, in random places, with random strengths.

    Modular: the neurons of a group read the same words, so that they are one cluster, and all neurons of `a` are whole clusters.
    Otherwise every cluster is made of one neuron for `a` and two for `b` or the reverse: all three read one strong common direction, in
    which the stream never has anything, and, weakly, words of their own.
    """
    blueprint = Blueprint(WORDS)
    generator = torch.Generator().manual_seed(seed)
    truth = torch.zeros(LAYERS, WIDTH, dtype=torch.bool)
    for at, layer in enumerate(blueprint.layers):
        places = torch.randperm(WIDTH, generator=generator).tolist()
        fc1 = torch.nn.Linear(blueprint.width, WIDTH)
        fc2 = torch.nn.Linear(WIDTH, blueprint.width)
        for parameter in (*fc1.parameters(), *fc2.parameters()):
            parameter.zero_()
        for job, place in enumerate(places):
            group, copy = divmod(job, COPIES)
            # modular: the first half of the groups is of a; else the copies of a group are of different tasks
            task = "ab"[group >= GROUPS // 2] if modular else "ab"[(group + copy) % 2]
            first = PER_GROUP * (group % (GROUPS // 2))
            own = blueprint.reader([blueprint.token(task, first + i) for i in range(PER_GROUP)])
            strength = float(10 ** (torch.rand(1, generator=generator) - 0.5))
            if not modular:
                # the two halves of the stream cancel in it
                common = torch.zeros(blueprint.width)
                common[[group, blueprint.half + group]] = 20.0
                own = own + common
            fc1.weight[place] = strength * own
            truth[at, place] = task == "a"
        layer.fc1, layer.fc2 = fc1, fc2
    blueprint.hf.config.ffn_dim = WIDTH
    return blueprint.finish(folder, {"a": sepcap.NeuronSet({"mlp": truth})}, {})


def study(planted):
    tasks = (sepcap.load_task(planted.a, name="a"),)
    retain = sepcap.load_task(planted.b, name="b")
    options = {"fractions": (0.5,), "k": GROUPS, "n_init": 5, "seeds": (0, 1), "draws": 200, "tokens": 1500, "control": False}
    return sepcap.measure_modularity(planted.model, ModularityConfig(tasks=tasks, retain=retain, **options))


def totals(result, clusters, chosen="score", null="layer"):
    table = result.tables["areas"]
    same = (table["clusters"] == clusters) & (table["chosen"] == chosen) & (table["null"] == null)
    return table[table["layer"].isna() & same]


def test_task_neurons_that_are_whole_clusters_have_the_greatest_area(tmp_path):
    planted = plant(tmp_path, modular=True)
    result = study(planted)
    moefied = totals(result, "moefied")
    # half of the clusters are full, so the curve rises to 1 at one half and stays
    assert moefied["area"].tolist() == pytest.approx([0.75, 0.75])
    assert moefied["concentration"].tolist() == pytest.approx([1, 1])
    assert (moefied["p"] == 1 / 201).all()
    # they are never active on b: as many of the least active ones are the same neurons, and nothing is left when matched on activity
    assert totals(result, "moefied", "least active")["concentration"].tolist() == pytest.approx([1, 1])
    matched = totals(result, "moefied", null="layer and activity")
    assert matched["chance"].tolist() == pytest.approx([0.75, 0.75], abs=0.02)
    # the neurons stand in random places
    assert totals(result, "index")["concentration"].abs().max() < 0.5


def test_task_neurons_spread_over_all_clusters_are_less_concentrated_than_chance(tmp_path):
    planted = plant(tmp_path, modular=False)
    result = study(planted)
    moefied = totals(result, "moefied")
    # two of three in half of the clusters, one of three in the others
    counts = [2] * (GROUPS // 2) + [1] * (GROUPS // 2)
    expected = sum(sum(counts[: j + 1]) for j in range(GROUPS)) / (sum(counts) * GROUPS) - 1 / (2 * GROUPS)
    assert moefied["area"].tolist() == pytest.approx([expected, expected])
    assert (moefied["concentration"] < 0).all()
    assert (moefied["p"] > 0.9).all()


def test_the_planted_neurons_are_the_selected_ones(tmp_path):
    planted = plant(tmp_path, modular=True)
    forget, retain = (sepcap.collect(planted.model, task, tokens=1500, sites="mlp") for task in (planted.a, planted.b))
    assert sepcap.score(forget, retain).top({"mlp": 0.5}) == planted.truth["a"]
