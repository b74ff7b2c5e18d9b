"""Tasks of EleutherAI's lm-evaluation-harness, on a model in its current state, with its hooks and edited weights."""

import copy
import difflib
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from sepcap.checks import checked
from sepcap.errors import missing_extra
from sepcap.models.forward import measuring
from sepcap.models.kinds import check_wraps, kind_of
from sepcap.statistics.collect import BATCH_SIZE

COLUMNS = ("task", "metric", "value", "stderr", "n")
REPLICAS = 1000
"""Bootstrap replicas for metrics without a closed formula for the standard error."""


@checked()
def run_lm_eval(
    model: Any,
    tasks: str | Iterable[str],
    *,
    limit: int | None = None,
    include_path: str | Path | None = None,
    num_fewshot: int | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
) -> pd.DataFrame:
    """Evaluate a model on tasks of the lm-evaluation-harness, which prompts and scores as it does for any Hugging Face model.

    Hooks are active: inside `sepcap.ablate` the ablated model is evaluated.

    Args:
        model: what `load_model` returns, pruned or ablated or neither.
        tasks: name of a task or group of the harness, or several.
        limit: evaluate only this many first examples of every task, as a quick check; default all.
        include_path: folder with task files (.yaml) of your own, whose names can then be given in `tasks`.
        num_fewshot: examples in the prompt; default is the number that each task specifies.
        batch_size: rows per pass.
        seed: seed of the examples in the prompt and of all other random draws of a task; the global random state is not changed.

    Returns:
        One row per task and metric: task, metric (with the name of its filter, if it has one), value, stderr (NaN if the harness
        returns none) and n, the number of examples. A group has its own row, without n.

    Raises:
        ImportError: the extra `lm-eval` is not installed.
        NotImplementedError: a HookedTransformer.
        ValueError: a model that is not a causal language model, or an unknown task, with the nearest names.

    Example:
        >>> sepcap.run_lm_eval(model, ["lambada_openai", "piqa"], limit=200)  # doctest: +SKIP
    """
    check_wraps(model, "the harness")
    if not hasattr(model, "original_model"):
        raise TypeError(f"model is a {type(model).__name__}; give the TransformerBridge that sepcap.load_model returns")
    if (kind := kind_of(model)) != "causal":
        raise ValueError(f"model is of kind {kind!r}, but the harness needs a causal language model")
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports] (an extra, which need not be installed)
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports] (an extra)
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports] (an extra)
    except ImportError as error:
        raise missing_extra("lm-eval", "lm-eval", "sepcap.run_lm_eval") from error
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    seeds = {f"{kind}_seed": seed for kind in ("random", "numpy_random", "torch_random", "fewshot_random")}
    with measuring(model), _own_random_state():
        manager = TaskManager(include_path=None if include_path is None else str(include_path))
        _check_names(names, manager.all_tasks, include_path)
        # the bridge's components are inside the Hugging Face model, so their hooks are called too; the copied tokenizer may get a pad token
        lm = HFLM(pretrained=model.original_model, tokenizer=copy.deepcopy(model.tokenizer), batch_size=batch_size)
        found = simple_evaluate(
            model=lm,
            tasks=names,
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=REPLICAS,
            log_samples=False,
            **seeds,
        )
    return _table(found)


def _check_names(names: list[str], known: list[str], include_path: str | Path | None) -> None:
    if not names:
        raise ValueError("tasks is empty: give the name of at least one")
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
            meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
            where = "" if include_path is None else f" or in {include_path}"
            raise ValueError(f"tasks: {name!r} is not one of the {len(known):,} tasks and groups of the harness{where}.{meant}")


@contextmanager
def _own_random_state() -> Iterator[None]:
    """Restore the state of all global random generators, which the harness seeds."""
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


def _table(found: Any) -> pd.DataFrame:
    rows = []
    for task, values in found["results"].items():
        n = found["n-samples"].get(task, {}).get("effective")
        for key, value in values.items():
            metric, _, kept = key.partition(",")
            # "acc,none" and "acc_stderr,none": a metric, and the filter of the answers
            if not kept or metric.endswith("_stderr"):
                continue
            stderr = pd.to_numeric(values.get(f"{metric}_stderr,{kept}"), errors="coerce")
            rows.append((task, metric if kept == "none" else f"{metric} ({kept})", value, stderr, n))
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"value": float, "stderr": float, "n": "Int64"})
