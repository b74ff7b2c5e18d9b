"""Every neuron, or head, ablated alone: the exact change of loss and accuracy on two tasks (METHODS 19)."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sepcap.checks import FROM_0, FROM_1, checked
from sepcap.progress import progress as bar_of
from sepcap.selection.neurons import NeuronSet
from sepcap.storage import load_tensors, remove_parts
from sepcap.studies.base.folder import Pieces, as_json, identity_of
from sepcap.studies.base.runner import run_study, study
from sepcap.studies.single_ablations.config import SingleAblationsConfig
from sepcap.studies.single_ablations.plan import Plan
from sepcap.studies.single_ablations.result import SingleAblations
from sepcap.workers.dispatch import Task
from sepcap.workers.engines import Engine
from sepcap.workers.shards import crew, is_plain, target_of


@study(SingleAblationsConfig)
@checked(workers=FROM_1, threads=FROM_1, gpus_per_run=FROM_0)
def ablate_each(
    model: Any,
    config: SingleAblationsConfig,
    *,
    neurons: NeuronSet | None = None,
    workers: int | None = None,
    engine: Engine = "processes",
    load: Mapping[str, Any] | None = None,
    threads: int = 1,
    gpus_per_run: float | None = None,
    out: str | Path | None = None,
    say: Callable[[str], Any],
) -> SingleAblations:
    """Ablate every neuron of a site alone, and measure the exact change of loss and accuracy on both tasks.

    The model is run without each neuron, on the same tokens of the evaluation parts. Values that cannot change are not recomputed:
    earlier layers, rows in which the neuron has the value that it is set to, earlier positions of a causal model. Which of these
    shortcuts a model allows is tested on a few rows first. With `out`, every 128 neurons are written before the next ones begin:
    the same call resumes an interrupted one.

    Args:
        model: what `load_model` returns; default is to load `config.model`. It is not changed.
        config: a `SingleAblationsConfig`; its fields can also be given as keywords.
        neurons: the neurons to ablate, each alone; default all of the site, or those of `config.layers` and `config.heads`.
        workers: number of workers that share the chunks of neurons; `model` is then a name or a folder, which each of them loads, and
            `neurons` may be given, but tasks are names or paths. The bits are those of one process with as many threads, for every number
            of workers; a worker that dies is replaced, and its chunk done again.
        engine, load, threads, gpus_per_run: where workers are, what they load the model with, threads and GPUs of each, as for
            `sepcap.sweep`.
        out: folder of the study; without one, nothing is saved.
        progress: True announces the work and its measured cost and shows bars, False shows nothing; a function receives the announcements.

    Returns:
        SingleAblations with `.delta()`, `.top()`, `.table`, `.tables`, `.summary()` and `.figure()`.

    Raises:
        ValueError: neurons of another site, a sample larger than the population, a pair of a neuron that is not ablated, too little text.
        IndexError: a layer or head that does not exist.
        FileExistsError: `out` contains something else, or the same study with another configuration; nothing is computed then.
        RuntimeError: a worker failed; the first error. Out of memory, it names the batch size to give.

    Source: [SEP] further work 9; METHODS 19.

    Example:
        >>> found = sepcap.ablate_each(model, layers=3, sample=100, tokens=2_000)  # doctest: +SKIP
        >>> found.delta("forget", "loss").value  # doctest: +SKIP
    """
    if workers is not None:
        where: dict[str, Any] = {"workers": workers, "engine": engine, "load": load, "threads": threads}
        where["gpus_per_run"] = gpus_per_run
        return _in_workers(model, config, neurons, out, say, **where)
    plan = Plan.of(model, config, neurons)
    return run_study(SingleAblations, plan.resolved, plan.compute, out, plan.cost, say)


def _in_workers(
    model: Any,
    config: SingleAblationsConfig,
    neurons: NeuronSet | None,
    out: str | Path | None,
    say: Callable[[str], Any],
    *,
    workers: int,
    engine: Engine,
    load: Mapping[str, Any] | None,
    threads: int,
    gpus_per_run: float | None,
) -> SingleAblations:
    """`ablate_each` without a model in this process: one worker plans, all measure chunks, one puts the result together."""
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    fields |= {name: str(value) for name, value in fields.items() if isinstance(value, Path)}
    target, on_cpu = target_of("studies.single_ablations.shards.AblationShards", model or config.model, load, threads)
    is_plain("ablate_each", fields)
    with crew("ablate_each", target, engine, workers, gpus_per_run=gpus_per_run, on_cpu=on_cpu) as (place, carry_out, where):
        given: dict[str, Any] = {"config": fields, "neurons": None}
        if neurons is not None:
            given["neurons"] = str(place / "neurons.safetensors")
            neurons.save(given["neurons"])

        def ask(do: str, **more: Any) -> Any:
            return next(iter(dict(carry_out([Task(do, {**given, "do": do, **more})])).values()))["found"]

        def compute(pieces: Pieces) -> SingleAblations:
            at = {"folder": str(pieces.folder.absolute()), "study": pieces.study}
            while left := ask("left", **at):
                tasks = [
                    Task(
                        f"part {what}-{block}-{chunk} of {role}",
                        {**given, "do": "measure", **at, "role": role, "what": what, "block": block, "chunk": chunk},
                        shares=f"{role} {block}",
                    )
                    for role, what, block, chunk in left
                ]
                with bar_of(total=len(tasks), desc="ablate_each", unit="piece") as bar:
                    for _ in carry_out(tasks):
                        bar.update(1)
            remove_parts(pieces.folder)  # of workers that died
            ask("arrays", **at, file=str(place / "arrays.safetensors"))
            arrays, _ = load_tensors(place / "arrays.safetensors", "arrays")
            return SingleAblations.of(as_json(resolved), {name: value.numpy() for name, value in arrays.items()})

        def cost() -> str:
            return f"{ask('cost')}, by one worker; {where}"

        resolved = ask("resolved")
        if out is None:
            say(cost())
            return compute(Pieces(place / SingleAblations.STUDY, identity_of({"study": SingleAblations.STUDY, **resolved})))
        return run_study(SingleAblations, resolved, compute, out, cost, say)
