"""Every shortcut alone: the same effects as whole passes, with fewer positions run, where only this shortcut can make them wrong."""

import numpy as np
import pytest
import torch
from tiny import CONTEXT, fresh, words

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.evaluation.result import COUNTS, METRICS
from sepcap.models.forward import measuring
from sepcap.models.sites import bind
from sepcap.selection.neurons import NeuronSet
from sepcap.studies.single_ablations import passes
from sepcap.studies.single_ablations.measure import NONE, Rows
from sepcap.studies.single_ablations.passes import Shortcuts, Units, activations, effects
from sepcap.tasks.samples import sample_task

OFF = Shortcuts(silent=False, prefix=False, written=False, single=False)
WANTED = [COUNTS.index(metric) for metric in METRICS]


class Setting:
    """A tiny OPT with three neurons in each layer that are made to fire where a test needs it; all others as they are."""

    def __init__(self, folder):
        self.model = fresh(folder)
        self.population = bind(self.model, "mlp")
        task = sepcap.load_task(words(0, n=12, length=8))
        self.sample = sample_task(self.model, task, "evaluate", 150, CONTEXT)
        self.rows = Rows.of(self.sample)

    def fires_at(self, layer, neuron, position):
        """A hook that keeps the neuron silent everywhere but at one position of every row."""

        def put(z, hook):
            z = z.clone()
            kept = z[:, position, neuron].abs() + 1.5
            z[:, :, neuron] = 0
            z[:, position, neuron] = kept
            return z

        return f"blocks.{layer}.mlp.hook_post", put

    def effects(self, layer, neuron, shortcuts, hooks=(), positions=64):
        with measuring(self.model), self.model.hooks(fwd_hooks=list(hooks)):
            block = self.rows.block(self.model, 0, shortcuts)
            z = activations(self.model, self.population, block, layer)
            units = Units(layer, torch.tensor([[neuron]]), torch.zeros(z.shape[2]))
            found = effects(self.model, self.population, block, units, {layer: z}, shortcuts, positions)[0].numpy()
        whole = np.empty_like(found)
        whole[list(self.rows.order[0])] = found
        return whole

    def truth(self, layer, neuron):
        before = evaluate_sample(self.model, self.sample).per_row
        with sepcap.ablate(self.model, layer=layer, neurons=[neuron]):
            return (evaluate_sample(self.model, self.sample).per_row - before)[:, WANTED]


@pytest.fixture(scope="session")
def tiny_folder(tiny_folders):
    return tiny_folders["opt"]


@pytest.fixture(scope="module")
def setting(tiny_folder):
    return Setting(tiny_folder)


@pytest.fixture
def ran(monkeypatch):
    """Positions times blocks that were run, rows that were, and logits that were computed."""
    seen = {"positions": 0, "logits": 0, "rows": set()}

    def part(model, recorded, layer, stream, rows, first, hooks=()):
        seen["positions"] += stream.shape[0] * stream.shape[1] * (len(model.blocks) - layer)
        seen["rows"] |= set(rows.tolist())
        return run_part(model, recorded, layer, stream, rows, first, hooks)

    def whole(model, recorded, layer, rows, hooks=()):
        if len(hooks) and hooks[0][1].__name__ == "put":
            seen["positions"] += len(rows) * recorded.inputs.shape[1] * (len(model.blocks) - layer)
            seen["rows"] |= set(rows.tolist())
        return run_whole(model, recorded, layer, rows, hooks)

    def head(model, recorded, stream):
        seen["logits"] += len(stream)
        return unembed(model, recorded, stream)

    run_part, run_whole, unembed = passes.run_part, passes.run_whole, passes.unembed
    for name, function in {"run_part": part, "run_whole": whole, "unembed": head}.items():
        monkeypatch.setattr(passes, name, function)
    return seen


def same(found, want):
    np.testing.assert_allclose(found[:, -1], want[:, -1], atol=2e-4, rtol=0)
    np.testing.assert_array_equal(found[:, :-1], want[:, :-1])


def strongest(setting, layer):
    """The neuron of a layer with the largest effect on the loss."""
    block = setting.rows.block(setting.model, 0, NONE)
    with measuring(setting.model):
        return int(activations(setting.model, setting.population, block, layer).abs().sum((0, 1)).argmax())


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("shortcuts", [OFF, NONE, Shortcuts(), Shortcuts(written=False), Shortcuts(prefix=False)])
def test_every_combination_gives_the_effects_of_whole_evaluations(setting, layer, shortcuts):
    neuron = strongest(setting, layer)
    want = setting.truth(layer, neuron)
    assert np.abs(want[:, -1]).max() > 0.01
    same(setting.effects(layer, neuron, shortcuts), want)
    same(setting.effects(layer, neuron, shortcuts, positions=7), want)


@pytest.mark.parametrize("shortcuts", [Shortcuts(prefix=False, written=False, single=False), Shortcuts()])
def test_rows_in_which_a_neuron_is_silent_are_not_run_and_do_not_change(tiny_folder, ran, shortcuts):
    setting, neuron = Setting(tiny_folder), 5
    with measuring(setting.model), torch.no_grad():
        mlp = setting.model.blocks[0].mlp
        mlp.b_in[neuron] += 10
        block = setting.rows.block(setting.model, 0, NONE)
        most = activations(setting.model, setting.population, block, 0)[..., neuron].where(block.batch.real, 0).amax(1)
        mlp.b_in[neuron] -= most.topk(2).values.mean()  # between the strongest row and the second: it fires in one row alone
        mlp.W_out[neuron] *= 100
    row = setting.rows.order[0][int(most.argmax())]
    want = setting.truth(0, neuron)
    assert (np.abs(want[:, -1]) > 1e-3).tolist() == [i == row for i in range(len(want))]
    ran["rows"].clear()
    same(setting.effects(0, neuron, shortcuts), want)
    assert ran["rows"] == {int(most.argmax())}


@pytest.mark.parametrize("shortcuts", [Shortcuts(prefix=False, written=False, single=False), Shortcuts()])
def test_a_neuron_that_fires_at_bos_alone_is_not_silent(setting, shortcuts):
    hook = setting.fires_at(0, 5, 0)
    want = setting.effects(0, 5, OFF, [hook])
    assert (np.abs(want[:, -1]) > 1e-3).all()
    same(setting.effects(0, 5, shortcuts, [hook]), want)


@pytest.mark.parametrize("position", [1, 6])
def test_positions_before_the_first_changed_one_are_not_run(setting, ran, position):
    hook = setting.fires_at(0, 5, position)
    want = setting.effects(0, 5, OFF, [hook])
    only = Shortcuts(silent=False, written=False)  # logits of single positions are what a part of a row ends in
    ran["positions"] = 0
    same(setting.effects(0, 5, only, [hook], positions=10_000), want)
    scored = [len(row) - 1 for row in setting.sample.rows]
    assert ran["positions"] == 2 * len(scored) * (max(scored) - position)  # two blocks, up to the last scored position


def test_what_an_mlp_neuron_wrote_is_taken_from_the_stream_without_its_block(setting, ran):
    neuron = strongest(setting, 0)
    want, both = setting.truth(0, neuron), {}
    for written in (True, False):
        ran["positions"] = 0
        same(setting.effects(0, neuron, Shortcuts(silent=False, prefix=False, written=written)), want)
        both[written] = ran["positions"]
    assert both[False] == 2 * both[True] > 0  # one block of two


def test_in_the_last_layer_only_changed_positions_get_logits(setting, ran):
    hook = setting.fires_at(1, 5, 4)
    want = setting.effects(1, 5, OFF, [hook])
    found = {}
    for shortcuts in (Shortcuts(), Shortcuts(written=False)):
        setting.effects(1, 5, Shortcuts(), [hook])
        ran["logits"] = ran["positions"] = 0
        same(setting.effects(1, 5, shortcuts, [hook]), want)
        # those of the unablated rows are among them
        scored = sum(len(row) - 1 for row in setting.sample.rows)
        found[shortcuts.written] = ran["logits"] - scored
        assert shortcuts.written == (ran["positions"] == 0)
    assert found[True] == len(setting.sample.rows)
    assert found[False] == sum(len(row) - 1 - 4 for row in setting.sample.rows)


def test_unscored_positions_get_no_logits(setting, ran):
    scored = sum(len(row) - 1 for row in setting.sample.rows)
    ran["logits"] = 0
    setting.effects(0, strongest(setting, 0), Shortcuts(silent=False, prefix=False))
    assert ran["logits"] == 2 * scored  # once without and once with the ablation


def test_a_mean_makes_other_rows_silent_than_zero(setting):
    """What counts is the distance to the constant, not to 0."""
    with measuring(setting.model):
        block = setting.rows.block(setting.model, 0, Shortcuts())
        z = activations(setting.model, setting.population, block, 0)
        neuron, constants = strongest(setting, 0), torch.full((z.shape[2],), 0.7)
        units = Units(0, torch.tensor([[neuron]]), constants)
        found = effects(setting.model, setting.population, block, units, {0: z}, Shortcuts(), 64)[0].numpy()
    before = evaluate_sample(setting.model, setting.sample).per_row
    with sepcap.ablate(setting.model, layer=0, neurons=[neuron], kind=0.7):
        want = (evaluate_sample(setting.model, setting.sample).per_row - before)[:, WANTED]
    same(found[np.argsort(setting.rows.order[0])], want)


def test_pairs_in_two_layers_run_from_the_first_with_the_second_set_by_a_hook(setting):
    a, b = strongest(setting, 0), strongest(setting, 1)
    with measuring(setting.model):
        for shortcuts in (Shortcuts(), NONE, Shortcuts(written=False)):
            block = setting.rows.block(setting.model, 0, shortcuts)
            z = {layer: activations(setting.model, setting.population, block, layer) for layer in (0, 1)}
            none = torch.zeros(z[0].shape[2])
            units = Units(0, torch.tensor([[a]]), none, Units(1, torch.tensor([[b]]), none))
            found = effects(setting.model, setting.population, block, units, z, shortcuts, 64)[0].numpy()
            pair = NeuronSet.empty(setting.model, "mlp")
            pair.masks["mlp"][0, a] = pair.masks["mlp"][1, b] = True
            before = evaluate_sample(setting.model, setting.sample).per_row
            with sepcap.ablate(setting.model, pair):
                want = (evaluate_sample(setting.model, setting.sample).per_row - before)[:, WANTED]
            same(found[np.argsort(setting.rows.order[0])], want)
