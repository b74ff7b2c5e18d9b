"""The view in a notebook: an anywidget whose button ablates the neuron and measures what that costs on both tasks (METHODS 23)."""

import html
import json
import warnings
from importlib.util import find_spec
from typing import Any

from sepcap.errors import missing_extra
from sepcap.evaluation.next_token import evaluate_sample
from sepcap.interventions.ablation import ablate
from sepcap.models.weights import check_fingerprint
from sepcap.studies.neuron_profiles.explorer import asset, explorer_data, explorer_page
from sepcap.studies.neuron_profiles.units import ROLES
from sepcap.tasks.load import load_task
from sepcap.tasks.samples import sample_task

HEIGHT = 760
"""Pixels of the view in a notebook."""

RENDER = """
export default {
  render({ model, el }) {
    el.classList.add("sepcap");
    const root = document.createElement("div");
    root.className = "explorer";
    el.append(root);
    const view = explore(root, JSON.parse(model.get("data")), model.get("can_ablate") ? (i) => model.send({ ablate: i }) : null);
    const hear = (message) => { if ("unit" in message) view.answer(message.unit, message); };
    model.on("msg:custom", hear);
    return () => model.off("msg:custom", hear);
  },
};
"""


class Costs:
    """What the ablation of single units costs on the evaluation texts of both tasks.

    Args:
        result: NeuronProfiles.
        model: the model of the profiles.
        tasks: the two tasks; None to load them by their names.
        tokens: predictions per task.
    """

    def __init__(self, result: Any, model: Any, tasks: Any, tokens: int) -> None:
        given = result.config["tasks"] if tasks is None else tasks
        if isinstance(given, str) or len(given) != len(ROLES):
            raise ValueError(f"tasks={given!r}: give the two tasks of the profiles, the one to forget first")
        how = {"context": result.config["context"], "per_document": result.config["per_document"]}
        self.result, self.model, self.batch_size = result, model, result.config["batch_size"]
        self.samples = [sample_task(model, load_task(task), "evaluate", tokens, **how) for task in given]
        check_fingerprint(model, result.config["model_fingerprint"], "these profiles are of")
        self.before: list[Any] = []

    def of(self, unit: int) -> dict[str, Any]:
        """The change of cross-entropy and top-1 on both tasks when a unit is set to zero, with paired 95% intervals over documents."""
        if not self.before:
            self.before = [evaluate_sample(self.model, sample, batch_size=self.batch_size) for sample in self.samples]
        tasks = []
        for task, sample, before in zip(self.result.config["tasks"], self.samples, self.before, strict=True):
            with ablate(self.model, self.result.neurons(unit, model=self.model)):
                after = evaluate_sample(self.model, sample, batch_size=self.batch_size)
            found = {"task": str(task), "n": int(after.n)}
            for metric in ("loss", "top1"):
                value, (low, high) = after.difference(before, metric)
                found |= {metric: float(value), f"{metric}_low": float(low), f"{metric}_high": float(high)}
            tasks.append(found)
        return {"unit": unit, "tasks": tasks}


class StaticView:
    """The page inside a notebook, without a click: for where anywidget is not installed."""

    def __init__(self, result: Any) -> None:
        self.page = explorer_page(result)

    def _repr_html_(self) -> str:
        return f'<iframe srcdoc="{html.escape(self.page)}" sandbox="allow-scripts" style="width:100%;height:{HEIGHT}px;border:0"></iframe>'


def explored(result: Any, model: Any, tasks: Any, tokens: int) -> Any:
    """An anywidget of the profiles, or without the package the static view, with a warning if a model is given."""
    if find_spec("anywidget") is None:
        if model is not None:
            said = missing_extra("anywidget", "widget", "a click that ablates a neuron")
            warnings.warn(f"{said}. The view is static", stacklevel=4)
        return StaticView(result)
    return _widget(result, None if model is None else Costs(result, model, tasks, tokens))


def _widget(result: Any, costs: Costs | None) -> Any:
    import anywidget  # pyright: ignore[reportMissingImports] (an extra, which need not be installed)
    import traitlets

    class Explorer(anywidget.AnyWidget):
        """The view, with what it asks for answered by the model."""

        _esm = asset("js").replace('"use strict";', "") + RENDER
        _css = asset("css")
        data = traitlets.Unicode().tag(sync=True)
        can_ablate = traitlets.Bool(False).tag(sync=True)

    view = Explorer(data=json.dumps(explorer_data(result), separators=(",", ":"), allow_nan=False), can_ablate=costs is not None)
    if costs is not None:

        def answer(_: Any, message: Any, buffers: Any) -> None:
            unit = message.get("ablate") if isinstance(message, dict) else None
            if not isinstance(unit, int) or not 0 <= unit < len(result.table):
                return
            try:
                view.send(costs.of(unit))
            except Exception as error:  # shown in the view: an exception in a callback is not seen in a notebook
                view.send({"unit": unit, "error": f"{type(error).__name__}: {error}"})

        view.on_msg(answer)
    return view
