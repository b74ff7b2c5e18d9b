"""Speed and memory, as ratios to the bare forward pass in the same run.

    make bench            (with nothing else running; less than six minutes on two cores)
    make gpu              (the same on a CUDA device, after its tests)
    OMP_NUM_THREADS=1 python benchmarks/ratios.py --processor-time     (on a machine that others use too)

Every ratio is between medians over alternating repetitions, so that a slow minute affects both sides.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

import sepcap
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.models.forward import logits_of, measuring
from sepcap.models.loading.load import default_folder
from sepcap.models.sites import bind, site_shape
from sepcap.statistics.collect import BATCH_SIZE, collect_sample
from sepcap.studies.single_ablations.measure import Rows, shortcuts_of
from sepcap.studies.single_ablations.passes import Units, activations, effects
from sepcap.tasks.batches import TokenSample, sample_tokens
from sepcap.tasks.samples import sample_task

SITES = ("mlp", "attn_pre_out")

CLOCK = time.perf_counter
"""Clock of ratios to a bare pass; with --processor-time that of this process, which does not run while others do."""

EAGER = {
    "GPT-2": GPT2Config(n_embd=768, n_layer=2, n_head=12, n_positions=2048, vocab_size=1000),
    "GPT-NeoX": GPTNeoXConfig(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=2, num_attention_heads=12, max_position_embeddings=2048, vocab_size=1000
    ),
    "Llama": LlamaConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=12, max_position_embeddings=2048, vocab_size=1000
    ),
    "Mistral": MistralConfig(
        hidden_size=768, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
        max_position_embeddings=2048, vocab_size=1000,
    ),
}  # fmt: skip
"""Architectures for which the bridge computes attention unfused: two layers of the width of the smallest released models."""

BOUNDS = {
    "import sepcap, seconds beyond bare Python": 0.3,
    "sepcap --help, seconds": 0.5,
    "embedded, 16x256: collect / bare forward": 1.30,
    "embedded, 16x256: evaluate / bare forward with logits": 1.10,
    "12 layers x 768, 2x512: collect / bare forward": 1.10,
    "12 layers x 768, 2x512: evaluate / bare forward with logits": 1.10,
    "4 layers x 256, 8x512: evaluate / bare forward with logits": 1.10,
    "embedded, 16x256: collect with histograms / without": 1.60,
    "embedded, 16x256: collect with gradients / bare forward and backward": 1.15,
    "12 layers x 768, 2x512: collect with gradients / bare forward and backward": 1.15,
    "local-prose by name, 20,000 tokens: sampled again, seconds": 0.2,
    "local-prose loaded, 20,000 tokens: sampled again, seconds": 0.05,
    "embedded: every head, every kind of ablation, seconds": 180,
    **{f"{task}: plain loop of ablate and evaluate / ablate_each": -4.0 for task in ("local-code", "local-prose")},
    **{f"{task}: ablate_each, all 6,144 mlp neurons, minutes": 20 for task in ("local-code", "local-prose")},
    "pruning step / its forward passes": 1.15,
    **{f"{family}, {n:,} tokens: evaluate / bare fused attention": 1.30 for family in EAGER for n in (512, 2048)},
    "peak memory of collect, 200,000 / 20,000 tokens": 1.05,
}
"""Upper bounds guaranteed by the package, and lower ones as negative numbers; the other ratios are reported without a bound."""


def sample_of(rows: int, context: int, vocabulary: int, seed: int = 0) -> TokenSample:
    """Random tokens: the time of a forward pass does not depend on them."""
    ids = np.random.default_rng(seed).integers(3, vocabulary, size=(rows, context))
    ids[:, 0] = 0
    return TokenSample("random", "collect", tuple(ids), 0, rows * (context - 1), rows * (context - 1), ("0:0",), "random")


def alternate(device: str, repeat: int, clock: Callable[[], float] | None = None, **sides: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each side; the sides alternate, after one warm-up round."""
    clock = clock or CLOCK
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(repeat + 1):
        for name, side in sides.items():
            wait_for(device)
            started = clock()
            side()
            wait_for(device)
            if round_:
                times[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def wait_for(device: str) -> None:
    """Wait until a GPU has finished: it runs asynchronously, so the clock would otherwise stop too early."""
    if device != "cpu":
        torch.cuda.synchronize(device)


def bare(hf_model, sample: TokenSample, batch_size: int, logits: bool) -> Callable[[], None]:
    """The plain Hugging Face forward pass over the same batches, fused attention, no hooks."""
    body = hf_model if logits else hf_model.model

    def run() -> None:
        with torch.inference_mode():
            for batch in sample.batches(batch_size):
                body(batch.inputs.to(hf_model.device), use_cache=False)

    return run


def bare_backward(hf_model, sample: TokenSample, batch_size: int, weights: bool) -> Callable[[], None]:
    """The plain forward and backward pass of the loss over the same batches; to all weights, or only through the model to its input."""

    def run() -> None:
        for weight in hf_model.parameters():
            weight.requires_grad_(weights)
        embed = hf_model.get_input_embeddings()
        for batch in sample.batches(batch_size):
            ids = batch.inputs.to(hf_model.device)
            inputs = {"input_ids": ids} if weights else {"inputs_embeds": embed(ids).requires_grad_()}
            logits = hf_model(**inputs, use_cache=False).logits
            torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").backward()
            hf_model.zero_grad()

    return run


def gradients(device: str, folder: Path, batch_size: int, context: int, batches: int, repeat: int) -> dict[str, float]:
    """Time of collect with gradients relative to the bare forward and backward pass."""
    hooked, plain = load_pair(folder, device)
    sample = sample_of(batch_size * batches, context, plain.config.vocab_size)
    t = alternate(
        device,
        repeat,
        whole=bare_backward(plain, sample, batch_size, weights=True),
        through=bare_backward(plain, sample, batch_size, weights=False),
        collect=lambda: collect_sample(hooked, sample, SITES, batch_size=batch_size, quiet=True, gradients=("atp", "taylor", "fisher")),
    )
    return {
        "collect with gradients / bare forward and backward": t["collect"] / t["whole"],
        "collect with gradients / bare forward and backward without those of weights": t["collect"] / t["through"],
    }


def load_pair(folder: Path, device: str):
    """The model with hooks and, separately, without."""
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().to(device)
    plain.set_attn_implementation("sdpa")
    return sepcap.load_model(folder, device=device), plain


def opt_folder(layers: int, width: int) -> Path:
    """A randomly initialised OPT with the vocabulary of the released ones."""
    folder = Path(tempfile.mkdtemp())
    config = OPTConfig(
        hidden_size=width, word_embed_proj_dim=width, ffn_dim=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
        vocab_size=50272, max_position_embeddings=512, bos_token_id=0, pad_token_id=1, eos_token_id=2,
    )  # fmt: skip
    OPTForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast.from_pretrained(default_folder()).save_pretrained(folder)
    return folder


def passes(device: str, folder: Path, batch_size: int, context: int, batches: int, repeat: int) -> dict[str, float]:
    """Time of collect and evaluate relative to the bare forward pass."""
    hooked, plain = load_pair(folder, device)
    sample = sample_of(batch_size * batches, context, plain.config.vocab_size)
    t = alternate(
        device,
        repeat,
        body=bare(plain, sample, batch_size, logits=False),
        logits=bare(plain, sample, batch_size, logits=True),
        collect=lambda: collect_sample(hooked, sample, SITES, batch_size=batch_size, quiet=True),
        evaluate=lambda: evaluate_sample(hooked, sample, batch_size=batch_size, quiet=True),
    )
    tokens = len(sample.rows) * context
    return {
        "collect / bare forward": t["collect"] / t["logits"],
        "collect / bare forward without unembedding": t["collect"] / t["body"],
        "evaluate / bare forward with logits": t["evaluate"] / t["logits"],
        "bare tokens per second": tokens / t["logits"],
    }


def histograms(device: str) -> float:
    """Time of collect with histograms relative to without, on real text: on random tokens activations are atypical."""
    model = sepcap.load_model(device=device)
    sample = sample_tokens(sepcap.load_task("local-prose"), "collect", model.tokenizer, 16 * 4 * 255, 256)
    t = alternate(
        device,
        5,
        without=lambda: collect_sample(model, sample, SITES, quiet=True),
        having=lambda: collect_sample(model, sample, SITES, quiet=True, histogram=True),
    )
    return t["having"] / t["without"]


def attention(device: str, name: str, context: int) -> dict[str, float]:
    """Time of the bridge's own attention, and of evaluate, relative to the bare forward pass with fused attention."""
    plain = AutoModelForCausalLM.from_config(EAGER[name], attn_implementation="sdpa").eval().to(device)
    with tempfile.TemporaryDirectory() as folder:
        plain.save_pretrained(folder)
        PreTrainedTokenizerFast.from_pretrained(default_folder()).save_pretrained(folder)
        hooked = sepcap.load_model(folder, device=device)
    rows = 2048 // context
    sample = sample_of(rows, context, plain.config.vocab_size)
    inputs = next(sample.batches(rows)).inputs.to(device)
    t = alternate(
        device,
        3,
        bare=bare(plain, sample, rows, logits=True),
        bridge=lambda: logits_of(hooked, inputs),
        evaluate=lambda: evaluate_sample(hooked, sample, quiet=True),
    )
    what = f"{name}, {context:,} tokens"
    return {
        f"{what}: bridge / bare fused attention": t["bridge"] / t["bare"],
        f"{what}: evaluate / bare fused attention": t["evaluate"] / t["bare"],
    }


def pruning_step(device: str) -> float:
    """Time of one pruning step relative to the sum of its forward passes, which are timed before and after the run."""
    model, plain = load_pair(default_folder(), device)
    config = sepcap.PruningConfig(fractions={"mlp": 0.02}, steps=4, tokens=20_000, eval_tokens=20_000)
    # two collections and two evaluations of 20,000 tokens each
    passes = bare(plain, sample_of(79, 256, plain.config.vocab_size), config.batch_size, logits=True)
    clock = time.perf_counter  # that of the record of a run
    seconds = [alternate(device, 3, clock, passes=passes)["passes"]]
    with tempfile.TemporaryDirectory() as folder:
        run = sepcap.prune(model, config, out=Path(folder) / "run")
        step = statistics.median(run.record(step)["seconds"] for step in range(2, config.steps + 1))
    seconds.append(alternate(device, 3, clock, passes=passes)["passes"])
    return step / (4 * statistics.mean(seconds))


def peak_memory(device: str, tokens: int) -> float:
    """Peak memory on the device in MB of a new process that collects that many tokens of a task: the smaller of two runs."""
    peak = "torch.cuda.max_memory_allocated()" if device != "cpu" else "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024"
    code = (
        "import resource, sepcap, torch\n"
        f"sepcap.collect(sepcap.load_model(device={device!r}), 'local-python', tokens={tokens})\n"
        f"print({peak} / 2**20)"
    )
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(2)]
    return min(float(run.stdout.split()[-1]) for run in runs)


def memory(device: str) -> float:
    """Ratio of peak memory at ten times the tokens. The larger is measured first, so that texts are cached in all runs that count."""
    larger = peak_memory(device, 200_000)
    return larger / peak_memory(device, 20_000)


def every_head(device: str) -> float:
    """Seconds for every kind of ablation on every head of the embedded model, including constants and fits."""
    model = sepcap.load_model(device=device)
    started = time.perf_counter()
    sepcap.compare_ablations(model)
    wait_for(device)
    return time.perf_counter() - started


def every_neuron(device: str, task: str, per_layer: int = 8) -> dict[str, float]:
    """All mlp neurons of the embedded model, each ablated alone on 4,096 predictions in 64 documents; extrapolated from a sample.

    The plain loop is what a user would write: ablate a neuron, evaluate, take the next. It reads the texts every time; without that
    part it is reported too. The unablated pass and the activations are needed once for all neurons, and are counted once.
    """
    model = sepcap.load_model(device=device)
    size: dict[str, Any] = {"tokens": 4_096, "context": 65, "per_document": 64}
    population, (layers, width) = bind(model, "mlp"), site_shape(model, "mlp")
    sample = sample_task(model, sepcap.load_task(task), "evaluate", size["tokens"], size["context"], per_document=size["per_document"])
    rows, zero = Rows.of(sample), torch.zeros(layers, width)
    shortcuts = shortcuts_of(model, population, rows, zero)
    draw = np.random.default_rng(0)
    index = [torch.from_numpy(np.sort(draw.choice(width, per_layer, replace=False)))[:, None] for _ in range(layers)]
    once, each, plain, sampled = 0.0, 0.0, [], []
    with measuring(model):
        started = time.perf_counter()
        blocks = [rows.block(model, i, shortcuts) for i in range(len(rows.order))]
        wait_for(device)
        once += time.perf_counter() - started
    for layer in range(layers):
        units = Units(layer, index[layer], zero[layer])
        for block in blocks:
            with measuring(model):
                started = time.perf_counter()
                z = {layer: activations(model, population, block, layer)}
                wait_for(device)
                once += time.perf_counter() - started
                started = time.perf_counter()
                effects(model, population, block, units, z, shortcuts, BATCH_SIZE * size["context"])
                wait_for(device)
                each += time.perf_counter() - started
        started = time.perf_counter()
        with sepcap.ablate(model, layer=layer, neurons=[int(index[layer][0])], site="mlp"):
            sepcap.evaluate(model, task, **size)
        plain.append(time.perf_counter() - started)
        started = time.perf_counter()
        with sepcap.ablate(model, layer=layer, neurons=[int(index[layer][0])], site="mlp"):
            evaluate_sample(model, sample, quiet=True)
        sampled.append(time.perf_counter() - started)
    ours = once + each / per_layer * width
    loop, loop_without_texts = (statistics.mean(seconds) * layers * width for seconds in (plain, sampled))
    return {
        f"{task}: plain loop of ablate and evaluate / ablate_each": loop / ours,
        f"{task}: plain loop on texts that are read once / ablate_each": loop_without_texts / ours,
        f"{task}: ablate_each, all 6,144 mlp neurons, minutes": ours / 60,
    }


def seconds_of(*command: str) -> float:
    """Shortest time of five runs of a command."""
    times = []
    for _ in range(5):
        started = time.perf_counter()
        subprocess.run(command, capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    return min(times)


def of_the_import(device: str) -> Iterator[dict[str, float]]:
    start = seconds_of(sys.executable, "-c", "pass")
    yield {"import sepcap, seconds beyond bare Python": seconds_of(sys.executable, "-c", "import sepcap") - start}
    yield {"sepcap --help, seconds": seconds_of(str(Path(sys.executable).with_name("sepcap")), "--help")}


def of_the_embedded_model(device: str) -> Iterator[dict[str, float]]:
    yield {f"embedded, 16x256: {k}": v for k, v in passes(device, default_folder(), 16, 256, 4, 7).items()}
    yield {"embedded, 16x256: collect with histograms / without": histograms(device)}


def of_a_bigger_model(device: str) -> Iterator[dict[str, float]]:
    yield {f"12 layers x 768, 2x512: {k}": v for k, v in passes(device, opt_folder(12, 768), 2, 512, 1, 4).items()}


def of_a_wide_vocabulary(device: str) -> Iterator[dict[str, float]]:
    yield {f"4 layers x 256, 8x512: {k}": v for k, v in passes(device, opt_folder(4, 256), 8, 512, 1, 4).items()}


def of_samples(device: str) -> Iterator[dict[str, float]]:
    model = sepcap.load_model(device=device)
    loaded = sepcap.load_task("local-prose")
    for how, task in (("by name", lambda: sepcap.load_task("local-prose")), ("loaded", lambda: loaded)):
        times = []
        for _ in range(6):
            started = time.perf_counter()
            sample_task(model, task(), "evaluate", 20_000)
            times.append(time.perf_counter() - started)
        yield {f"local-prose {how}, 20,000 tokens: sampled again, seconds": statistics.median(times[1:])}


def of_gradients(device: str) -> Iterator[dict[str, float]]:
    yield {f"embedded, 16x256: {k}": v for k, v in gradients(device, default_folder(), 16, 256, 2, 5).items()}
    yield {f"12 layers x 768, 2x512: {k}": v for k, v in gradients(device, opt_folder(12, 768), 2, 512, 1, 3).items()}


def of_attention(device: str) -> Iterator[dict[str, float]]:
    for name in EAGER:
        for context in (512, 2048):
            yield attention(device, name, context)


SECTIONS: dict[str, Callable[[str], Iterator[dict[str, float]]]] = {
    "import": of_the_import,
    "embedded": of_the_embedded_model,
    "big": of_a_bigger_model,
    "wide": of_a_wide_vocabulary,
    "samples": of_samples,
    "gradients": of_gradients,
    "attention": of_attention,
    "step": lambda device: iter([{"pruning step / its forward passes": pruning_step(device)}]),
    "memory": lambda device: iter([{"peak memory of collect, 200,000 / 20,000 tokens": memory(device)}]),
    "ablate_each": lambda device: (every_neuron(device, task) for task in ("local-code", "local-prose")),
    "heads": lambda device: iter([{"embedded: every head, every kind of ablation, seconds": every_head(device)}]),
}
"""Measurements, each of a few ratios."""


def _verdict(value: float, bound: float) -> str:
    """A bound in words, and whether it is kept; a negative one is a lower bound."""
    if bound < 0:
        return f"(at least {-bound:g}{': missed' if value < -bound else ''})"
    return f"(at most {bound:g}{': exceeded' if value > bound else ''})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=SECTIONS, help="one section instead of all")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--processor-time", action="store_true", help="processor seconds instead of those on the clock, for one thread")
    chosen = parser.parse_args()
    if chosen.processor_time:
        global CLOCK
        CLOCK = time.process_time
        torch.set_num_threads(1)
    if chosen.device != "cpu" and not torch.cuda.is_available():
        parser.exit(0, f"--device {chosen.device}: torch sees no CUDA device here, so nothing was measured\n")
    disable_progress_bar()
    results: dict[str, float] = {}
    begun = time.perf_counter()
    for section in [chosen.only] if chosen.only else SECTIONS:
        print(f"[{time.perf_counter() - begun:4.0f} s] {section}", file=sys.stderr, flush=True)
        for measured in SECTIONS[section](chosen.device):
            results |= measured
            for name, value in measured.items():
                bound = BOUNDS.get(name)
                verdict = "" if bound is None else _verdict(value, bound)
                print(f"{value:12.3f}  {name} {verdict}", flush=True)
    print(f"[{time.perf_counter() - begun:4.0f} s] done", file=sys.stderr, flush=True)
    if chosen.only is None:
        written = Path(f"benchmarks/results{'' if chosen.device == 'cpu' else '-gpu'}.json")
        written.write_text(json.dumps({k: round(v, 4) for k, v in results.items()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
