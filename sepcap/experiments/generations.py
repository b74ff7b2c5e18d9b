"""What a model writes before and after a run, kept in the folder of the run."""

import logging
import os
from pathlib import Path
from typing import Any

from sepcap.errors import CorruptFile
from sepcap.experiments.comparison import continuations
from sepcap.experiments.run import Run
from sepcap.models.load import load_model
from sepcap.models.weights import fingerprint
from sepcap.schemas import Generations
from sepcap.storage import read_json, write_json

log = logging.getLogger(__name__)

FILE = "generations.json"


def generations(run: Run, model: Any = None, device: str | None = None) -> dict[str, Any]:
    """Continuations of the same prompts before pruning and after the step where the tasks are furthest apart.

    Those kept in the folder where there are any of that step. Else they are made and kept there, with the model given or the
    one that the configuration names, when it lies on this machine with the weights that the run began with.

    Args:
        run: finished or not.
        model: the unpruned model of the run, as `load_model` takes or returns it; it is given back unchanged.
        device: where the model is loaded, if none is given.

    Returns:
        `rows` (kind, prompt, before, after), their `step`, and the `reason` where there are none or those of another step.

    Raises:
        ValueError: `model` has other weights than the run began with.
        CorruptFile: the texts kept in the folder cannot be read.

    Example:
        >>> generations(sepcap.Run.load("runs/opt"))["rows"][0]["after"]  # doctest: +SKIP

    Source: none; what numbers do not show.
    """
    expected = run.config.get("model_fingerprint")
    if model is not None:
        model = load_model(model)
        if (found := fingerprint(model)) != expected:
            raise ValueError(f"model has the weights {found}, but the run in {run.folder} began with {expected}: give that model, unpruned")
    if run.steps_done < 1:
        return {"rows": [], "reason": "None: nothing has been pruned yet."}
    step = _step(run)
    kept = texts_kept(run)
    if kept is not None and kept["step"] == step:
        return kept | {"reason": ""}
    try:
        made = {"step": step, "model_fingerprint": expected}
        made["rows"] = continuations(_model_of(run, device) if model is None else model, run, step).to_dict("records")
    except (OSError, ValueError, TypeError, ImportError, RuntimeError) as error:  # the page is worth having without them
        if kept is not None:
            return kept | {"reason": f"The run has gone on since, but texts after step {step} could not be made: {error}"}
        return {"rows": [], "reason": f"None: a run folder does not hold the model, and it could not be used from here: {error}"}
    try:
        write_json(run.folder / FILE, made)
    except OSError as error:  # a folder that is only read can be shown all the same
        log.info("the texts are not kept: %s", error)
    return made | {"reason": ""}


def _step(run: Run) -> int:
    """Where the tasks are furthest apart; the last step where they never are."""
    try:
        return run.separability("top1").max_drop_step or run.steps_done
    except ValueError:
        return run.steps_done


def texts_kept(run: Run) -> dict[str, Any] | None:
    """The texts in the folder, if they are of the model that the run began with.

    Raises:
        CorruptFile: they cannot be read.
    """
    path = run.folder / FILE
    if not os.path.lexists(path):
        return None
    try:
        kept = read_json(path, Generations)
    except CorruptFile as error:
        raise CorruptFile(f"{error}. Delete it, it is made again where the model can be had") from error
    return kept if kept["model_fingerprint"] == run.config.get("model_fingerprint") else None


def _model_of(run: Run, device: str | None) -> Any:
    """The model that the configuration names, from this machine alone."""
    from huggingface_hub import snapshot_download

    name = source = str(run.config.get("model"))
    if name != "default" and not Path(name).expanduser().is_dir():
        try:
            source = snapshot_download(name, local_files_only=True)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{name!r} is neither a folder that can be found from here nor in the local Hugging Face cache"
            ) from error
    model = load_model(source, dtype=str(run.config.get("dtype", "float32")).removeprefix("torch."), device=device)
    if fingerprint(model) != run.config.get("model_fingerprint"):
        raise ValueError(f"{name!r} has other weights here than those the run began with")
    return model
