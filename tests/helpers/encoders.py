"""Tiny masked language models and image classifiers, and the data they are tested on."""

import contextlib
import hashlib
import io
from dataclasses import replace
from functools import partial
from unittest import mock

import numpy as np
import torch
import transformers
from conftest import CONTEXT, VOCABULARY, tiny_tokenizer
from plain import Plain

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.studies.pruning import prune as pruning
from sepcap.tasks.samples import MaskedSample, sample_task
from sepcap.tasks.task import Task

SITES = ("mlp", "attn_pre_out", "attn_value")
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 72}
CLASSES = 12


def save(hf_model, folder, *beside):
    """A folder with a model whose every weight matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in hf_model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.normal_(0, 0.1)
    for part in (hf_model, *beside):
        part.save_pretrained(folder)
    return folder


def masking_tokenizer(family="roberta"):
    """As the family has it: RoBERTa's begins and ends with what BOS and EOS are, BERT has neither."""
    tokenizer = tiny_tokenizer()
    names = {"cls_token": "<s>", "sep_token": "</s>", "mask_token": "<mask>"}
    tokenizer.add_special_tokens(names)
    if family == "bert":
        tokenizer.bos_token = tokenizer.eos_token = None
    return tokenizer


def save_masked(family, folder):
    """A tiny RoBERTa, whose positions begin after the padding id, or BERT."""
    config, auto = {"roberta": transformers.RobertaConfig, "bert": transformers.BertConfig}[family], transformers.AutoModelForMaskedLM
    positions = CONTEXT + (2 if family == "roberta" else 0)
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 1, "max_position_embeddings": positions}
    hf_model, tokenizer = auto.from_config(config(**SIZES, **ids)), masking_tokenizer(family)
    save(hf_model, folder, tokenizer)
    with torch.no_grad():  # what the texts of the tests are made of is likely, so that there are hits
        hf_model.get_output_embeddings().bias[tokenizer("abcdefgh 012", add_special_tokens=False)["input_ids"]] += 2
    hf_model.save_pretrained(folder)
    return folder


def save_vit(folder, channels=1, side=8):
    """A tiny ViT with its image processor."""
    config = transformers.ViTConfig(**SIZES, image_size=side, patch_size=4, num_channels=channels, num_labels=CLASSES)
    means = [0.5, 0.4, 0.3][:channels]
    processor = transformers.ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=means, image_std=[0.25] * channels)
    return save(transformers.ViTForImageClassification(config), folder, processor)


def load(folder):
    return sepcap.load_model(folder, device="cpu")


def dataset_of(arrays, labels):
    """A `datasets.Dataset` of images."""
    import datasets
    from PIL import Image

    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    return datasets.Dataset.from_dict({"image": [Image.fromarray(a) for a in arrays], "label": list(labels)}, features=features)


def noise(n=240, shape=(8, 8), seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, *shape), dtype=np.uint8)


def file_of(array, form="PNG"):
    """The bytes of a file with an image."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form)
    return buffer.getvalue()


def pixels_in(file):
    """What decides about the part of an image: the SHA-256 of its mode, size and pixels, as a number."""
    from PIL import Image

    image = Image.open(io.BytesIO(file))
    return int(hashlib.sha256(f"{image.mode}{image.size}".encode() + image.tobytes()).hexdigest(), 16)


def part_of_image(file):
    """METHODS 9 by hand: two of four quarters of a hundred each."""
    return "evaluate" if pixels_in(file) % 2**32 % 100 // 25 in (0, 2) else "collect"


def images(labels=range(CLASSES), shape=(8, 8), seed=0, n=240, name="noise"):
    """A task of images of noise."""
    from sepcap.tasks.images import ImageSource

    labels = list(labels)
    return Task(f"{name}-{seed}", (ImageSource(dataset_of(noise(n, shape, seed), [labels[i % len(labels)] for i in range(n)])),), "images")


def ragged(model, texts, split="evaluate", tokens=600):
    """A sample of a masked language model whose rows have many lengths, so that batches are padded."""
    sample = sample_task(model, sepcap.load_task(texts), split, tokens)
    rows = tuple(np.append(row[: 5 + 7 * i % (CONTEXT - 5)], row[-1]) for i, row in enumerate(sample.rows))
    return replace(sample, rows=rows, tokens=sum(int((~np.isin(row, sample.special)).sum()) for row in rows))


def unpadded(sample):
    """Batches without padding: rows of text alone, images together."""
    return sample.batches(1 if isinstance(sample, MaskedSample) else 100)


def put(values, site, layer, z):
    """Set activations of the plain model; values: (site, layer) -> (mask, what)."""
    if (site, layer) in values:
        mask, what = values[site, layer]
        z[..., mask] = torch.as_tensor(what, dtype=z.dtype)


def plain_counts(family, folder, sample, values=None):
    """n, top-1, top-10 and loss of every row, by the plain model, row by row and prediction by prediction."""
    plain, rows = Plain(family, folder), []
    for batch in unpadded(sample):
        logits = plain.run(batch.inputs, look=partial(put, values or {}))
        for row, asked, answers in zip(logits if logits.dim() == 3 else logits[:, None], batch.asked, batch.answers, strict=True):
            scored, right = row[asked].double(), answers[asked][:, None]
            better = (scored >= scored.gather(1, right)).sum(1) - 1
            loss = -scored.log_softmax(1).gather(1, right)
            rows.append([len(right), int((better < 1).sum()), int((better < 10).sum()), float(loss.sum())])
    return np.array(rows)


def counts(evaluation):
    """The same of an Evaluation."""
    return evaluation.per_row[:, [0, 1, 2, 6]]


def chosen(neurons, values=0.0):
    """A neuron set, or a part of `sepcap.Statistics`-like constants of it, as `plain_counts` takes it."""
    return {
        (site, layer): (mask[layer], values[site][layer][mask[layer]] if isinstance(values, dict) else values)
        for site, mask in neurons.masks.items()
        for layer in range(len(mask))
    }


def plain_activations(family, folder, sample):
    """site -> [layer, position, …]: every position that counts, of every row alone."""
    plain, found = Plain(family, folder), {}
    for batch in unpadded(sample):

        def look(site, layer, z, keep=batch.keep):
            counted = z[keep] if keep.shape == z.shape[:2] else z.flatten(0, 1)
            found.setdefault(site, {}).setdefault(layer, []).append(counted.double())

        plain.run(batch.inputs, look=look)
    return {site: torch.stack([torch.cat(layers[layer]) for layer in sorted(layers)]) for site, layers in found.items()}


def check_statistics(stats, z):
    """Statistics against all activations, stored."""
    for site, part in stats.items():
        expected = {
            "mean": z[site].mean(1),
            "abs": z[site].abs().mean(1),
            "sqrt": z[site].abs().sqrt().mean(1),
            "rms": z[site].square().mean(1).sqrt(),
            "std": z[site].std(1, correction=0),
            "min": z[site].amin(1),
            "max": z[site].amax(1),
        }
        assert part.count == z[site].shape[1]
        for name, value in expected.items():
            torch.testing.assert_close(getattr(part, name).double(), value, rtol=1e-4, atol=1e-5)


def check_ablations(family, folder, task, context=None):
    """Zero, mean, constants and a head, against the plain model with the same activations set by torch hooks."""
    model = load(folder)
    sample = sample_task(model, sepcap.load_task(task), "evaluate", 100, context)
    reference = sepcap.collect(model, task, tokens=100, sites=SITES, context=context)
    neurons = sepcap.NeuronSet.random(model, dict.fromkeys(SITES, 0.4), seed=1)
    generator = torch.Generator().manual_seed(0)
    constants = {site: torch.randn(mask.shape, generator=generator).double() for site, mask in neurons.masks.items()}
    head = sepcap.NeuronSet.heads(model, [(1, 2)])
    before = plain_counts(family, folder, sample)
    np.testing.assert_allclose(counts(evaluate_sample(model, sample)), before, rtol=1e-4)
    for ablation, values in (
        (sepcap.ablate(model, neurons), chosen(neurons)),
        (sepcap.ablate(model, neurons, "mean", reference=reference), chosen(neurons, {s: reference[s].mean for s in SITES})),
        (sepcap.ablate(model, neurons, constants), chosen(neurons, constants)),
        (sepcap.ablate(model, layer=1, head=2), chosen(head)),
        (sepcap.ablate(model, layer=0, neurons=range(72), kind=1.0), {("mlp", 0): (torch.ones(72, dtype=torch.bool), 1.0)}),
    ):
        expected = plain_counts(family, folder, sample, values)
        assert abs(expected - before)[:, 3].max() > 1e-3, "the ablation does not matter"
        with ablation:
            np.testing.assert_allclose(counts(evaluate_sample(model, sample)), expected, rtol=1e-4)
    np.testing.assert_allclose(counts(evaluate_sample(model, sample)), before, rtol=1e-4)


def check_compared(family, folder, task):
    """The table of `compare_ablations`, row by row against the plain model."""
    model = load(folder)
    kinds = ("zero", "mean", "median", "peak", "resample", "optimal")
    compared = sepcap.compare_ablations(model, task=task, layer=1, head=2, kinds=kinds, tokens=100, reference_tokens=100, fit_tokens=60)
    sample = sample_task(model, sepcap.load_task(task), "evaluate", 100)
    before = plain_counts(family, folder, sample)
    np.testing.assert_allclose(counts(compared.before), before, rtol=1e-4)
    head, reference = sepcap.NeuronSet.heads(model, [(1, 2)]), sepcap.collect(model, task, tokens=100, sites="attn_pre_out", histogram=True)
    values = {"zero": 0.0} | {kind: {"attn_pre_out": getattr(reference["attn_pre_out"], kind)} for kind in ("mean", "median", "peak")}
    for kind, constants in values.items():
        expected = plain_counts(family, folder, sample, chosen(head, constants))
        np.testing.assert_allclose(counts(compared.evaluation(kind)), expected, rtol=1e-4)
    losses = compared.table.set_index("kind").loss
    assert losses[["resample", "optimal"]].notna().all()
    assert losses.nunique() == len(kinds)


def check_pruning(family, folder, forget, retain, out):
    """Two steps in the singular basis; stopped in the second, the run goes on to the same; saved, it is what was measured."""
    model = load(folder)
    options = {"tokens": 100, "eval_tokens": 100, "steps": 2, "rotation": "fold", "fractions": {"mlp": 0.25, "attn_pre_out": 0.25}}
    config = sepcap.PruningConfig(forget=forget, retain=retain, **options)
    run, calls = sepcap.prune(model, config, out=out / "whole"), []

    def delete(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        sepcap.delete(*args)

    with mock.patch.object(pruning, "delete", delete), contextlib.suppress(KeyboardInterrupt):
        sepcap.prune(model, config, out=out / "stopped")
    assert not sepcap.Run.load(out / "stopped").finished
    again = sepcap.prune(model, config, out=out / "stopped")
    columns = [column for column in run.trajectory.columns if column != "seconds"]
    assert again.finished
    assert again.trajectory[columns].equals(run.trajectory[columns])
    assert all(float(mask.float().mean()) == 0.5 for mask in run.neurons(2).masks.values())
    steps = run.trajectory.set_index(["step", "role"])
    for step, make in ((0, lambda: None), (2, lambda: (sepcap.rotate_values(model, "fold"), sepcap.delete(model, run.neurons(2))))):
        make()
        sepcap.save_pretrained(model, out / str(step))
        for role, task in (("forget", forget), ("retain", retain)):
            expected = plain_counts(family, out / str(step), sample_task(model, sepcap.load_task(task), "evaluate", 100)).sum(0)
            assert steps.loc[(step, role), "n"] == expected[0]
            assert steps.loc[(step, role), "top1"] == expected[1] / expected[0]
            np.testing.assert_allclose(steps.loc[(step, role), "loss"], expected[3] / expected[0], rtol=1e-4)
    assert steps.loc[(2, "forget"), "loss"] != steps.loc[(0, "forget"), "loss"]
