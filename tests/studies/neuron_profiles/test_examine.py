"""Profiles of neurons against a full sort in numpy, compiled models with labels, and logits with a fixed final norm."""

import math
import re

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import fresh

import sepcap
from sepcap.models.forward import call, evaluating, with_hooks
from sepcap.models.sites import bind
from sepcap.models.weights import fingerprint
from sepcap.studies.neuron_profiles import stream
from sepcap.studies.neuron_profiles.reduced import QUANTILES, document_of
from sepcap.studies.neuron_profiles.stream import POOL
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

SIZE = {"tokens": 700, "k": 4, "window": 8, "listed": 5, "min_count": 3, "samples": 3, "progress": False}
SITES = {"mlp": [(0, 3), (1, 70), (1, 5)], "attn_pre_out": [(0, 1, 2), (1, 3, 7), (1, 0, 0)], "attn_value": [(0, 1, 2), (1, 0, 7)]}


def seen(model, sample, names):
    """What plain hooks see in one pass over all rows of a sample, padded on the right."""
    found = {}
    batch = next(sample.batches(len(sample.rows)))
    hooks = [(name, lambda x, hook, name=name: found.__setitem__(name, x.float().clone())) for name in names]
    with torch.inference_mode(), evaluating(model), with_hooks(model, hooks):
        call(model, batch.inputs)
    return found


def activations(model, sample, site, places):
    """Activations of neurons at every counted position, by place, row by row; NaN where a position does not count."""
    population, found = bind(model, site), {}
    names = {place: population.site.hook_name(place[0]) for place in places}
    z = seen(model, sample, set(names.values()))
    for place, name in names.items():
        of = z[name].reshape(*z[name].shape[:2], *population.shape[1:])[(slice(None), slice(None), *place[1:])].numpy()
        found[place] = [np.where(ids == sample.bos, np.nan, row[: len(ids)]) for row, ids in zip(of, sample.rows, strict=True)]
    return found


@pytest.fixture(scope="module")
def tasks(letters, digits):
    return {"forget": load_task(letters, name="letters"), "retain": load_task(digits, name="digits")}


def examined(model, places, tasks, **how):
    return sepcap.examine(model, places, tasks=tuple(tasks.values()), **{**SIZE, **how})


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_strongest_contexts_are_those_of_a_full_sort(tiny_opt, tasks, site, batch_size):
    profiles = examined(tiny_opt, SITES[site], tasks, site=site, batch_size=batch_size)
    for role, task in tasks.items():
        sample = sample_task(tiny_opt, task, "collect", SIZE["tokens"])
        for place, z in activations(tiny_opt, sample, site, SITES[site]).items():
            i = profiles.number(place)
            best = np.array([np.nanmax(np.abs(row)) for row in z])
            order = np.argsort(-best, kind="stable")[: SIZE["k"]]
            top = {name: profiles.tensors[f"{role}/top/{name}"][i].numpy() for name in ("row", "position", "activation", "window", "start")}
            assert top["row"].tolist() == order.tolist()
            for row, position, activation, window, start in zip(*top.values(), strict=True):
                assert position == int(np.nanargmax(np.abs(z[row])))
                assert activation == pytest.approx(z[row][position], abs=2e-5)
                ids, want = np.full(SIZE["window"], -1), np.full(SIZE["window"], np.nan)
                for j in range(SIZE["window"]):
                    if 0 <= start + j < len(z[row]):
                        ids[j], want[j] = sample.rows[row][start + j], z[row][start + j]
                np.testing.assert_allclose(window, want, atol=2e-5)
                at = np.flatnonzero(top["row"] == row)[0]
                assert profiles.tensors[f"{role}/top/tokens"][i, at].tolist() == ids.tolist()
                assert profiles.tensors[f"{role}/top/document"][i, at] == document_of(sample, int(row), int(position))
            every = np.concatenate(z)
            every = every[~np.isnan(every)]
            unit = profiles.table.iloc[i]
            assert unit[f"mean_{role}"] == pytest.approx(every.mean(), abs=1e-5)
            assert unit[f"abs_{role}"] == pytest.approx(np.abs(every).mean(), abs=1e-5)
            assert unit[f"positive_{role}"] == pytest.approx((every > 0).mean(), abs=2e-3)
            width = float(profiles.tensors["edges"][i, -1] - profiles.tensors["edges"][i, 0])
            got = profiles.tensors[f"{role}/quantiles"][i].numpy()
            np.testing.assert_allclose(got, np.quantile(every, QUANTILES), atol=width / 250)
            share = profiles.tensors[f"{role}/histogram"][i].numpy()
            assert share.sum() == pytest.approx(1, abs=1e-6)
            exact = np.histogram(every, bins=profiles.tensors["edges"][i].numpy())[0] / len(every)
            assert np.abs(np.cumsum(share - exact)).max() < 0.02


def test_samples_lie_in_their_group_and_come_from_the_texts(tiny_opt, tasks):
    profiles = examined(tiny_opt, SITES["mlp"], tasks)
    for role, task in tasks.items():
        sample = sample_task(tiny_opt, task, "collect", SIZE["tokens"])
        for place, z in activations(tiny_opt, sample, "mlp", SITES["mlp"]).items():
            i = profiles.number(place)
            ends = profiles.tensors[f"{role}/quantiles"][i]
            of = {name: profiles.tensors[f"{role}/sample/{name}"][i] for name in ("row", "position", "activation")}
            assert int((of["row"] >= 0).sum()) >= SIZE["samples"] * 2
            for group, n in np.argwhere(of["row"].numpy() >= 0):
                value = float(of["activation"][group, n])
                assert value == pytest.approx(z[of["row"][group, n]][of["position"][group, n]], abs=2e-5)
                assert value <= ends[group + 1]
                assert group == 0 or value > ends[group]
    again = examined(tiny_opt, SITES["mlp"], tasks)
    other = examined(tiny_opt, SITES["mlp"], tasks, seed=1)
    assert torch.equal(again.tensors["forget/sample/position"], profiles.tensors["forget/sample/position"])
    assert not torch.equal(other.tensors["forget/sample/position"], profiles.tensors["forget/sample/position"])


def test_preferred_tokens_are_those_of_a_loop(tiny_opt, tasks):
    profiles, place = examined(tiny_opt, [(1, 5)], tasks), (1, 5)
    sample = sample_task(tiny_opt, tasks["forget"], "collect", SIZE["tokens"])
    z, ids = np.concatenate(activations(tiny_opt, sample, "mlp", [place])[place]), np.concatenate(sample.rows)
    z, ids = np.abs(z[ids != sample.bos]), ids[ids != sample.bos]
    lifts = {int(t): z[ids == t].mean() / z.mean() for t in np.unique(ids) if (ids == t).sum() >= SIZE["min_count"]}
    best = sorted((t for t in lifts if lifts[t] > 1), key=lambda t: -lifts[t])[: SIZE["listed"]]
    got = profiles.tokens(place).query("list == 'preferred' and task == 'forget'")
    assert got["token"].tolist() == best
    np.testing.assert_allclose(got["value"], [lifts[t] for t in best], rtol=1e-4)
    assert got["count"].tolist() == [int((ids == t).sum()) for t in best]


@pytest.mark.parametrize("heads", [False, True])
def test_sources_and_heads_are_those_of_a_loop(tiny, tasks, heads):
    population = bind(tiny, "attn_pre_out")
    places = [(0, 1), (1, 3)] if heads else [(0, 1, 2), (1, 3, 7)]
    profiles = examined(tiny, places, tasks, site="attn_pre_out", whole_heads=heads)
    sample, role = sample_task(tiny, tasks["retain"], "collect", SIZE["tokens"]), "retain"
    for place in places:
        layer, head = place[:2]
        names = [f"blocks.{layer}.attn.{name}" for name in ("hook_pattern", "hook_v", "hook_z")]
        i, weight = profiles.number(place), population.rows(layer)[head].detach().float()
        every = seen(tiny, sample, names)
        for n in range(SIZE["k"]):
            row, position = (int(profiles.tensors[f"{role}/top/{name}"][i, n]) for name in ("row", "position"))
            pattern, v, z = (every[name][row] for name in names)
            v = v.reshape(len(v), -1, population.shape[2])
            z = z.reshape(len(z), *population.shape[1:])
            v = v[:, head * v.shape[1] // population.shape[1]]
            if heads:
                parts = pattern[head, position] * (v @ weight).norm(dim=1)
                want = (z[position, head] @ weight).norm()
                source = int(parts.argmax())
            else:
                parts, want = pattern[head, position] * v[:, place[2]], z[position, head, place[2]]
                assert float(parts.sum()) == pytest.approx(float(want), abs=1e-4)
                source = int((parts * want.sign()).argmax())
            top = {name: profiles.tensors[f"{role}/top/{name}"][i, n] for name in ("activation", "source", "source_token", "contribution")}
            assert float(top["activation"]) == pytest.approx(float(want), abs=1e-4)
            assert int(top["source"]) == source
            assert int(top["source_token"]) == sample.rows[row][source]
            assert float(top["contribution"]) == pytest.approx(float(parts[source]), abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("heads", [False, True])
def test_values_at_sources_are_held_for_a_bounded_number_of_units(tiny, tasks, heads, monkeypatch):
    places = [(0, h) for h in range(4)] if heads else [(0, h, d) for h in range(4) for d in range(4)]
    how = {"site": "attn_pre_out", "whole_heads": heads}
    whole, sizes, original = examined(tiny, places, tasks, **how), [], stream.norms_of if heads else torch.einsum

    def spy(*given):
        if heads or given[0] == "bus,bsud->bud":
            sizes.append((given[0] if heads else given[2]).shape)
        return original(*given)

    monkeypatch.setattr(*((stream, "norms_of") if heads else (torch, "einsum")), spy)
    monkeypatch.setattr(stream, "AT_ONCE", 3 * 16 * 31 * bind(tiny, "attn_pre_out").shape[2])
    parts = examined(tiny, places, tasks, **how)
    held = [shape for shape in sizes if not heads or shape[2] < 4]
    assert held
    assert max(math.prod(shape) for shape in held) <= stream.AT_ONCE
    for name, tensor in whole.tensors.items():
        torch.testing.assert_close(parts.tensors[name], tensor, equal_nan=True)


def test_the_direct_effect_is_the_change_of_logits_with_a_fixed_norm(tiny, tasks):
    """The final norm's scale frozen: its output is computed anew with the mean and scale of the unchanged stream."""
    profiles = examined(tiny, [(0, 3), (1, 70)], tasks)
    last = f"blocks.{tiny.cfg.n_layers - 1}.hook_out"
    stream = seen(tiny, sample_task(tiny, tasks["forget"], "collect", 60), [last])[last][0, 7]
    module = tiny.ln_final.original_component
    eps = next(getattr(module, name) for name in ("eps", "variance_epsilon") if hasattr(module, name))
    centred = hasattr(module, "bias")

    def logits(x):
        rest = stream - stream.mean() if centred else stream
        scale = (rest.square().mean() + eps).sqrt()
        x = x - x.mean() if centred else x
        return (x / scale * module.weight) @ tiny.W_U, scale

    for place in ((0, 3), (1, 70)):
        write = bind(tiny, "mlp").rows(place[0])[place[1]].detach()
        after, scale = logits(stream + 0.7 * write)
        change = ((after - logits(stream)[0]) * scale / 0.7).detach()
        order = change.argsort(descending=True)
        rows = profiles.tokens(place)
        for name, best in (("promoted", order[: SIZE["listed"]]), ("suppressed", order.flip(0)[: SIZE["listed"]])):
            got = rows[rows["list"] == name]
            np.testing.assert_allclose(got["value"], change[best].numpy(), atol=1e-4)
            np.testing.assert_allclose(change[torch.tensor(got["token"].tolist())].numpy(), got["value"], atol=1e-4)


def test_a_labelled_neuron_fires_where_its_program_step_says():
    """Of `sort-and-reverse`: a unit "reverse: 4 letters, 2 answered" is active at the second answer to four letters, and nowhere else."""
    compiled = sepcap.load_compiled("sort-and-reverse", device="cpu", texts=1_000)
    steps = {}
    for layer, names in enumerate(compiled.steps["mlp"]):
        for neuron, name in enumerate(names):
            if found := re.fullmatch(r"reverse: (\d) letters, (\d) answered", name):
                steps[layer, neuron] = tuple(map(int, found.groups()))
    assert len(steps) > 10
    how = {"tokens": 4_000, "k": 3, "window": 24, "progress": False}
    profiles = sepcap.examine(compiled.model, list(steps), tasks=tuple(compiled.tasks.values()), **how)
    checked = 0
    for place, (letters, answered) in steps.items():
        i = profiles.number(place)
        for role in ("forget", "retain"):
            top = {name: profiles.tensors[f"{role}/top/{name}"][i] for name in ("tokens", "window", "position", "start", "row")}
            for ids, window, position, start, row in zip(*top.values(), strict=True):
                if row < 0:
                    continue
                at = int(position - start)
                words = compiled.model.tokenizer.convert_ids_to_tokens([t for t in ids[: at + 1].tolist() if t >= 0])[2:]
                equals = words.index("=")
                assert (equals, len(words) - equals - 1) == (letters, answered), (place, words)
                others = torch.cat([window[:at], window[at + 1 :]]).nan_to_num()
                assert float(others.abs().max()) < 0.01 * float(window[at])
                checked += 1
    assert checked >= 3 * len(steps)


def test_every_bit_of_the_model_is_as_before(tiny_opt, tasks, monkeypatch):
    def hooks():
        return {name: len(point.fwd_hooks) for name, point in tiny_opt.hook_dict.items()}

    before = fingerprint(tiny_opt), hooks()
    examined(tiny_opt, [(0, 1, 2)], tasks, site="attn_pre_out")

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(stream.Kept, "_add_top", stop)
    with pytest.raises(KeyboardInterrupt):
        examined(tiny_opt, [(0, 1, 2)], tasks, site="attn_pre_out")
    assert (fingerprint(tiny_opt), hooks()) == before


def test_what_is_kept_does_not_grow_with_the_tokens(tiny_opt, tasks):
    def numbers(tokens):
        found = examined(tiny_opt, SITES["mlp"], tasks, tokens=tokens)
        return {name: tuple(tensor.shape) for name, tensor in found.tensors.items()}

    assert numbers(300) == numbers(1_500)
    assert POOL * SIZE["window"] < 1_500


def test_scores_ranks_and_effects_are_shown(tiny_opt, tasks, tmp_path):
    statistics = [sepcap.collect(tiny_opt, task, tokens=300, sites="mlp") for task in tasks.values()]
    scores = sepcap.score(*statistics)
    profiles = scores.examine(tiny_opt, n=5, tasks=tuple(tasks.values()), **SIZE, out=tmp_path / "p")
    assert profiles.table["rank"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_allclose(profiles.table["score"], scores.table["score"][:5])
    alone = sepcap.ablate_each(tiny_opt, **tasks, sample=6, tokens=200, reference_tokens=100, progress=False)
    of = alone.examine(tiny_opt, n=3, tasks=tuple(tasks.values()), scores=scores, **SIZE)
    table = alone.table.sort_values("delta_loss_forget", ascending=False).head(3)
    got = of.table.sort_values("delta_loss_forget", ascending=False)
    np.testing.assert_array_equal(got[["layer", "neuron"]].astype(int), table[["layer", "neuron"]])
    np.testing.assert_allclose(got["delta_loss_retain_high"], table["delta_loss_retain_high"])
    assert of.table["rank"].notna().all()
    loaded = sepcap.load_result(tmp_path / "p")
    for name, frame in profiles.tables.items():
        pd.testing.assert_frame_equal(frame, loaded.tables[name])
    assert loaded.summary() == profiles.summary()
    assert loaded.figure(0).data
    assert loaded.figure((int(loaded.table["layer"][1]), int(loaded.table["neuron"][1]))).data
    assert loaded.figure("tasks").data
    same = scores.examine(tiny_opt, n=5, tasks=tuple(tasks.values()), **SIZE, out=tmp_path / "p")
    assert torch.equal(same.tensors["forget/top/row"], profiles.tensors["forget/top/row"])
    with pytest.raises(FileExistsError, match="another configuration"):
        scores.examine(tiny_opt, n=4, tasks=tuple(tasks.values()), **SIZE, out=tmp_path / "p")


def test_without_neurons_the_highest_scores_are_taken(tiny_opt, tasks):
    found = examined(tiny_opt, None, tasks, n=4)
    statistics = [sepcap.collect(tiny_opt, task, tokens=SIZE["tokens"], sites="mlp") for task in tasks.values()]
    want = sepcap.score(*statistics).table.head(4)
    assert found.table[["layer", "neuron"]].astype(int).values.tolist() == want[["layer", "neuron"]].astype(int).values.tolist()


def test_a_run_leads_to_the_neurons_of_a_step(trained, tasks, tmp_path):
    config = sepcap.PruningConfig(**tasks, fractions={"mlp": 0.1}, steps=2, tokens=300, eval_tokens=300)
    run = sepcap.prune(trained, config, out=tmp_path / "run", progress=False)
    pruned = run.neurons(2) - run.neurons(1)
    found = run.examine(2, trained, n=5, **SIZE | {"tasks": tuple(tasks.values())})
    chosen = found.neurons(model=trained)
    assert len(chosen) == 5
    assert chosen - pruned == sepcap.NeuronSet.empty(trained, "mlp")
    with pytest.raises(ValueError, match="step=0: no neuron is pruned"):
        run.examine(0, trained)


def test_a_random_run_has_n_neurons_drawn_from_those_of_the_step(trained, tasks, tmp_path):
    config = sepcap.PruningConfig(**tasks, fractions={"mlp": 0.5}, steps=1, tokens=300, eval_tokens=300, importance="random")
    run = sepcap.prune(trained, config, out=tmp_path / "run", progress=False)
    found = run.examined(1, 6)["neurons"]
    assert found == run.examined(1, 6)["neurons"]
    assert len(found) == len(found & run.neurons(1)) == 6
    assert all(found.per_layer("mlp")), "the first six by index would all be in layer 0"


def test_neurons_of_a_rotated_run_are_not_those_of_the_model(trained_folder, tasks, tmp_path):
    model = fresh(trained_folder)
    config = sepcap.PruningConfig(**tasks, fractions={"attn_pre_out": 0.2}, steps=2, tokens=300, eval_tokens=300, rotation="fold")
    run = sepcap.prune(model, config, out=tmp_path / "run", progress=False)
    for neurons in (run.neurons(1), run.neurons(2) - run.neurons(1)):
        with pytest.raises(ValueError, match="rotated basis"):
            neurons.examine(model, tasks=tuple(tasks.values()), **SIZE)
    run.rotation().apply(model)
    assert len(run.neurons(1).examine(model, tasks=tuple(tasks.values()), **SIZE).table) == run.neurons(1).count()


def test_what_was_found_in_another_model_is_refused(trained, trained_folder, tasks, tmp_path):
    other = fresh(trained_folder)
    with torch.no_grad():
        other.blocks[0].mlp.W_in[0, 0] += 1
    how = {**SIZE, "tasks": tuple(tasks.values())}
    ablations = sepcap.ablate_each(trained, **tasks, tokens=100, layers=(0,), progress=False)
    with pytest.raises(ValueError, match="ablations are of other weights"):
        sepcap.examine(other, ablations, n=2, **how)
    config = sepcap.PruningConfig(**tasks, fractions={"mlp": 0.1}, steps=1, tokens=300, eval_tokens=300)
    run = sepcap.prune(trained, config, out=tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="model has other weights"):
        run.examine(1, other, **how)


def test_clusters_lead_to_their_neurons(trained, tasks):
    clusters = sepcap.cluster_neurons(trained, k=8, progress=False)
    found = clusters.examine(trained, [(1, 3)], tasks=tuple(tasks.values()), **SIZE)
    assert found.neurons(model=trained) == clusters.neurons(trained, [(1, 3)])


@pytest.mark.parametrize(
    ("neurons", "how", "error", "says"),
    [
        ([], {}, ValueError, "neurons is empty"),
        ([(0, 999)], {}, IndexError, r"neurons: \(0, 999\) does not exist"),
        ([(0, 1, 2)], {}, TypeError, r"neurons=\[\(0, 1, 2\)\]: give a NeuronSet"),
        ("mlp", {}, TypeError, "neurons='mlp': give"),
        ([(0, 1)], {"tasks": ("a",)}, ValueError, "tasks="),
        ([(0, 1)], {"whole_heads": True}, ValueError, "has no heads"),
        ([(0, 1)], {"window": 2}, ValueError, "window=2"),
        ([(0, 1)], {"k": 0}, ValueError, "k=0"),
    ],
)
def test_wrong_input_is_one_sentence(tiny_opt, tasks, neurons, how, error, says):
    with pytest.raises(error, match=says):
        sepcap.examine(tiny_opt, neurons, **{"tasks": tuple(tasks.values()), **SIZE, **how})


def test_a_set_of_another_model_is_refused(tiny_opt, tasks):
    wide = sepcap.NeuronSet({"mlp": torch.ones(2, 4_000, dtype=torch.bool)})
    with pytest.raises(ValueError, match="those of another model"):
        examined(tiny_opt, wide, tasks)


def test_a_unit_that_is_never_active_has_no_context(tiny_opt, tasks):
    population = bind(tiny_opt, "mlp")
    population.delete(0, torch.arange(population.shape[1]) == 3)
    found = examined(tiny_opt, [(0, 3)], tasks)
    assert not len(found.contexts().query("group == 'strongest'"))
    assert not len(found.tokens().query("list == 'preferred'"))
    assert math.isclose(found.table["abs_forget"][0], 0)
    assert found.figure(0).data
