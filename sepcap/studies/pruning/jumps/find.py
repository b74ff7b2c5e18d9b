"""Attribution of jumps of accuracy after pruning steps to target tokens, and to the bigram path (METHODS 11)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sepcap.errors import unknown
from sepcap.models.blocks.places import all_layers, hook_of
from sepcap.models.forward import with_hooks
from sepcap.models.kinds import kind_of
from sepcap.models.loading.load import load_model
from sepcap.models.weights import WeightSnapshot
from sepcap.statistics.collect import correct_in
from sepcap.statistics.intervals import Ends, as_columns, bootstrap_interval, bootstrap_weights, cluster_sums
from sepcap.studies.base.result import Figures, StudyResult
from sepcap.studies.pruning.generations import model_of
from sepcap.studies.pruning.jumps.figures import draw_jumps, draw_tokens
from sepcap.studies.pruning.on_disk.run_folder import RunFolder
from sepcap.studies.pruning.on_disk.step_files import ROLES
from sepcap.tasks.batches import TokenSample
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

FEW_STEPS = 3
"""Number of steps that are compared by default."""


class Jumps(StudyResult):
    """Jumps of accuracy after pruning steps, by target.

    Attributes:
        tables: "jumps", one row per step and task: change of top-1 accuracy, predictions gained and lost, the part of the change at
            predictions that the bigram path makes right (`bigram`), its `share` of the change, and the accuracy of that path
            (`bigram_top1`). "tokens", the targets that gained and lost most per step and task: how often they occur, how often they were
            right before and after, and their part of the change (`change`).
    """

    STUDY = "jumps"
    TITLE = "Which target tokens account for jumps of accuracy?"
    FIGURES: ClassVar[Figures] = {
        "jumps": ("Changes of accuracy, and the part at predictions that the bigram path makes right", draw_jumps),
        "tokens": ("Targets that gained and lost most", draw_tokens),
    }

    def summary(self) -> list[str]:
        """Every jump in a sentence."""
        said = []
        for row in self.tables["jumps"].to_dict("records"):
            points, part = (_points(row, name) for name in ("change", "bigram"))
            tokens = self.tables["tokens"]
            of = tokens[(tokens["step"] == row["step"]) & (tokens["role"] == row["role"])]
            most = {way: list(of.loc[of["direction"] == way, "text"])[:3] for way in ("gained", "lost")}
            names = {way: ", ".join(map(repr, texts)) or "none" for way, texts in most.items()}
            said.append(
                f"Step {row['step']}, {row['task']}: top-1 accuracy changed by {points} points; {row['gained']:,} predictions became right "
                f"and {row['lost']:,} wrong of {row['n']:,}. Most gained: {names['gained']}; most lost: {names['lost']}. {part} points of "
                f"the change are at predictions that the bigram path makes right, {row['bigram_top1']:.1%} of all."
            )
        return said


def find_jumps(
    run: RunFolder,
    model: Any = None,
    *,
    steps: Sequence[int] | Literal["all"] | None = None,
    top: int = 10,
    tasks: Mapping[str, Any] | None = None,
    device: str | None = None,
    batch_size: int | None = None,
    seed: int = 0,
) -> Jumps:
    """Compare the predictions before and after pruning steps, target by target; see `Run.jumps`."""
    chosen = _chosen(run, steps)
    for role in tasks or {}:
        if role not in ROLES:
            raise unknown("role", role, ROLES)
    if model is None or isinstance(model, str | Path):
        model = model_of(run, device, None if model is None else str(model))
    model = load_model(model)
    run.check_model(model)
    if kind_of(model) != "causal":
        raise ValueError(f"{model.cfg.model_name} predicts no next tokens, so its targets have no bigram path")
    samples = {role: _sample(run, model, role, tasks or {}) for role in ROLES}
    size = run.config["batch_size"] if batch_size is None else batch_size
    bigram = {role: bigram_right(model, sample, size) for role, sample in samples.items()}
    right: dict[int, dict[str, Tensor]] = {}
    snapshot = WeightSnapshot(model, tuple(run.neurons(0).masks))
    try:
        for step in sorted({*chosen, *(step - 1 for step in chosen)}):
            run.apply(model, step)
            right[step] = {role: correct_in(model, sample, size) for role, sample in samples.items()}
            snapshot.restore()
    finally:
        snapshot.restore()
    jumps, tokens = [], []
    for step in chosen:
        for role, sample in samples.items():
            names = {"step": step, "role": role, "task": run.config[role]}
            parts = _Change(sample, right[step - 1][role], right[step][role], bigram[role], seed)
            jumps.append(names | parts.row())
            tokens += [names | row for row in parts.tokens(top, model.tokenizer)]
    kept = ("model", "model_fingerprint", "forget", "retain", "importance", "samples", "context", "eval_tokens")
    config = {"run": run.identity, "steps": chosen, "top": top, "seed": seed, **{name: run.config.get(name) for name in kept}}
    config["n_documents"] = {role: sample.n_documents for role, sample in samples.items()}
    return Jumps(config, {"jumps": pd.DataFrame(jumps), "tokens": pd.DataFrame(tokens, columns=TOKEN_COLUMNS)})


TOKEN_COLUMNS = [
    *("step", "role", "task", "direction", "token", "text", "count", "right_before", "right_after", "change", "change_low", "change_high"),
]
"""Columns of the table of tokens, which can be empty."""


def bigram_right(model: Any, sample: TokenSample, batch_size: int) -> Bool[Tensor, "row pos"]:
    """Positions at which the bigram path alone has the right first choice: embeddings, last norm and unembedding, without any block.

    Source: Elhage et al., "A mathematical framework for transformer circuits" (2021), the direct path.
    """
    kept: dict[str, Tensor] = {}

    def keep(vectors: Tensor, hook: Any) -> None:
        kept["stream"] = vectors

    def put_back(vectors: Tensor, hook: Any) -> Tensor:
        return kept["stream"]

    ends = (hook_of(model, "resid_pre", 0), keep), (hook_of(model, "resid_post", all_layers(model)[-1]), put_back)
    with with_hooks(model, ends):
        return correct_in(model, sample, batch_size)


def _chosen(run: RunFolder, steps: Sequence[int] | Literal["all"] | None) -> list[int]:
    """The steps asked for, in order; by default those after which the accuracy of a task changed most."""
    if run.steps_done < 1:
        raise ValueError(f"the run in {run.folder} has no pruning step yet")
    if steps is None:
        top1 = run.trajectory.pivot(index="step", columns="role", values="top1")
        change = top1.diff().abs().max(axis=1).iloc[1:]
        return sorted(int(step) for step in change.sort_values(ascending=False, kind="stable").index[:FEW_STEPS])
    listed = list(range(1, run.steps_done + 1)) if isinstance(steps, str) else sorted({int(step) for step in steps})
    if not listed or listed[0] < 1 or listed[-1] > run.steps_done:
        raise ValueError(f"steps={steps!r}: this run has the pruning steps 1 to {run.steps_done}; give some of them, or 'all'")
    return listed


def _sample(run: RunFolder, model: Any, role: str, tasks: Mapping[str, Any]) -> TokenSample:
    """The evaluation tokens of a run."""
    c = run.config
    try:
        task = load_task(tasks.get(role, c[role]))
    except (ValueError, FileNotFoundError) as error:
        raise ValueError(f"tasks: the texts of {role!r} are not found by their name ({error}); give tasks={{{role!r}: …}}") from error
    sample = sample_task(model, task, "evaluate", c["eval_tokens"], c["context"], 0, c["per_document"])
    if sample.fingerprint != c["samples"]["evaluate"][role]:
        raise ValueError(f"tasks: {task.name!r} has other evaluation tokens than the run in {run.folder} was evaluated on as {role!r}")
    return sample


class _Change:
    """The predictions of one task before and after a step."""

    def __init__(self, sample: TokenSample, before: Tensor, after: Tensor, bigram: Tensor, seed: int) -> None:
        batch = next(iter(sample.batches(len(sample.rows))))
        self.asked, self.answers = batch.asked.numpy(), batch.answers.numpy()
        self.before, self.after, self.bigram = (x.numpy() & self.asked for x in (before, after, bigram))
        self.change = self.after.astype(np.int64) - self.before
        self.clusters = sample.clusters
        self.n, self.documents = int(self.asked.sum()), len(np.unique(self.clusters))
        self.weights = bootstrap_weights(self.documents, np.random.default_rng(seed))

    def _replicas(self, values: Int[np.ndarray, "row pos"]) -> Float[np.ndarray, " replica"]:
        """Sums of the values in bootstrap samples of the documents."""
        return (self.weights @ cluster_sums(values.sum(1)[:, None].astype(np.float64), self.clusters))[:, 0]

    def _interval(self, values: Int[np.ndarray, "row pos"], of: Int[np.ndarray, "row pos"]) -> Ends:
        """95% interval of Σ values / Σ of."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return bootstrap_interval(self._replicas(values) / self._replicas(of), self.documents)

    def row(self) -> dict[str, Any]:
        """The change, and its part at predictions that the bigram path makes right."""
        asked, part = self.asked.astype(np.int64), self.change * self.bigram
        total = int(self.change.sum())
        found: dict[str, Any] = {
            "n": self.n,
            "n_documents": self.documents,
            "gained": int((self.change > 0).sum()),
            "lost": int((self.change < 0).sum()),
        }
        found["bigram_top1"] = float(self.bigram.sum() / self.n)
        share = part.sum() / total if total else np.nan
        values = {"change": (total / self.n, asked), "bigram": (part.sum() / self.n, asked), "share": (share, self.change)}
        for name, (value, of) in values.items():
            found |= as_columns(name, float(value), self._interval(self.change if name == "change" else part, of))
        return found

    def tokens(self, top: int, tokenizer: Any) -> list[dict[str, Any]]:
        """The targets with the largest changes in both directions; of equal ones the smaller token first."""
        ids, places = np.unique(self.answers[self.asked], return_inverse=True)
        count, before, after = (np.bincount(places, values[self.asked], len(ids)) for values in (self.asked, self.before, self.after))
        change = (after - before).astype(np.int64)
        rows = []
        for direction, sign in (("gained", 1), ("lost", -1)):
            order = np.argsort(-sign * change, kind="stable")[:top]
            for i in order[sign * change[order] > 0]:
                here = self.change * (self.answers == ids[i])
                ends = self._interval(here, self.asked.astype(np.int64))
                row = {"direction": direction, "token": int(ids[i]), "text": tokenizer.decode([int(ids[i])]), "count": int(count[i])}
                row |= {"right_before": int(before[i]), "right_after": int(after[i])}
                rows.append(row | as_columns("change", float(change[i] / self.n), ends))
        return rows


def _points(row: Mapping[str, Any], name: str) -> str:
    value, low, high = (100 * row[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" if np.isfinite(low) else f"{value:+.2f} [unknown]"
